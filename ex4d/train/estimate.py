"""Estimate what a run needs, without loading anything: parameters, memory of one GPU by part, time and price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ex4d.models import adapter, backbone, families, swap
from ex4d.models.encoders import TEXT_LENGTH
from ex4d.train import flops
from ex4d.train.config import BatchPlan, TrainConfig

DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
# Bytes of a quantised weight; NF4 takes half a byte, and a bfloat16 scale per 64 weights.
QUANTIZED_BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 2 / 64}
# Tensors of [tokens, width] that a block keeps for its backward pass: float32 copies around norms and gates, tensors in
# the base's dtype, tensors in that dtype as wide as the feed-forward layer, and, for each token of text or image,
# tensors in the base's dtype. Counted on a traced step (tests/train/trace_memory.py).
_KEPT_FLOAT32, _KEPT_DTYPE, _KEPT_FFN, _KEPT_CONTEXT = 3, 14, 2, 4
# Such tensors that a block's backward pass adds: if the block recomputes, and if it kept its activations.
_RECOMPUTING_FLOAT32, _RECOMPUTING_DTYPE = 3, 3
_BACKWARD_FLOAT32, _BACKWARD_DTYPE, _BACKWARD_FFN = 2, 3, 2
_KEPT_ADAPTER = 5  # float32 tensors of `adapter_hidden` channels that the geometry adapter keeps for its backward
_SWAPPED_HERE = 3  # copies of swapped blocks on the device: one in use, one in flight, one not yet freed
# Copies of the largest weight, in the compute dtype, while a quantised weight is dequantised.
_DEQUANTIZED = {"int8": 2, "fp8": 2, "nf4": 4}
# Most parameters that ZeRO-3 gathers: DeepSpeed's stage3_max_live_parameters plus its prefetch bucket.
_GATHERED = 1e9 + 5e7


def count_parameters(shape: Mapping[str, Any], config: backbone.ModelConfig) -> dict[str, int]:
    """Return the numbers of parameters, counted on the meta device.

    Keys: "base", of which "blocks" are in the transformer's blocks and "float32" stay in that type; "lora";
    "geometry_adapter".
    """
    model = adapter.build_model(backbone.meta_transformer(shape), config)
    float32_modules = tuple(model.transformer._keep_in_fp32_modules or ())
    float32 = sum(
        value.numel()
        for name, value in model.transformer.named_parameters()
        if not value.requires_grad and any(part in name for part in float32_modules)
    )
    geometry = sum(value.numel() for value in model.geometry_adapter.parameters())
    trainable = sum(value.numel() for value in model.trainable_parameters().values())
    everything = sum(value.numel() for value in model.parameters())
    blocks = sum(value.numel() for value in model.transformer.blocks.parameters() if not value.requires_grad)
    return {
        "base": everything - trainable,
        "blocks": blocks,
        "float32": float32,
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
    """Estimate the bytes that one GPU needs, by part, with flash attention.

    Args:
        parameters: from `count_parameters`.
        latents: (f, h, w) of one sample.
        encoders: {name: parameters} of the encoders that stay loaded if training encodes clips; None if latents and
            text are precomputed.
    """
    tokens = math.prod(latents) // math.prod(shape["patch_size"]) * (2 if model.source_video else 1)
    trainable = parameters["lora"] + parameters["geometry_adapter"]
    over = {stage: plan.world_size if train.zero_stage >= stage else 1 for stage in (1, 2, 3)}
    dtype = DTYPE_BYTES["bfloat16" if model.dtype == "auto" else model.dtype]  # "auto" is bfloat16 on a GPU
    blocks = parameters["blocks"] * (QUANTIZED_BYTES[model.quantize] if model.quantize else dtype)
    swapped = max(0, train.block_swap - _SWAPPED_HERE) / shape["num_layers"] if train.block_swap else 0.0
    moments = 0.0 if train.cpu_offload else 8.0
    wide = 4.0 - dtype if dtype < 4 else 0.0
    base = blocks * (1 - swapped) + (parameters["base"] - parameters["blocks"]) * dtype + parameters["float32"] * wide
    parts = {
        "frozen base": base / over[3],
        "trainable weights": 4.0 * trainable / over[3],
        "gradients": 4.0 * trainable / over[2],
        # two moments, and from stage 1 on ZeRO's flat copy of the weights
        "optimizer": (moments + (4.0 if train.zero_stage and moments else 0.0)) * trainable / over[1],
        "average": 4.0 * trainable if train.ema_decay is not None else 0.0,  # on rank 0
        "latents and text": plan.micro_size * _input_bytes(shape, latents, model.source_video),
        "geometry adapter": 4.0 * _KEPT_ADAPTER * model.adapter_hidden * math.prod(latents) * plan.micro_size,
        **_activations(shape, tokens * plan.micro_size, plan.micro_size, dtype, train, model.residual_fp32),
    }
    if over[3] > 1:
        parts["gathered weights"] = dtype * min(_GATHERED, parameters["base"] * (1 - 1 / over[3]))
        whole = base + 4.0 * trainable  # each GPU holds the whole model before DeepSpeed shards it
        parts["base before it is sharded"] = max(0.0, whole - sum(parts.values()))
    if model.quantize:
        parts["dequantized weight"] = _DEQUANTIZED[model.quantize] * dtype * flops.width_of(shape) * shape["ffn_dim"]
    if encoders is None:
        return parts
    vae = DTYPE_BYTES[model.vae_dtype]
    parts |= {name: count * (vae if name == "vae" else dtype) for name, count in encoders.items()}
    # The VAE runs before the forward pass, when there are no activations yet.
    later = sum(parts[name] for name in ("geometry adapter", "block inputs", "block activations", "backward"))
    return parts | {"vae at work": max(0.0, vae / 4 * flops.vae_work_bytes(shape, latents) - later)}


def _activations(
    shape: Mapping[str, Any], tokens: int, samples: int, dtype: float, train: TrainConfig, residual_fp32: bool
) -> dict[str, float]:
    """Return the bytes that blocks keep for the backward pass, at its peak.

    If some blocks keep their activations, the peak is in the backward pass of the last block; if all recompute, it is
    at the end of the first recomputed block.
    """
    width, ffn, layers = flops.width_of(shape), shape["ffn_dim"], shape["num_layers"]
    recomputed = train.recomputed_blocks(layers)
    kept = layers - recomputed
    context = (TEXT_LENGTH + (flops.CLIP_TOKENS if shape["image_dim"] else 0)) * samples * width * dtype * _KEPT_CONTEXT
    one = tokens * (width * (4 * _KEPT_FLOAT32 + dtype * _KEPT_DTYPE) + ffn * dtype * _KEPT_FFN) + context
    backward = width * (4 * _RECOMPUTING_FLOAT32 + dtype * _RECOMPUTING_DTYPE)
    if kept:
        backward = width * (4 * _BACKWARD_FLOAT32 + dtype * _BACKWARD_DTYPE) + ffn * dtype * _BACKWARD_FFN
    parts = {
        "block inputs": (4.0 if residual_fp32 else dtype) * width * tokens * recomputed,
        "block activations": one * max(1, kept),
        "backward": backward * tokens,
    }
    if train.checkpoint_keep_attention:  # its output, and a float32 number for each token and head
        parts["kept attention"] = (dtype * width + 4.0 * shape["num_attention_heads"]) * tokens * recomputed
    return parts


def _input_bytes(shape: Mapping[str, Any], latents: tuple[int, int, int], source_video: bool) -> float:
    """Return the bytes of a sample's float32 inputs: noisy latents, condition, target, source, prompt, image."""
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
    """Return what a run would need, as plain values, without loading anything.

    Keys: `parameters`, `tokens`, `flops_per_sample` (forward, useful, executed), `memory_bytes` (by part, and `total`),
    `host_bytes` (during the run: swapped blocks, offloaded optimizer) and `host_bytes_loading` (while the base is
    read), both per process; `fits` (whether the estimate is within the GPU's memory), `gpu`, `seconds_per_step`,
    including `vae_seconds_per_step` for encoding clips, `hours`, `gpu_hours`, and `usd` (None without a price). Times
    assume flops.ASSUMED_HFU and no wait for data. checkpoint_blocks=auto counts as all blocks: it fills what is left.

    Args:
        precomputed: whether the dataset holds latents and text, so that no encoder is loaded.
    """
    parameters = count_parameters(shape, model)
    sample = flops.cost(shape, latents, model)
    family = families.FAMILIES.get(families.family_of(shape) or "")
    encoders = dict(family.encoders) if family and not precomputed else {}
    if train.prompt is not None:  # the prompt is embedded once, before training
        encoders.pop("text_encoder", None)
    parts = memory(shape, parameters, latents, model, train, plan, None if precomputed else encoders)
    total = sum(parts.values())
    again = (train.recomputed_blocks(shape["num_layers"]) / shape["num_layers"], train.checkpoint_keep_attention)
    samples = math.ceil(plan.global_size / plan.world_size)
    vae_flops = 0.0 if precomputed else samples * flops.vae_flops(shape, latents, model.source_video)
    vae_s = flops.vae_seconds(vae_flops, train.gpu)
    step_s = flops.seconds_per_step(sample, samples, train.gpu, *again) + vae_s
    hours = step_s * train.num_steps / 3600
    return {
        "parameters": parameters,
        "tokens": sample.tokens,
        "flops_per_sample": {"forward": sample.forward, "useful": sample.useful, "executed": sample.executed(*again)},
        "memory_bytes": parts | {"total": total},
        "host_bytes": _host_bytes(shape, parameters, model, train),
        "host_bytes_loading": _loading_bytes(shape, parameters, model, train),
        "fits": total <= flops.memory_of(train.gpu),
        "gpu": train.gpu,
        "seconds_per_step": step_s,
        "vae_seconds_per_step": vae_s,
        "hours": hours,
        "gpu_hours": hours * plan.world_size,
        "usd": None if train.usd_per_gpu_hour is None else hours * plan.world_size * train.usd_per_gpu_hour,
    }


def _host_bytes(
    shape: Mapping[str, Any], parameters: Mapping[str, int], model: backbone.ModelConfig, train: TrainConfig
) -> float:
    """Return the bytes of host memory that one process needs for swapped blocks and an offloaded optimizer.

    Not counted: pinned memory is allocated in powers of two, 34.4 GB for all 40 blocks of 14B in bfloat16, which hold
    32.3 GB (swap.py).
    """
    weight = QUANTIZED_BYTES[model.quantize] if model.quantize else DTYPE_BYTES.get(model.dtype, 2.0)
    trainable = parameters["lora"] + parameters["geometry_adapter"]
    swapped = parameters["blocks"] * weight * train.block_swap / shape["num_layers"]
    return swapped + (12.0 * trainable if train.cpu_offload else 0.0)


def _loading_bytes(
    shape: Mapping[str, Any], parameters: Mapping[str, int], model: backbone.ModelConfig, train: TrainConfig
) -> float:
    """Return the peak bytes of host memory of one process while it reads the transformer.

    One tensor at a time is read, at up to four bytes per number, and cast. A base whose blocks are to be swapped is
    whole in host memory, beside the first arena for them, unless it is quantised on the device first.
    """
    dtype = DTYPE_BYTES["bfloat16" if model.dtype == "auto" else model.dtype]
    tensor = (4.0 + dtype) * flops.width_of(shape) * shape["ffn_dim"]
    if not train.block_swap or model.quantize:
        return tensor
    return parameters["base"] * dtype + max(tensor, min(swap.ARENA, parameters["blocks"] * dtype))
