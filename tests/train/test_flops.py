"""Costs by formula against torch's own counter on the meta device, and the figures of the published size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone, families
from ex4d.train import flops

SHAPE_14B = families.FAMILIES["wan2.1-i2v-14b"].transformer
PUBLISHED = flops.cost(SHAPE_14B, flops.latent_size((49, 512, 512)), backbone.ModelConfig())


def counted(
    shape: dict[str, Any], latents: tuple[int, int, int], recomputed: int, source: bool = False, **chosen: Any
) -> tuple[int, int]:
    """The slow twin: run the model in shapes alone under torch's FLOP counter; return (forward, whole step)."""
    config = backbone.ModelConfig(lora_rank=8, adapter_hidden=64, **chosen)
    model = adapter.build_model(backbone.meta_transformer(shape), config)
    model.set_gradient_checkpointing(recomputed > 0, recomputed)
    z, first = shape["out_channels"], shape["in_channels"] - shape["out_channels"]

    def empty(*size: int) -> Tensor:
        return torch.empty(size, device="meta")

    with FlopCounterMode(display=False) as counter:
        velocity = model(
            empty(1, z, *latents),
            empty(1),
            empty(1, 512, shape["text_dim"]),
            empty(1, 257, 1280) if shape["image_dim"] else None,
            empty(1, first, *latents) if first else None,
            empty(1, 2 * z, *latents),
            empty(1, z, *latents) if source else None,
        )
        forward = counter.get_total_flops()
        velocity.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("name", list(families.FAMILIES))
@pytest.mark.parametrize(("recomputed", "source"), [(0, False), (3, False), (0, True), (1, False)])
def test_formula_equals_the_counter(name: str, recomputed: int, source: bool) -> None:
    shape, latents = dict(families.FAMILIES[name].transformer) | {"num_layers": 3}, (3, 12, 16)
    cost = flops.cost(shape, latents, backbone.ModelConfig(lora_rank=8, adapter_hidden=64, source_video=source))
    forward, step = counted(shape, latents, recomputed, source)
    assert cost.tokens == 3 * 6 * 8 * (2 if source else 1)
    assert cost.forward == forward
    assert cost.executed(recomputed / 3) == pytest.approx(step, rel=1e-9)


@pytest.mark.parametrize("targets", [("to_q", "to_v"), ("to_k", "ffn.net.2"), ("to_out.0",)])
def test_formula_with_lora_on_fewer_layers(targets: tuple[str, ...]) -> None:
    shape, latents = dict(SHAPE_14B) | {"num_layers": 3}, (3, 12, 16)
    config = backbone.ModelConfig(lora_rank=8, adapter_hidden=64, lora_targets=targets)
    cost = flops.cost(shape, latents, config)
    forward, step = counted(shape, latents, 3, lora_targets=targets)
    assert cost.forward == forward
    assert cost.executed(1.0) == pytest.approx(step, rel=1e-9)


def test_kept_self_attention_is_not_executed_again() -> None:
    kept = PUBLISHED.executed(0.5) - PUBLISHED.executed(0.5, keep_attention=True)
    assert kept == pytest.approx(0.5 * PUBLISHED.parts["attention"].forward)
    assert PUBLISHED.executed(0.0, keep_attention=True) == PUBLISHED.useful


def test_figures_of_the_published_size() -> None:
    assert flops.latent_size((49, 512, 512)) == (13, 64, 64)
    assert PUBLISHED.tokens == 13_312
    peta = {name: part.forward / 1e15 for name, part in PUBLISHED.parts.items()}
    assert peta["linear"] == pytest.approx(0.318, abs=5e-4)
    assert peta["attention"] + peta["attention_text"] + peta["attention_image"] == pytest.approx(0.154, abs=5e-4)
    assert PUBLISHED.forward / 1e15 == pytest.approx(0.472, rel=0.02)
    assert PUBLISHED.useful / 1e15 == pytest.approx(1.10, rel=0.02)
    assert PUBLISHED.executed(1.0) / 1e15 == pytest.approx(1.57, rel=0.02)


def test_utilisation_says_useful_and_executed() -> None:
    peak = flops.peak_flops("NVIDIA H200")
    assert peak == 989e12
    assert flops.peak_flops("an abacus") is None
    seconds = flops.seconds_per_step(PUBLISHED, 4, "H200", recomputed=1.0, hfu=0.45)
    mfu, hfu = flops.utilisation(PUBLISHED, 4 / seconds, peak, recomputed=1.0)
    assert hfu == pytest.approx(0.45)
    assert mfu / hfu == pytest.approx(1.10 / 1.57, rel=0.02)
    with pytest.raises(ConfigError, match="H100"):
        flops.seconds_per_step(PUBLISHED, 4, "abacus", recomputed=1.0)
