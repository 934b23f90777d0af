"""Quantise the frozen base to 8 or 4 bits with plain torch: int8, fp8 and NF4 weights, dequantised on use.

Only the linear layers of the blocks are quantised; they hold more than 99 % of a Wan transformer. Activations, biases,
norms and embeddings stay as they are. These weights are never trained, so no gradient passes through the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Quantiles of a normal distribution in [−1, 1] (Dettmers et al. 2023, QLoRA, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCK = 64
_FLOAT8_MAX = 448.0


@dataclass(frozen=True)
class Style:
    """One way to store a weight [out, in].

    Args:
        encode: weight float32 -> (codes uint8, scale).
        decode: (codes, scale, shape, dtype, levels) -> weight.
        levels: what the codes stand for, where they are numbers of a table.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, torch.Size, torch.dtype, Tensor | None], Tensor]
    levels: Sequence[float] | None = None


def _row_scale(weight: Tensor, largest: float) -> Tensor:
    return (weight.abs().amax(dim=1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)


def _encode_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = _row_scale(weight, 127.0)
    return (weight / scale).round().to(torch.int8).view(torch.uint8), scale


def _decode_int8(codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype, levels: Tensor | None) -> Tensor:
    return codes.view(torch.int8).to(dtype) * scale.to(dtype)


def _encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = _row_scale(weight, _FLOAT8_MAX)
    # Kept as bytes, so that casting a module to another dtype cannot widen them.
    return (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


def _decode_fp8(codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype, levels: Tensor | None) -> Tensor:
    return codes.view(torch.float8_e4m3fn).to(dtype) * scale.to(dtype)


def _encode_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-30).bfloat16()
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(flat / scale.float(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2], scale


def _decode_nf4(codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype, levels: Tensor | None) -> Tensor:
    assert levels is not None
    levels = levels.to(codes.device, dtype)
    # One look-up decodes both codes of a byte, which halves the memory of the indices.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    values = nn.functional.embedding(codes.int(), pairs).flatten(1) * scale.to(dtype)
    return values.flatten()[: math.prod(shape)].view(shape)


# Rows quantised at a time: a float32 copy of a whole layer would take more memory than its codes. Any 64 rows are whole
# NF4 blocks, so the codes equal those of the whole layer.
ROWS = 256

STYLES = {
    "int8": Style(_encode_int8, _decode_int8),
    "fp8": Style(_encode_fp8, _decode_fp8),
    "nf4": Style(_encode_nf4, _decode_nf4, NF4),
}


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b that keeps the codes for its backward pass, where autograd would keep the dequantised weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, layer: QuantizedLinear
    ) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.layer = layer
        return nn.functional.linear(x, layer.decode(codes, scale, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        return grads[0] @ ctx.layer.decode(codes, scale, grads[0].dtype), None, None, None, None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with its weight in `qweight` and `scale`; computes in the dtype of its input."""

    def __init__(self, layer: nn.Linear, style: str, device: torch.device | str):
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.style, self.shape = style, layer.weight.shape
        parts = [STYLES[style].encode(rows.to(device).float()) for rows in layer.weight.detach().split(ROWS)]
        codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
        self.register_buffer("qweight", codes)
        self.register_buffer("scale", scale)
        # Created once: building it from Python numbers at each use would block the host until the GPU catches up. Not
        # a buffer, since a buffer would be swapped out with the block before the backward pass needs it.
        table = STYLES[style].levels
        self.levels = None if table is None else torch.tensor(table, device=device)
        self.register_parameter("weight", None)  # peft looks for it first, then for qweight
        self.bias = layer.bias

    def decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
        return STYLES[self.style].decode(codes, scale, self.shape, dtype, self.levels)

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenProduct.apply(input, self.qweight, self.scale, self.bias, self)
