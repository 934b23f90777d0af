"""What a run is said to need, against what torch counts and autograd keeps, and the figures of the published size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone, families, quantize, swap, tiny
from ex4d.train import estimate
from ex4d.train.config import BatchPlan, TrainConfig, plan_batch

SHAPE_14B = families.FAMILIES["wan2.1-i2v-14b"].transformer
LATENTS = (13, 64, 64)
MODEL = backbone.ModelConfig(base="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
PARAMETERS = {"base": 16_394_878_784, "lora": 76_677_120, "geometry_adapter": 23_109_632}
ALONE = BatchPlan(1, 1, 1, 1)


@pytest.fixture(scope="module")
def parameters() -> dict[str, int]:
    return estimate.count_parameters(SHAPE_14B, MODEL)


def bytes_of(parameters: dict[str, int], plan: BatchPlan = ALONE, style: Any = None, **train: Any) -> dict[str, float]:
    model = backbone.ModelConfig(base=MODEL.base, quantize=style)
    config = TrainConfig(**({"activation_checkpointing": True, "zero_stage": 0} | train))
    return estimate.memory(SHAPE_14B, parameters, LATENTS, model, config, plan)


def test_published_counts(parameters: dict[str, int]) -> None:
    assert {name: parameters[name] for name in PARAMETERS} == PARAMETERS
    assert 0.97 < parameters["blocks"] / parameters["base"] < 1


def test_memory_of_the_published_size(parameters: dict[str, int]) -> None:
    parts = bytes_of(parameters)
    assert parts["frozen base"] / 1e9 == pytest.approx(32.8, abs=0.05)
    assert parts["block inputs"] / 1e9 == pytest.approx(5.45, abs=0.05)
    assert 40e9 < sum(parts.values()) < 48e9
    assert sum(bytes_of(parameters, activation_checkpointing=False).values()) > 141e9
    sharded = bytes_of(parameters, BatchPlan(8, 1, 1, 8), zero_stage=3)
    assert sharded["frozen base"] == parts["frozen base"] / 8
    four_bit = bytes_of(parameters, style="nf4", cpu_offload=True, zero_stage=1)
    assert sum(four_bit.values()) < 24e9
    # Swapped blocks leave three copies behind.
    all_swapped = bytes_of(parameters, block_swap=40)
    blocks = parameters["blocks"] * 2.0
    assert parts["frozen base"] - all_swapped["frozen base"] == pytest.approx(blocks * 37 / 40)
    assert bytes_of(parameters, block_swap=3) == parts


def test_base_and_swap_are_counted_as_they_are_stored() -> None:
    """The slow twin: build a small model in the same way and add up what it holds on its device and on the host."""
    shape = dict(tiny.new_transformer(8).config)
    for style, swapped in ((None, 0), ("int8", 0), ("nf4", 4), (None, 4)):
        transformer = tiny.new_transformer(8)
        if style:
            quantize.quantize_blocks(transformer, style)
        config = backbone.ModelConfig(lora_rank=4, adapter_hidden=16, dtype="float32", quantize=style)
        model = adapter.build_model(transformer, config)
        swap_of = swap.swap_blocks(model.transformer, swapped, torch.device("cpu"))
        held = sum(t.nbytes for t in (*model.transformer.parameters(), *model.transformer.buffers()))
        held -= sum(t.nbytes for t in model.trainable_parameters().values()) - sum(
            t.nbytes for t in model.geometry_adapter.parameters()
        )
        train = TrainConfig(activation_checkpointing=True, block_swap=swapped, zero_stage=0)
        counted = estimate.count_parameters(shape, config)
        parts = estimate.memory(shape, counted, (2, 8, 8), config, train, ALONE)
        host = estimate.summary(shape, config, train, (2, 8, 8), ALONE, precomputed=True)["host_bytes"]
        copies = 3 * (swap_of.host_bytes / 4) if swap_of else 0
        # Scales of int8, and biases and norms, which stay in float32, are left out of the estimate: much at this size.
        assert parts["frozen base"] == pytest.approx(held + copies, rel=0.05)
        assert host == pytest.approx(swap_of.host_bytes if swap_of else 0.0, rel=0.08)


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
    assert estimate._activations(shape, 1, 2.0, True)["block activations"] == pytest.approx(per_token, rel=0.05)


@pytest.fixture
def counted_once(parameters: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes a second or more each time."""
    monkeypatch.setattr(estimate, "count_parameters", lambda *_: parameters)


@pytest.mark.usefixtures("counted_once")
def test_encoders_are_counted_while_clips_are_encoded() -> None:
    train = TrainConfig(activation_checkpointing=True, micro_batch_size=1, num_processes=1, prompt=None)
    pixels, latents = (
        estimate.summary(SHAPE_14B, MODEL, train, LATENTS, ALONE, precomputed=known)["memory_bytes"]
        for known in (False, True)
    )
    assert pixels["total"] - latents["total"] == 4 * 126_892_531 + 2 * (5_680_910_336 + 630_766_080)
    fixed = replace(train, prompt="")  # embedded once, and the text encoder let go
    fewer = estimate.summary(SHAPE_14B, MODEL, fixed, LATENTS, ALONE, precomputed=False)["memory_bytes"]
    assert pixels["total"] - fewer["total"] == 2 * 5_680_910_336
    # Noisy latents, condition, first frame and target, the prompt, and CLIP's features; float32.
    cells = 13 * 64 * 64
    assert latents["latents and text"] == 4 * (cells * (36 + 32 + 16) + 512 * 4096 + 257 * 1280)
    both = estimate.summary(SHAPE_14B, replace(MODEL, source_video=True), train, LATENTS, ALONE, precomputed=True)
    assert both["memory_bytes"]["latents and text"] - latents["latents and text"] == 4 * cells * 16


def test_encoders_have_the_sizes_of_their_published_configurations() -> None:
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    text = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    image = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    second = {"base_dim": 160, "z_dim": 48, "decoder_base_dim": 256, "is_residual": True, "patch_size": 2}
    second |= {"in_channels": 12, "out_channels": 12, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}
    with torch.device("meta"):
        models = {
            "vae": AutoencoderKLWan(),
            "text_encoder": UMT5EncoderModel(text),
            "image_encoder": CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=14, **image)),
        }
        vae_5b = AutoencoderKLWan(**second)
    counted = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert dict(families.FAMILIES["wan2.1-i2v-14b"].encoders) == counted
    assert families.FAMILIES["wan2.2-ti2v-5b"].encoders["vae"] == sum(p.numel() for p in vae_5b.parameters())


@pytest.mark.usefixtures("counted_once")
def test_summary_of_the_papers_run() -> None:
    """8 GPUs, 4 clips each: memory, time and price follow from the parts."""
    run = {"micro_batch_size": 4, "num_processes": 8, "num_steps": 1000, "activation_checkpointing": True}

    def summary(model: backbone.ModelConfig = MODEL, **change: Any) -> dict[str, Any]:
        train = TrainConfig(**(run | change))
        return estimate.summary(SHAPE_14B, model, train, LATENTS, plan_batch(train, 8), precomputed=True)

    said = summary(gpu="H100", usd_per_gpu_hour=2.0)
    assert said["parameters"]["lora"] == 76_677_120
    assert said["memory_bytes"]["total"] == pytest.approx(sum(list(said["memory_bytes"].values())[:-1]))
    assert said["fits"]
    assert said["seconds_per_step"] == pytest.approx(4 * said["flops_per_sample"]["executed"] / (989e12 * 0.40))
    assert said["usd"] == pytest.approx(said["seconds_per_step"] * 1000 / 3600 * 8 * 2.0)
    small = summary(gpu="RTX 4090", micro_batch_size=1)
    assert not small["fits"]
    assert small["usd"] is None
    four_bit = backbone.ModelConfig(base=MODEL.base, quantize="nf4")
    fitting = summary(four_bit, gpu="RTX 4090", micro_batch_size=1, cpu_offload=True)
    assert fitting["fits"]
    assert fitting["host_bytes"] == 12.0 * (76_677_120 + 23_109_632)
    with pytest.raises(ConfigError, match="H100"):
        summary(gpu="abacus")
