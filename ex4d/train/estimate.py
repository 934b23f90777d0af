"""What a run needs, before anything is loaded: parameters, memory of one GPU by part, time and price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ex4d.models import adapter, backbone, families
from ex4d.models.encoders import TEXT_LENGTH
from ex4d.train import flops
from ex4d.train.config import BatchPlan, TrainConfig

DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# Bytes of a quantised weight; NF4 has half a byte, and a bfloat16 scale for each 64.
QUANTIZED_BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 2 / 64}
# Activations that one block keeps for its backward pass, in numbers per token and unit of width: float32 copies around
# norms and gates, tensors in the base's dtype, and tensors as wide as the feed-forward layer. Counted by
# saved-tensor hooks (tests/train/test_estimate.py counts again).
_KEPT_FLOAT32, _KEPT_DTYPE, _KEPT_FFN = 6, 11, 2
_KEPT_ADAPTER = 5  # float32 tensors of `adapter_hidden` channels that the geometry adapter keeps for its backward
_SWAPPED_HERE = 3  # copies of swapped blocks on the device: one at work, one on its way, one not yet given back


def count_parameters(shape: Mapping[str, Any], config: backbone.ModelConfig) -> dict[str, int]:
    """Return numbers of parameters, counted on the meta device.

    "base", of which "blocks" are in the transformer's blocks; "lora"; "geometry_adapter".
    """
    model = adapter.build_model(backbone.meta_transformer(shape), config)
    geometry = sum(value.numel() for value in model.geometry_adapter.parameters())
    trainable = sum(value.numel() for value in model.trainable_parameters().values())
    everything = sum(value.numel() for value in model.parameters())
    blocks = sum(value.numel() for value in model.transformer.blocks.parameters() if not value.requires_grad)
    return {
        "base": everything - trainable,
        "blocks": blocks,
        "lora": trainable - geometry,
        "geometry_adapter": geometry,
    }


def memory(
    shape: Mapping[str, Any],
    parameters: Mapping[str, int],
    latents: tuple[int, int, int],
    model: backbone.ModelConfig,
    train: TrainConfig,
    plan: BatchPlan,
    encoders: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Return an estimate of the bytes that one GPU needs, by part; with flash attention.

    Args:
        parameters: of `count_parameters`.
        latents: (f, h, w) of one sample.
        encoders: {name: parameters} of the encoders that stay loaded where clips are encoded while training; None where
            latents and text are precomputed. Their working memory is not counted.
    """
    tokens = math.prod(latents) // math.prod(shape["patch_size"]) * (2 if model.source_video else 1)
    trainable = parameters["lora"] + parameters["geometry_adapter"]
    over = {stage: plan.world_size if train.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    # "auto" is bfloat16 on the GPU that this asks about.
    dtype = DTYPE_BYTES["bfloat16" if model.dtype == "auto" else model.dtype]
    blocks = parameters["blocks"] * (QUANTIZED_BYTES[model.quantize] if model.quantize else dtype)
    share = 1 / shape["num_layers"]
    swapped = max(0, train.block_swap - _SWAPPED_HERE) * share if train.block_swap else 0.0
    moments = 0.0 if train.cpu_offload else 8.0
    parts = {
        "frozen base": (blocks * (1 - swapped) + (parameters["base"] - parameters["blocks"]) * dtype) / over[3],
        "trainable weights": 4.0 * trainable / over[3],
        "gradients": 4.0 * trainable / over[2],
        # two moments, and from stage 1 on ZeRO's flat copy of the weights
        "optimizer": (moments + (4.0 if train.zero_stage and moments else 0.0)) * trainable / over[1],
        "latents and text": plan.micro_size * _input_bytes(shape, latents, model.source_video),
        "geometry adapter": 4.0 * _KEPT_ADAPTER * model.adapter_hidden * math.prod(latents) * plan.micro_size,
        **_activations(shape, tokens * plan.micro_size, dtype, train.activation_checkpointing),
    }
    vae = DTYPE_BYTES[model.vae_dtype]
    return parts | {name: count * (vae if name == "vae" else dtype) for name, count in (encoders or {}).items()}


def _activations(shape: Mapping[str, Any], tokens: int, dtype: float, checkpointing: bool) -> dict[str, float]:
    width, layers = flops.width_of(shape), shape["num_layers"]
    per_token = width * (4 * _KEPT_FLOAT32 + dtype * _KEPT_DTYPE) + shape["ffn_dim"] * dtype * _KEPT_FFN
    return {
        "block inputs": dtype * width * tokens * layers if checkpointing else 0.0,
        "block activations": per_token * tokens * (1 if checkpointing else layers),
    }


def _input_bytes(shape: Mapping[str, Any], latents: tuple[int, int, int], source_video: bool) -> float:
    """Return the bytes of one sample's float32 inputs: noisy latents and condition, target, source, prompt, image
    features.
    """
    channels = shape["in_channels"] + (4 if source_video else 3) * shape["out_channels"]
    image = flops.CLIP_TOKENS * (shape["image_dim"] or 0)
    return 4.0 * (channels * math.prod(latents) + TEXT_LENGTH * shape["text_dim"] + image)


def summary(
    shape: Mapping[str, Any],
    model: backbone.ModelConfig,
    train: TrainConfig,
    latents: tuple[int, int, int],
    plan: BatchPlan,
    precomputed: bool,
) -> dict[str, Any]:
    """Return what a run would need, as plain values and before anything is loaded.

    `parameters`, `tokens`, `flops_per_sample` (forward, useful, executed), `memory_bytes` (by part, and `total`),
    `host_bytes` (of swapped blocks, of the averaged weights, of an offloaded optimizer), `fits` (whether the
    estimate is within the GPU's memory), `seconds_per_step`, `hours`, `gpu_hours`, and `usd` where a price is given.
    Times assume flops.ASSUMED_HFU and data that is ready.

    Args:
        precomputed: the dataset holds latents and text, so that no encoder is loaded.
    """
    parameters = count_parameters(shape, model)
    sample = flops.cost(shape, latents, model.lora_rank, model.adapter_hidden, model.source_video)
    family = families.FAMILIES.get(families.family_of(shape) or "")
    encoders = dict(family.encoders) if family and not precomputed else {}
    if train.prompt is not None:  # embedded once, before training
        encoders.pop("text_encoder", None)
    parts = memory(shape, parameters, latents, model, train, plan, encoders)
    total, recomputes = sum(parts.values()), train.activation_checkpointing
    samples = math.ceil(plan.global_size / plan.world_size)
    step_s = flops.seconds_per_step(sample, samples, train.gpu, recomputes)
    hours = step_s * train.num_steps / 3600
    return {
        "parameters": parameters,
        "tokens": sample.tokens,
        "flops_per_sample": {
            "forward": sample.forward,
            "useful": sample.useful,
            "executed": sample.executed(recomputes),
        },
        "memory_bytes": parts | {"total": total},
        "host_bytes": _host_bytes(shape, parameters, model, train),
        "fits": total <= flops.memory_of(train.gpu),
        "gpu": train.gpu,
        "seconds_per_step": step_s,
        "hours": hours,
        "gpu_hours": hours * plan.world_size,
        "usd": None if train.usd_per_gpu_hour is None else hours * plan.world_size * train.usd_per_gpu_hour,
    }


def _host_bytes(
    shape: Mapping[str, Any], parameters: Mapping[str, int], model: backbone.ModelConfig, train: TrainConfig
) -> float:
    """Return the bytes of host memory that one process takes: swapped blocks, the average, an offloaded optimizer.

    Of the memory that is pinned PyTorch takes up to twice as much, since it rounds each block up to a power of two.
    """
    weight = QUANTIZED_BYTES[model.quantize] if model.quantize else DTYPE_BYTES.get(model.dtype, 2.0)
    trainable = parameters["lora"] + parameters["geometry_adapter"]
    swapped = parameters["blocks"] * weight * train.block_swap / shape["num_layers"]
    average = 4.0 * trainable if train.ema_decay is not None else 0.0
    return swapped + average + (12.0 * trainable if train.cpu_offload else 0.0)
