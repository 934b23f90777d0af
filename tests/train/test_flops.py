"""Costs by formula against torch's own counter on the meta device, and the figures of the published size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone, families
from ex4d.train import flops

SHAPE_14B = families.FAMILIES["wan2.1-i2v-14b"].transformer
PUBLISHED = flops.cost(SHAPE_14B, flops.latent_size((49, 512, 512)))


def counted(shape: dict[str, Any], latents: tuple[int, int, int], checkpointing: bool, source: bool) -> tuple[int, int]:
    """The slow twin: run the model in shapes alone under torch's FLOP counter; return (forward, whole step)."""
    from torch.utils.flop_counter import FlopCounterMode

    model = adapter.build_model(backbone.meta_transformer(shape), backbone.ModelConfig(lora_rank=8, adapter_hidden=64))
    model.set_gradient_checkpointing(checkpointing)
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
@pytest.mark.parametrize(("checkpointing", "source"), [(False, False), (True, False), (False, True)])
def test_formula_equals_the_counter(name: str, checkpointing: bool, source: bool) -> None:
    shape, latents = dict(families.FAMILIES[name].transformer) | {"num_layers": 3}, (3, 12, 16)
    cost = flops.cost(shape, latents, lora_rank=8, adapter_hidden=64, source_video=source)
    forward, step = counted(shape, latents, checkpointing, source)
    assert cost.tokens == 3 * 6 * 8 * (2 if source else 1)
    assert cost.forward == forward
    assert cost.executed(checkpointing) == pytest.approx(step, rel=1e-9)


def test_figures_of_the_published_size() -> None:
    assert flops.latent_size((49, 512, 512)) == (13, 64, 64)
    assert PUBLISHED.tokens == 13_312
    peta = {name: part.forward / 1e15 for name, part in PUBLISHED.parts.items()}
    assert peta["linear"] == pytest.approx(0.318, abs=5e-4)
    assert peta["attention"] + peta["attention_image"] == pytest.approx(0.154, abs=5e-4)
    assert PUBLISHED.forward / 1e15 == pytest.approx(0.472, rel=0.02)
    assert PUBLISHED.useful / 1e15 == pytest.approx(1.10, rel=0.02)
    assert PUBLISHED.executed(True) / 1e15 == pytest.approx(1.57, rel=0.02)


def test_memory_of_the_published_size_fits_48_gb() -> None:
    parameters = flops.count_parameters(SHAPE_14B, backbone.ModelConfig())
    assert parameters == {"base": 16_394_878_784, "lora": 76_677_120, "geometry_adapter": 23_109_632}
    parts = flops.memory(SHAPE_14B, parameters, PUBLISHED.tokens)
    assert parts["frozen base"] / 1e9 == pytest.approx(32.8, abs=0.05)
    assert parts["block inputs"] / 1e9 == pytest.approx(5.45, abs=0.05)
    assert 40e9 < sum(parts.values()) < 48e9
    without = flops.memory(SHAPE_14B, parameters, PUBLISHED.tokens, checkpointing=False)
    assert sum(without.values()) > 141e9
    sharded = flops.memory(SHAPE_14B, parameters, PUBLISHED.tokens, zero_stage=3, world_size=8, ema=True)
    assert sharded["frozen base"] == parts["frozen base"] / 8
    assert sharded["ema"] == parts["trainable weights"]
    four_bit = flops.memory(SHAPE_14B, parameters, PUBLISHED.tokens, base_bytes=0.5, cpu_offload=True)
    assert sum(four_bit.values()) < 24e9


def kept_bytes(num_layers: int, latents: tuple[int, int, int]) -> int:
    """Bytes that autograd keeps for a bfloat16 base of width 128 and ffn 512, parameters left out."""
    from diffusers import WanTransformer3DModel

    changes = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": num_layers}
    changes |= {"text_dim": 16, "image_dim": None, "added_kv_proj_dim": None, "in_channels": 16}
    transformer: Any = WanTransformer3DModel(**(dict(SHAPE_14B) | changes))
    for name, parameter in transformer.named_parameters():
        if not any(kept in name for kept in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    model = adapter.build_model(transformer, backbone.ModelConfig(adapter_hidden=8))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(
            torch.randn(1, 16, *latents),
            torch.ones(1),
            torch.randn(1, 512, 16),
            cond_latents=torch.randn(1, 32, *latents),
        )
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_activation_estimate_matches_what_autograd_keeps() -> None:
    small, large = (5, 16, 16), (5, 32, 32)
    # Differences over layers and tokens leave what one block keeps for one token.
    blocks = [kept_bytes(2, latents) - kept_bytes(1, latents) for latents in (small, large)]
    per_token = (blocks[1] - blocks[0]) / (5 * 16 * 16 - 5 * 8 * 8)
    shape = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": 1}
    none = {"base": 0, "lora": 0, "geometry_adapter": 0}
    assert flops.memory(shape, none, 1)["block activations"] == pytest.approx(per_token, rel=0.05)


def test_utilisation_says_useful_and_executed() -> None:
    peak = flops.peak_flops("NVIDIA H200")
    assert peak == 989e12
    assert flops.peak_flops("an abacus") is None
    seconds = flops.seconds_per_step(PUBLISHED, 4, "H200", checkpointing=True, hfu=0.45)
    mfu, hfu = flops.utilisation(PUBLISHED, 4 / seconds, peak, checkpointing=True)
    assert hfu == pytest.approx(0.45)
    assert mfu / hfu == pytest.approx(1.10 / 1.57, rel=0.02)
    with pytest.raises(ConfigError, match="H100"):
        flops.seconds_per_step(PUBLISHED, 4, "abacus", checkpointing=True)


def test_summary_of_the_papers_run() -> None:
    """8 GPUs, 4 clips each: memory, time and price follow from the parts."""
    config = backbone.ModelConfig(base="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
    run = {"global_batch_size": 32, "world_size": 8, "num_steps": 1000, "zero_stage": 2, "checkpointing": True}
    said = flops.summary(SHAPE_14B, config, (13, 64, 64), micro_batch_size=1, gpu="H100", usd_per_gpu_hour=2.0, **run)
    assert said["parameters"]["lora"] == 76_677_120
    assert said["memory_bytes"]["total"] == pytest.approx(sum(list(said["memory_bytes"].values())[:-1]))
    assert said["fits"]
    assert said["seconds_per_step"] == pytest.approx(4 * said["flops_per_sample"]["executed"] / (989e12 * 0.40))
    assert said["usd"] == pytest.approx(said["seconds_per_step"] * 1000 / 3600 * 8 * 2.0)
    small = flops.summary(SHAPE_14B, config, (13, 64, 64), micro_batch_size=1, gpu="RTX 4090", **run)
    assert not small["fits"]
    assert small["usd"] is None
    four_bit = backbone.ModelConfig(quantize="nf4")
    fitting = flops.summary(
        SHAPE_14B, four_bit, (13, 64, 64), micro_batch_size=1, gpu="RTX 4090", cpu_offload=True, **run
    )
    assert fitting["fits"]
