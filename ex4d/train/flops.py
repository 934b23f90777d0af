"""Count the FLOPs of a training step by part, and derive time and utilisation for a named GPU.

One multiply-add is 2 FLOPs. Only matrix products and convolutions count; they are more than 99 % of the work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig
from ex4d.models.encoders import TEXT_LENGTH

CLIP_TOKENS = 257
# Dense bfloat16 FLOP/s and bytes of memory, from NVIDIA's data sheets.
GPUS = {
    "H200 NVL": (835e12, 141e9),
    "H200": (989e12, 141e9),
    "H100 PCIe": (756e12, 80e9),
    "H100 NVL": (835e12, 94e9),
    "H100": (989e12, 80e9),
    "A100": (312e12, 80e9),
    "L40S": (362e12, 48e9),
    "RTX 4090": (165e12, 24e9),
}
# HFU that `seconds_per_step` assumes without a measurement.
ASSUMED_HFU = 0.40
# FLOPs of encoding per pixel of a clip, and bytes of its working memory per pixel of a frame, in float32; counted with
# torch's counter and on traced tensors for 49 × 512 × 512, for Wan's VAE and for that of the 5B model (48 channels).
VAE_FLOPS_PER_PIXEL = {16: 5.037e6, 48: 3.514e6}
VAE_BYTES_PER_PIXEL = {16: 14_696, 48: 8_365}
# Assumed share of the bfloat16 peak that encoding in float32 (TF32 products) reaches: 2 to 4 s per sample on an H200.
ASSUMED_VAE_SHARE = 0.09


@dataclass(frozen=True)
class Part:
    """FLOPs of one sample in one part of the model.

    Args:
        forward, backward: FLOPs; a frozen weight gets no gradient, so its backward costs as much as its forward.
        in_blocks: whether activation checkpointing computes it once more.
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

    def executed(self, recomputed: float, keep_attention: bool = False) -> float:
        """Return the FLOPs that a training step executes, recomputed blocks included: the numerator of HFU.

        Args:
            recomputed: share of the blocks that recompute, in [0, 1].
            keep_attention: whether these keep the outputs of self-attention.
        """
        parts = {name: part for name, part in self.parts.items() if part.in_blocks}
        if keep_attention:
            del parts["attention"]
        return self.useful + recomputed * sum(part.forward for part in parts.values())


def latent_size(clip: tuple[int, int, int], stride: tuple[int, int, int] = (4, 8, 8)) -> tuple[int, int, int]:
    """Return (f, h, w) of the latents of a clip (T, H, W)."""
    return (clip[0] - 1) // stride[0] + 1, clip[1] // stride[1], clip[2] // stride[2]


def cost(shape: Mapping[str, Any], latents: tuple[int, int, int], model: ModelConfig) -> Cost:
    """Return the FLOPs of one sample in training.

    Args:
        shape: the transformer's configuration (`backbone.transformer_config`).
        latents: (f, h, w).
    """
    patch, cells, hidden = math.prod(shape["patch_size"]), math.prod(latents), model.adapter_hidden
    image = CLIP_TOKENS if shape["image_dim"] else 0
    tokens = cells // patch * (2 if model.source_video else 1)
    width = width_of(shape)
    out = 2.0 * tokens * width * shape["out_channels"] * patch
    first = 2.0 * cells * 2 * shape["out_channels"] * hidden
    rest = 2.0 * cells * hidden * (2 * hidden + width)
    return Cost(
        tokens=tokens,
        parts={
            **_blocks(shape, tokens, image, model.lora_rank, model.lora_targets),
            "embedding": Part(_embedding(shape, tokens, image), 0.0, in_blocks=False),
            "geometry_adapter": Part(first + rest, first + 2 * rest, in_blocks=False),
            "output": Part(out, out, in_blocks=False),
        },
    )


def width_of(shape: Mapping[str, Any]) -> int:
    """Return the number of channels of a token."""
    return shape["num_attention_heads"] * shape["attention_head_dim"]


def _blocks(
    shape: Mapping[str, Any], tokens: int, image: int, lora_rank: int, lora_targets: Sequence[str]
) -> dict[str, Part]:
    """Return the parts of all blocks, for `tokens` tokens of video and `image` tokens of CLIP."""
    width, ffn, blocks = width_of(shape), shape["ffn_dim"], shape["num_layers"]
    # q, k, v, o of self-attention, q and o of cross-attention, two feed-forward layers
    linear = 2.0 * tokens * (6 * width**2 + 2 * width * ffn) * blocks
    context = 4.0 * (TEXT_LENGTH * width**2 + image * width * (shape["added_kv_proj_dim"] or 0)) * blocks
    text_layers = len({"to_k", "to_v"} & {*lora_targets})  # of cross-attention
    # Widths of A and B together: q and o of both attentions, k and v of self-attention, the feed-forward layers.
    widths = {"to_q": 4 * width, "to_out.0": 4 * width, "to_k": 2 * width, "to_v": 2 * width}
    lora_width = sum(widths.get(name, width + ffn) for name in lora_targets)
    lora_tokens = 2.0 * lora_rank * tokens * lora_width * blocks
    lora_text = 2.0 * lora_rank * TEXT_LENGTH * text_layers * width * blocks  # A, and as much for B
    attention = 4.0 * tokens * width * tokens * blocks
    attention_text = 4.0 * tokens * width * TEXT_LENGTH * blocks
    attention_image = 4.0 * tokens * width * image * blocks
    return {
        "linear": Part(linear, linear),
        # Text and image features need no gradient: B of their LoRA gets both, A its weight's alone.
        "context": Part(context, 0.0),
        "lora": Part(lora_tokens + 2 * lora_text, 2 * lora_tokens + 3 * lora_text),
        "attention": Part(attention, 2 * attention),
        # The query's gradient, and that of keys or of values where they have a LoRA.
        "attention_text": Part(attention_text, (1 + 0.5 * text_layers) * attention_text),
        # Keys and values of the image are frozen: the query's gradient alone.
        "attention_image": Part(attention_image, attention_image),
    }


def _embedding(shape: Mapping[str, Any], tokens: int, image: int) -> float:
    """Return the FLOPs of the patch, text, image and time embeddings."""
    width, image_dim = width_of(shape), shape["image_dim"] or 0
    patches = tokens * math.prod(shape["patch_size"]) * shape["in_channels"] * width
    text = TEXT_LENGTH * (shape["text_dim"] * width + width**2)
    return 2.0 * (patches + text + image * image_dim * (image_dim + width) + shape["freq_dim"] * width + 7 * width**2)


def vae_flops(shape: Mapping[str, Any], latents: tuple[int, int, int], source_video: bool = False) -> float:
    """Return the FLOPs of encoding a sample's clip, condition, mask, first frame (if the base takes one) and source.

    Zero for an unknown VAE.
    """
    pixels = _clip_pixels(shape, latents)
    videos = 3 + (shape["in_channels"] > shape["out_channels"]) + source_video
    return videos * VAE_FLOPS_PER_PIXEL.get(shape["out_channels"], 0.0) * pixels[0] * pixels[1]


def vae_work_bytes(shape: Mapping[str, Any], latents: tuple[int, int, int]) -> float:
    """Return the bytes of working memory for encoding one video in float32; zero for an unknown VAE."""
    return VAE_BYTES_PER_PIXEL.get(shape["out_channels"], 0.0) * _clip_pixels(shape, latents)[1]


def _clip_pixels(shape: Mapping[str, Any], latents: tuple[int, int, int]) -> tuple[int, int]:
    """Return (frames, pixels per frame) of the clip that these latents encode."""
    side = 16 if shape["out_channels"] == 48 else 8
    return 4 * (latents[0] - 1) + 1, latents[1] * latents[2] * side**2


def vae_seconds(work: float, gpu: str) -> float:
    """Return the seconds that a GPU of GPUS needs to encode, at ASSUMED_VAE_SHARE of its peak."""
    return work / ((peak_flops(gpu) or math.inf) * ASSUMED_VAE_SHARE)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a GPU by its name, e.g. "NVIDIA H200"; None if it is not in GPUS."""
    return next((GPUS[name][0] for name in GPUS if name.lower() in device_name.lower()), None)


def memory_of(gpu: str) -> float:
    """Return the bytes of a GPU's memory. Raises ConfigError if it is not in GPUS."""
    capacity = next((size for name, (_, size) in GPUS.items() if name.lower() in gpu.lower()), None)
    if capacity is None:
        raise ConfigError("train.gpu", gpu, f"allowed: {', '.join(GPUS)}")
    return capacity


def utilisation(
    sample: Cost, samples_per_s: float, peak: float, recomputed: float, keep_attention: bool = False
) -> tuple[float, float]:
    """Return (MFU, HFU) of one device: useful and executed FLOPs per second, as shares of `peak`.

    Args:
        samples_per_s: throughput of one device.
        peak: FLOP/s of the device in the dtype of the base.
        recomputed, keep_attention: as in Cost.executed.
    """
    per_s = samples_per_s / peak
    return sample.useful * per_s, sample.executed(recomputed, keep_attention) * per_s


def seconds_per_step(
    sample: Cost, samples: int, gpu: str, recomputed: float, keep_attention: bool = False, hfu: float = ASSUMED_HFU
) -> float:
    """Return the seconds that one GPU needs for its `samples` of a step at the given HFU.

    Raises:
        ConfigError: the GPU is not in GPUS.
    """
    peak = peak_flops(gpu)
    if peak is None:
        raise ConfigError("train.gpu", gpu, f"allowed: {', '.join(GPUS)}")
    return sample.executed(recomputed, keep_attention) * samples / (peak * hfu)
