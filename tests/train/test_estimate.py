"""The estimated needs of a run, against torch's counts and autograd's memory, and figures of the published size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import trace_memory

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone, families, swap
from ex4d.train import estimate, flops
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
    """The slow twin: build a small model alike and add up its bytes on the device and on the host."""
    shape = dict(tiny.new_transformer(8).config)
    for style, swapped in ((None, 0), ("int8", 0), ("nf4", 4), (None, 4)):
        transformer = tiny.new_transformer(8)
        if style:
            tiny.quantize_linears(transformer.blocks, style)
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
        swapped_bytes = sum(block.host.nbytes for block in swap_of._host.values()) if swap_of else 0
        copies = 3 * (swapped_bytes / 4)
        # Scales of int8, and biases and norms, which stay in float32, are left out of the estimate: much at this size.
        assert parts["frozen base"] == pytest.approx(held + copies, rel=0.05)
        assert host == pytest.approx(swapped_bytes, rel=0.08)


def traced_and_estimated(num_layers: int, micro_size: int, recomputed: int) -> tuple[float, dict[str, float]]:
    """Return (peak of a traced step, the estimate's parts) of the published width."""
    shape = dict(SHAPE_14B) | {"num_layers": num_layers}
    traced = trace_memory.traced_step(shape, LATENTS, micro_size, recomputed)
    train = TrainConfig(activation_checkpointing=True, checkpoint_blocks=recomputed, zero_stage=0)
    plan = BatchPlan(micro_size, micro_size, 1, 1)
    counted = estimate.count_parameters(shape, MODEL)
    return traced.peak, estimate.memory(shape, counted, LATENTS, MODEL, train, plan)


def test_estimate_agrees_with_a_traced_step() -> None:
    for micro_size, recomputed in ((1, 2), (2, 1)):
        peak, parts = traced_and_estimated(2, micro_size, recomputed)
        assert sum(parts.values()) == pytest.approx(peak, rel=0.02)


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("micro_size", [1, 4])
@pytest.mark.parametrize("recomputed", [40, 20])
def test_estimate_agrees_with_a_traced_step_of_all_blocks(micro_size: int, recomputed: int) -> None:
    peak, parts = traced_and_estimated(40, micro_size, recomputed)
    total = sum(parts.values())
    print(f"micro {micro_size}, {recomputed} recomputed: traced {peak / 1e9:.2f} GB, estimated {total / 1e9:.2f} GB")
    assert total == pytest.approx(peak, rel=0.02)


def test_what_other_settings_add(parameters: dict[str, int]) -> None:
    plain = bytes_of(parameters)
    tokens, width = 13 * 32 * 32, 5120
    kept = bytes_of(parameters, checkpoint_keep_attention=True)
    assert sum(kept.values()) - sum(plain.values()) == 40 * tokens * (2 * width + 4 * 40)
    assert sum(bytes_of(parameters, ema_decay=0.99).values()) - sum(plain.values()) == 4 * (76_677_120 + 23_109_632)
    sharded = bytes_of(parameters, BatchPlan(8, 1, 1, 8), zero_stage=3)
    assert 2e9 < sharded["gathered weights"] < 2.2e9
    assert "gathered weights" not in bytes_of(parameters, BatchPlan(8, 1, 1, 8), zero_stage=2)
    # Each GPU holds the whole base, and the trainables, until DeepSpeed shards them.
    assert sum(sharded.values()) >= plain["frozen base"] + plain["trainable weights"]


def test_work_of_the_vae_is_that_of_torch_s_counter() -> None:
    from diffusers import AutoencoderKLWan
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKLWan().encode(torch.empty(1, 3, 9, 128, 128))
    # Four videos a sample; the first frame, alone in its latent, weighs more in a short clip.
    assert flops.vae_flops(SHAPE_14B, (3, 16, 16)) == pytest.approx(4 * counter.get_total_flops(), rel=0.04)
    assert flops.vae_flops(SHAPE_14B, LATENTS) == pytest.approx(259e12, rel=0.002)


@pytest.mark.usefixtures("counted_once")
def test_host_memory_of_loading_is_one_tensor_unless_blocks_wait_there(parameters: dict[str, int]) -> None:
    def loading(style: Any = None, swapped: int = 0) -> float:
        model = replace(MODEL, quantize=style)
        train = TrainConfig(activation_checkpointing=True, block_swap=swapped, num_processes=1)
        return estimate.summary(SHAPE_14B, model, train, LATENTS, ALONE, precomputed=True)["host_bytes_loading"]

    largest = 6 * 5120 * 13824  # read in float32, cast to bfloat16
    assert loading() == loading("nf4") == loading("nf4", 20) == largest
    assert loading(swapped=40) == 2 * parameters["base"] + swap.ARENA


def test_tiles_decode_a_large_video_in_less_memory() -> None:
    from diffusers import AutoencoderKLWan

    peaks = []
    for tiled in (False, True):
        held = trace_memory.Held()
        with trace_memory.FakeTensorMode(), torch.no_grad():
            vae = AutoencoderKLWan()
            if tiled:
                vae.enable_tiling()
            with held:
                assert vae.decode(torch.empty(1, 16, 3, 64, 64)).sample.shape == (1, 3, 9, 512, 512)
        peaks.append(held.peak / 1e9)
    print(f"decoding 512 x 512: {peaks[0]:.2f} GB, in tiles {peaks[1]:.2f} GB")
    assert peaks[1] < 0.5 * peaks[0]


@pytest.fixture
def counted_once(parameters: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached, since counting takes a second or more each time."""
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
