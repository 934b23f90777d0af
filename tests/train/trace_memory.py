"""Compute the memory of a full-size training step without allocating it: torch's fake tensors have only shapes.

    python tests/train/trace_memory.py [BLOCKS [MICRO_BATCH [RECOMPUTED_BLOCKS]]]     prints what is held at the peak

A tensor is held from the operator that makes it until the last reference to its storage is gone, as PyTorch's allocator
counts on a GPU (`torch.cuda.max_memory_allocated`). Two operators differ between the fake CPU that traces and a GPU,
and are put right: the fused RMS norm keeps its input and a number a row; the flash kernel's backward pass adds up the
queries' gradients in float32.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ex4d.models import adapter, backbone
from ex4d.models.encoders import TEXT_LENGTH
from ex4d.train import flops

FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Held(TorchDispatchMode):
    """Adds up the bytes of all tensors that operators create, for as long as they are referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.by_operator: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def add(self, tensor: Tensor, name: str) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.now += size
        self.by_operator[name] += size
        weakref.finalize(storage, self._drop, size, name)

    def _drop(self, size: int, name: str) -> None:
        self.now -= size
        self.by_operator[name] -= size

    def note_peak(self, more: int = 0) -> None:
        """Update the peak with the current bytes, plus `more` inside an operator."""
        if self.now + more > self.peak:
            self.peak, self.at_peak = self.now + more, Counter(self.by_operator)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor, str(function))
        # The flash kernel's own: a float32 sum of the queries' gradients.
        self.note_peak(4 * args[1].numel() if function is FLASH_BACKWARD else 0)
        return result


class _FusedRmsNorm(torch.autograd.Function):
    """Emulates what the GPU's kernel allocates and keeps; the values do not matter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return _FusedRmsNorm.apply(x, weight)

    with mock.patch.object(torch.nn.functional, "rms_norm", rms_norm):
        yield


def make_fake(model: adapter.Ex4dModel) -> None:
    """Give a meta model fake weights in the types of training: bfloat16, trainables and kept modules float32."""
    kept = tuple(model.transformer._keep_in_fp32_modules or ())
    for path, module in model.named_modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                whole = value.requires_grad or any(part in f"{path}.{name}" for part in kept)
                fake = torch.empty(value.shape, dtype=torch.float32 if whole else torch.bfloat16)
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def traced_step(
    shape: Mapping[str, Any], latents: tuple[int, int, int], micro_size: int, recomputed: int | None = None
) -> Held:
    """Return the bytes held in a step's last micro batch, forward and backward, with gradients and AdamW's moments.

    Args:
        recomputed: how many blocks recompute their activations; None: all.
    """
    held, z = Held(), shape["out_channels"]
    model = adapter.build_model(backbone.meta_transformer(shape), backbone.ModelConfig())
    with FakeTensorMode(), _as_on_a_gpu():
        make_fake(model)
        model.set_gradient_checkpointing(True, recomputed)
        image = torch.empty(micro_size, flops.CLIP_TOKENS, shape["image_dim"]) if shape["image_dim"] else None
        inputs = (
            torch.empty(micro_size, z, *latents),
            torch.empty(micro_size),
            torch.empty(micro_size, TEXT_LENGTH, shape["text_dim"]),
            image,
            torch.empty(micro_size, shape["in_channels"] - z, *latents),
            torch.empty(micro_size, 2 * z, *latents),
        )
        target = torch.empty(micro_size, z, *latents)
        trainables = list(model.trainable_parameters().values())
        moments = [torch.empty_like(value) for value in trainables for _ in range(2)]
        for parameter in trainables:
            parameter.grad = torch.empty_like(parameter)
        gradients = [parameter.grad for parameter in trainables]
        there = {"weights": model.parameters(), "buffers": model.buffers(), "moments": moments, "gradients": gradients}
        for name, values in there.items():
            for value in values:
                held.add(value, name)
        for value in (*inputs, target):
            if value is not None:
                held.add(value, "inputs")
        with held:
            loss = (model(*inputs) - target).square().mean()
            loss.backward()
    return held


if __name__ == "__main__":
    from ex4d.models import families

    blocks, micro, count = [*map(int, sys.argv[1:]), *(40, 1, -1)[len(sys.argv) - 1 :]]
    chosen = dict(families.FAMILIES["wan2.1-i2v-14b"].transformer) | {"num_layers": blocks}
    found = traced_step(chosen, flops.latent_size((49, 512, 512)), micro, None if count < 0 else count)
    print(f"peak {found.peak / 1e9:.3f} GB")
    for operator, size in found.at_peak.most_common(20):
        print(f"{size / 1e9:8.3f}  {operator}")
