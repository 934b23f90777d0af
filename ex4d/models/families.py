"""List the Wan models that the adapter is known to fit, with everything that is needed before any download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}
_14B = _WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_1_3B = _WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_5B = _WAN | {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
_ENCODERS = {"vae": 126_892_531, "text_encoder": 5_680_910_336}  # Wan's causal VAE, UMT5-XXL's encoder
_WITH_CLIP = _ENCODERS | {"image_encoder": 630_766_080}  # CLIP ViT-H/14


@dataclass(frozen=True)
class Family:
    """One architecture of the base model.

    Args:
        hub_ids: repositories in diffusers layout that hold it; () if there is none, only folders that users convert.
        transformer: the complete configuration of diffusers' WanTransformer3DModel.
        stride: pixels per latent in (T, H, W); T frames give (T − 1) / stride + 1 latents.
        encoders: {component: number of parameters} of VAE, text and image encoder, counted on the meta device.
        boundary: for a base with two experts, the noise level at and above which the first one works (diffusers'
            `boundary_ratio`); None for a base with one transformer.
    """

    hub_ids: tuple[str, ...]
    transformer: Mapping[str, Any]
    stride: tuple[int, int, int] = (4, 8, 8)
    encoders: Mapping[str, int] = field(default_factory=lambda: _ENCODERS)
    boundary: float | None = None


FAMILIES = {
    "wan2.1-i2v-14b": Family(  # the base of the published EX-4D weights (480P)
        hub_ids=("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
        transformer=_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        encoders=_WITH_CLIP,
    ),
    "wan2.1-t2v-1.3b": Family(  # no first-frame condition: frame 0 reaches the model through the geometry adapter alone
        hub_ids=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
        transformer=_1_3B,
    ),
    "wan2.1-fun-1.3b-inp": Family(  # published in its original layout only; convert it to a diffusers folder first
        hub_ids=(),
        transformer=_1_3B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 1536},
        encoders=_WITH_CLIP,
    ),
    "wan2.2-ti2v-5b": Family(  # as text-to-video: one timestep for all tokens, frame 0 through the adapter alone
        hub_ids=("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
        transformer=_5B | {"in_channels": 48, "out_channels": 48},
        stride=(4, 16, 16),
        encoders=_ENCODERS | {"vae": 704_688_668},
    ),
    "wan2.2-i2v-a14b": Family(  # two experts with an adapter each; a first-frame condition, but no CLIP
        hub_ids=("Wan-AI/Wan2.2-I2V-A14B-Diffusers",),
        transformer=_14B | {"in_channels": 36},
        boundary=0.9,
    ),
    "wan2.2-t2v-a14b": Family(  # two experts with an adapter each; frame 0 through the geometry adapter alone
        hub_ids=("Wan-AI/Wan2.2-T2V-A14B-Diffusers",),
        transformer=_14B,
        boundary=0.875,
    ),
}

# Entries that tell the families apart; the rest of a configuration follows from them.
_IDENTITY = (
    *("num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim"),
    *("in_channels", "out_channels", "image_dim"),
)


def family_of(transformer_config: Mapping[str, Any]) -> str | None:
    """Return the name of the family that a transformer configuration belongs to; None for a custom model."""
    for name, family in FAMILIES.items():
        if all(transformer_config.get(key) == family.transformer[key] for key in _IDENTITY):
            return name
    return None


def family_of_hub_id(hub_id: str) -> str | None:
    """Return the name of the family that a hub repository belongs to; None if it is not in the table."""
    return next((name for name, family in FAMILIES.items() if hub_id in family.hub_ids), None)
