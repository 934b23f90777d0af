"""The quantised base: small errors, exact gradients of its own computation, no dequantised weights kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone, encoders, quantize

STYLES = list(quantize.STYLES)
# Root mean square error of normal weights, relative to their own: uniform steps over ±max, 3 bits of mantissa, NF4.
RELATIVE_ERROR = {"int8": 0.012, "fp8": 0.03, "nf4": 0.11}


def make_layer(style: str, out: int = 48, width: int = 40) -> tuple[nn.Linear, quantize.QuantizedLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(width, out).requires_grad_(False)
    nn.init.normal_(layer.weight)
    return layer, quantize.QuantizedLinear(layer, style, "cpu")


def slow_nf4(weight: np.ndarray) -> np.ndarray:
    """The slow twin of NF4, one number at a time: the nearest level in its block of 64."""
    flat = weight.ravel()
    out = np.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = float(torch.tensor(np.abs(block).max()).bfloat16())
        for offset, value in enumerate(block):
            out[start + offset] = min(quantize.NF4, key=lambda level: abs(level - value / scale)) * scale
    return out.reshape(weight.shape)


@pytest.mark.parametrize("style", STYLES)
def test_error_is_that_of_the_format(style: str) -> None:
    layer, quantised = make_layer(style)
    weight = quantised.decode(quantised.qweight, quantised.scale, torch.float32)
    error = float((weight - layer.weight).square().mean().sqrt() / layer.weight.square().mean().sqrt())
    assert 0.3 * RELATIVE_ERROR[style] < error < RELATIVE_ERROR[style]
    assert quantised.qweight.numel() * (2 if style == "nf4" else 1) == layer.weight.numel()


def test_nf4_is_the_nearest_level() -> None:
    layer, quantised = make_layer("nf4")
    weight = quantised.decode(quantised.qweight, quantised.scale, torch.float32)
    assert np.allclose(weight.numpy(), slow_nf4(layer.weight.numpy()), atol=1e-6)
    # A weight whose size is not a multiple of the block keeps its shape.
    odd, small = make_layer("nf4", out=3, width=7)
    assert small.decode(small.qweight, small.scale, torch.float32).shape == odd.weight.shape


@pytest.mark.parametrize("style", STYLES)
def test_output_and_gradient_are_those_of_the_decoded_weight(style: str) -> None:
    layer, quantised = make_layer(style)
    with torch.no_grad():
        layer.weight.copy_(quantised.decode(quantised.qweight, quantised.scale, torch.float32))
    inputs = [torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((layer, quantised), inputs, strict=True)]
    for out in outputs:
        out.square().sum().backward()
    assert torch.equal(*outputs)
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-4)


def test_autograd_keeps_codes_not_weights() -> None:
    _, quantised = make_layer("nf4", out=512, width=512)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quantised(torch.randn(2, 512, requires_grad=True))
    assert 0 < sum(tensor.numel() * tensor.element_size() for tensor in kept) < 0.6 * 512 * 512


def test_nothing_is_copied_from_the_program_to_the_device_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made of Python's numbers on a GPU holds the program until the GPU is through, at each of 400 layers."""
    layers = [make_layer(style)[1] for style in STYLES]
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a tensor is made of Python's numbers"))
    for layer in layers:
        layer(torch.ones(2, 40, requires_grad=True)).sum().backward()


def run(folder: Path, style: str | None, checkpointing: bool = False) -> tuple[Tensor, list[Tensor], Any]:
    base = backbone.load_base(str(folder), components=("transformer",), quantize=style)
    model = adapter.build_model(base.transformer, backbone.ModelConfig(lora_rank=4, adapter_hidden=16))
    model.set_gradient_checkpointing(checkpointing)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = (draw(1, 512, 32), draw(1, 17, 16), draw(1, 20, 2, 4, 6), draw(1, 32, 2, 4, 6))
    out = model(draw(1, 16, 2, 4, 6), torch.tensor([500.0]), *inputs)
    out.square().mean().backward()
    return (
        out.detach(),
        [value.grad for value in model.trainable_parameters().values() if value.grad is not None],
        model,
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_whole_model_trains_on_it(wan_folder: Path, style: str) -> None:
    plain, _, original = run(wan_folder, None)
    out, gradients, model = run(wan_folder, style, checkpointing=True)
    assert len(gradients) == 48
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert float((out - plain).std() / plain.std()) < 2 * RELATIVE_ERROR[style]
    assert not torch.equal(out, plain)
    assert isinstance(model.transformer.blocks[0].ffn.net[2].base_layer, quantize.QuantizedLinear)
    # An adapter trained on it still knows its base.
    assert encoders.base_fingerprint(model.transformer) == encoders.base_fingerprint(original.transformer)


def test_unknown_style_is_refused() -> None:
    with pytest.raises(ConfigError, match="nf4"):
        backbone.ModelConfig(quantize="int3")  # type: ignore[arg-type]
