"""What a training step costs, before anything is loaded: parameters, FLOPs by part, memory by part, time on a GPU.

One multiply-add is 2 FLOPs. Only matrix products and convolutions count; they are more than 99 % of the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone
from ex4d.models.encoders import TEXT_LENGTH

CLIP_TOKENS = 257
# Dense bfloat16 FLOP/s and bytes of memory, from NVIDIA's data sheets.
GPUS = {
    "H200": (989e12, 141e9),
    "H100": (989e12, 80e9),
    "A100": (312e12, 80e9),
    "L40S": (362e12, 48e9),
    "RTX 4090": (165e12, 24e9),
}
# Bytes of a frozen weight; NF4 has half a byte, and a bfloat16 scale for each 64.
BASE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 2 / 64}
# HFU that `seconds_per_step` assumes where none was measured.
ASSUMED_HFU = 0.40
# Activations that one block keeps for its backward pass, in numbers per token and unit of width: float32 copies around
# norms and gates, tensors in the base's dtype, and tensors as wide as the feed-forward layer. Counted by
# saved-tensor hooks (tests/train/test_flops.py counts again).
_KEPT_FLOAT32, _KEPT_DTYPE, _KEPT_FFN = 6, 11, 2


@dataclass(frozen=True)
class Part:
    """FLOPs of one sample in one part of the model.

    Args:
        forward, backward: FLOPs; a frozen weight has no gradient of its own, so its backward is one forward.
        in_blocks: computed once more under activation checkpointing.
    """

    forward: float
    backward: float
    in_blocks: bool = True


@dataclass(frozen=True)
class Cost:
    """FLOPs of one sample by part, and the tokens that attend to each other."""

    tokens: int
    parts: Mapping[str, Part]

    @property
    def forward(self) -> float:
        """FLOPs of one forward pass."""
        return sum(part.forward for part in self.parts.values())

    @property
    def useful(self) -> float:
        """FLOPs that a training step needs: the numerator of MFU."""
        return self.forward + sum(part.backward for part in self.parts.values())

    def executed(self, checkpointing: bool) -> float:
        """FLOPs that a training step does, recomputed blocks included: the numerator of HFU."""
        again = sum(part.forward for part in self.parts.values() if part.in_blocks)
        return self.useful + (again if checkpointing else 0.0)


def latent_size(clip: tuple[int, int, int], stride: tuple[int, int, int] = (4, 8, 8)) -> tuple[int, int, int]:
    """Return (f, h, w) of the latents of a clip (T, H, W)."""
    return (clip[0] - 1) // stride[0] + 1, clip[1] // stride[1], clip[2] // stride[2]


def cost(
    shape: Mapping[str, Any],
    latents: tuple[int, int, int],
    lora_rank: int = 16,
    adapter_hidden: int = 1024,
    source_video: bool = False,
    num_image_tokens: int = CLIP_TOKENS,
) -> Cost:
    """Return the FLOPs of one sample in training.

    Args:
        shape: the transformer's configuration (`backbone.transformer_config`).
        latents: (f, h, w).
        source_video: tokens of a source video beside those of the target.
        num_image_tokens: of CLIP, for a base that takes them.
    """
    width, ffn, blocks = (
        shape["num_attention_heads"] * shape["attention_head_dim"],
        shape["ffn_dim"],
        shape["num_layers"],
    )
    patch, cells = math.prod(shape["patch_size"]), math.prod(latents)
    image = num_image_tokens if shape["image_dim"] else 0
    target = cells // patch
    n = target * (2 if source_video else 1)
    # q, k, v, o of self-attention, q and o of cross-attention, two feed-forward layers
    linear = 2.0 * n * (6 * width**2 + 2 * width * ffn) * blocks
    context = 4.0 * (TEXT_LENGTH * width**2 + image * width * (shape["added_kv_proj_dim"] or 0)) * blocks
    lora_tokens = 2.0 * lora_rank * n * (12 * width + 2 * (width + ffn)) * blocks
    lora_text = 2.0 * lora_rank * TEXT_LENGTH * 2 * width * blocks  # A of text k and v, and as much for B
    attention = 4.0 * n * width * (n + TEXT_LENGTH) * blocks
    attention_image = 4.0 * n * width * image * blocks
    image_dim = shape["image_dim"] or 0
    embed = 2.0 * n * patch * shape["in_channels"] * width
    embed += 2.0 * TEXT_LENGTH * (shape["text_dim"] * width + width**2) + 2.0 * image * image_dim * (image_dim + width)
    embed += 2.0 * (shape["freq_dim"] * width + 7 * width**2)
    first = 2.0 * cells * 2 * shape["out_channels"] * adapter_hidden
    rest = 2.0 * cells * 2 * adapter_hidden**2 + 2.0 * target * patch * adapter_hidden * width
    out = 2.0 * n * width * shape["out_channels"] * patch
    return Cost(
        tokens=n,
        parts={
            "linear": Part(linear, linear),
            # Text and image features need no gradient: B of their LoRA gets both, A its weight's alone.
            "context": Part(context, 0.0),
            "lora": Part(lora_tokens + 2 * lora_text, 2 * lora_tokens + 3 * lora_text),
            "attention": Part(attention, 2 * attention),
            # Keys and values of the image are frozen: the query's gradient alone.
            "attention_image": Part(attention_image, attention_image),
            "embedding": Part(embed, 0.0, in_blocks=False),
            "geometry_adapter": Part(first + rest, first + 2 * rest, in_blocks=False),
            "output": Part(out, out, in_blocks=False),
        },
    )


def count_parameters(shape: Mapping[str, Any], config: backbone.ModelConfig) -> dict[str, int]:
    """Return {"base", "lora", "geometry_adapter"} numbers of parameters, counted on the meta device."""
    model = adapter.build_model(backbone.meta_transformer(shape), config)
    geometry = sum(value.numel() for value in model.geometry_adapter.parameters())
    trainable = sum(value.numel() for value in model.trainable_parameters().values())
    everything = sum(value.numel() for value in model.parameters())
    return {"base": everything - trainable, "lora": trainable - geometry, "geometry_adapter": geometry}


def memory(
    shape: Mapping[str, Any],
    parameters: Mapping[str, int],
    tokens: int,
    *,
    base_bytes: float = 2.0,
    micro_batch_size: int = 1,
    zero_stage: int = 0,
    world_size: int = 1,
    checkpointing: bool = True,
    cpu_offload: bool = False,
    ema: bool = False,
) -> dict[str, float]:
    """Return an estimate of the bytes that one GPU needs, by part; latents and text precomputed, flash attention.

    Args:
        parameters: of `count_parameters`.
        tokens: of one sample (`Cost.tokens`).
        base_bytes: of BASE_BYTES, for the base's dtype or its quantisation; activations have at least two.
        zero_stage: 1 shards the optimizer, 2 the gradients, 3 the weights over `world_size`.
        cpu_offload: the optimizer's state is in the host's memory.
    """
    trainable = parameters["lora"] + parameters["geometry_adapter"]
    over = {stage: world_size if zero_stage >= stage else 1 for stage in (1, 2, 3)}
    width, batch = shape["num_attention_heads"] * shape["attention_head_dim"], micro_batch_size * tokens
    dtype = max(base_bytes, 2.0)
    per_token = width * (4 * _KEPT_FLOAT32 + dtype * _KEPT_DTYPE) + shape["ffn_dim"] * dtype * _KEPT_FFN
    layers = shape["num_layers"]
    return {
        "frozen base": parameters["base"] * base_bytes / over[3],
        "trainable weights": 4.0 * trainable / over[3],
        "gradients": 4.0 * trainable / over[2],
        # two moments, and from stage 1 on ZeRO's flat copy of the weights
        "optimizer": 0.0 if cpu_offload else (8.0 + (4.0 if zero_stage else 0.0)) * trainable / over[1],
        "ema": 4.0 * trainable if ema else 0.0,
        "block inputs": dtype * width * batch * layers if checkpointing else 0.0,
        "block activations": per_token * batch * (1 if checkpointing else layers),
    }


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU by its name, e.g. "NVIDIA H200"; None for one that is not in GPUS."""
    return next((GPUS[name][0] for name in GPUS if name.lower() in device_name.lower()), None)


def utilisation(sample: Cost, samples_per_s: float, peak: float, checkpointing: bool) -> tuple[float, float]:
    """Return (MFU, HFU) of one device, shares of `peak`: useful and executed FLOPs a second.

    Args:
        samples_per_s: that one device trains on.
        peak: FLOP/s of the device in the dtype of the base.
    """
    return sample.useful * samples_per_s / peak, sample.executed(checkpointing) * samples_per_s / peak


def seconds_per_step(sample: Cost, samples: int, gpu: str, checkpointing: bool, hfu: float = ASSUMED_HFU) -> float:
    """Return seconds that one GPU needs for `samples` of a step at the given HFU.

    Raises:
        ConfigError: the GPU is not in GPUS.
    """
    peak = peak_flops(gpu)
    if peak is None:
        raise ConfigError("gpu", gpu, f"allowed: {', '.join(GPUS)}")
    return sample.executed(checkpointing) * samples / (peak * hfu)


def summary(
    shape: Mapping[str, Any],
    config: backbone.ModelConfig,
    latents: tuple[int, int, int],
    *,
    micro_batch_size: int,
    global_batch_size: int,
    world_size: int,
    num_steps: int,
    zero_stage: int,
    checkpointing: bool,
    cpu_offload: bool = False,
    ema: bool = False,
    gpu: str = "H200",
    usd_per_gpu_hour: float | None = None,
) -> dict[str, Any]:
    """Return what a run would need, as plain values and before anything is loaded.

    `parameters`, `tokens`, `flops_per_sample` (forward, useful, executed), `memory_bytes` (by part, and `total`),
    `fits` (whether the estimate is within the GPU's memory), `seconds_per_step`, `hours`, `gpu_hours`, and `usd` where
    a price is given. Times assume ASSUMED_HFU and data that is ready.
    """
    parameters = count_parameters(shape, config)
    sample = cost(shape, latents, config.lora_rank, config.adapter_hidden, config.source_video)
    # "auto" is bfloat16 on the GPU that this asks about.
    stored = config.quantize or ("bfloat16" if config.dtype == "auto" else config.dtype)
    parts = memory(
        shape,
        parameters,
        sample.tokens,
        base_bytes=BASE_BYTES[stored],
        micro_batch_size=micro_batch_size,
        zero_stage=zero_stage,
        world_size=world_size,
        checkpointing=checkpointing,
        cpu_offload=cpu_offload,
        ema=ema,
    )
    total = sum(parts.values())
    step_s = seconds_per_step(sample, math.ceil(global_batch_size / world_size), gpu, checkpointing)
    hours = step_s * num_steps / 3600
    return {
        "parameters": parameters,
        "tokens": sample.tokens,
        "flops_per_sample": {
            "forward": sample.forward,
            "useful": sample.useful,
            "executed": sample.executed(checkpointing),
        },
        "memory_bytes": parts | {"total": total},
        "fits": total <= next(size for name, (_, size) in GPUS.items() if name.lower() in gpu.lower()),
        "gpu": gpu,
        "seconds_per_step": step_s,
        "hours": hours,
        "gpu_hours": hours * world_size,
        "usd": None if usd_per_gpu_hour is None else hours * world_size * usd_per_gpu_hour,
    }
