"""Weights and inputs of a tiny Wan I2V model, derived from integers alone, so that every machine gets the same ones.

Shared by the test and by whoever records the released network's outputs again. Names are the released network's.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ex4d.models import adapter, backbone, encoders, formats

WIDTH, HIDDEN, RANK, VAE_DIM = 24, 32, 4, 8
# As tests/models/conftest.py, except for what the released code fixes: 1280 CLIP channels and 257 CLIP tokens.
CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "image_dim": 1280,
    "added_kv_proj_dim": WIDTH,
}


def numbers(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Return float32 numbers, uniform in [−scale, scale): the top 24 bits of PCG64's raw stream, seeded by the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> 40
    unit = (raw.astype(np.float64) / 2**23 - 1).astype(np.float32)
    return torch.from_numpy(unit.reshape(shape)) * scale


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    if ".norm" in name or name.startswith(("img_emb.proj.0", "img_emb.proj.4")):
        return numbers(name, shape, 0.3) + (1.0 if name.endswith("weight") else 0.0)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else WIDTH
    return numbers(name, shape, 1.5 / fan_in**0.5)


def base_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the base's weights under the released network's names."""
    return {name: _weight(name, shape) for name, shape in shapes.items()}


def released_checkpoint() -> dict[str, Tensor]:
    """Return the contents of a released ex4d.ckpt of this size, 40 + 8 tensors."""
    model = adapter.build_model(backbone.meta_transformer(CONFIG), MODEL)
    shapes = {name: value.detach() for name, value in model.trainable_parameters().items()}
    return {name: _weight(name, tuple(value.shape)) for name, value in formats.to_format(shapes, "released").items()}


MODEL = backbone.ModelConfig(lora_rank=RANK, lora_alpha=RANK, adapter_hidden=HIDDEN)


def our_model() -> adapter.Ex4dModel:
    """Return our model over the same base weights, renamed by diffusers' own converter."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    transformer: Any = WanTransformer3DModel(**CONFIG).eval()
    shapes = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    # The converter maps names one to one: learn the released names by sending every name through it.
    renamed = convert_wan_transformer_to_diffusers({name: name for name in _released_names(CONFIG["num_layers"])})
    state = {ours: _weight(theirs, shapes[ours]) for ours, theirs in renamed.items()}
    transformer.load_state_dict(state, strict=True)
    return adapter.build_model(transformer, MODEL)


def _released_names(num_blocks: int) -> list[str]:
    both = ("weight", "bias")
    names = ["patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"]
    names += ["time_projection.1", "head.head", *(f"img_emb.proj.{index}" for index in (0, 1, 3, 4))]
    out = [f"{name}.{part}" for name in names for part in both] + ["head.modulation"]
    for block in range(num_blocks):
        at = f"blocks.{block}"
        linears = [f"{kind}_attn.{name}" for kind in ("self", "cross") for name in "qkvo"]
        linears += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2", "norm3"]
        norms = [f"{kind}_attn.norm_{name}.weight" for kind in ("self", "cross") for name in "qk"]
        norms += ["cross_attn.norm_k_img.weight", "modulation"]
        out += [f"{at}.{name}.{part}" for name in linears for part in both] + [f"{at}.{name}" for name in norms]
    return out


def vae_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a weight of the VAE by its diffusers name."""
    if name.endswith("gamma"):
        return numbers(name, shape, 0.2) + 1.0
    return numbers(name, shape, (3 / int(np.prod(shape[1:]))) ** 0.5 if len(shape) > 3 else 0.2)


@torch.no_grad()
def our_base() -> encoders.Base:
    """Return a base with nothing but a small VAE of 8 base channels, to which an I2V transformer would belong."""
    from diffusers import AutoencoderKLWan

    vae: Any = AutoencoderKLWan(base_dim=VAE_DIM).eval()
    for name, value in vae.named_parameters():
        value.copy_(vae_weight(name, tuple(value.shape)))
    return encoders.Base("numbers", None, torch.device("cpu"), CONFIG, vae=vae)


def inputs() -> dict[str, Tensor]:
    """Return the inputs of one call: a latent of 2 × 6 × 8, batch 2, text of 512 and image of 257 tokens."""
    shapes = {
        "noisy_latents": (2, 16, 2, 6, 8),
        "prompt_embeds": (2, 512, 32),
        "image_embeds": (2, 257, 1280),
        "first_frame": (2, 20, 2, 6, 8),
        "cond_latents": (2, 32, 2, 6, 8),
    }
    out = {name: numbers(f"input.{name}", shape, 1.7) for name, shape in shapes.items()}
    return out | {"timestep": torch.tensor([991.735535, 172.413788])}


def clip() -> tuple[Tensor, Tensor]:
    """Return pixels [1, 3, 9, 32, 48] in [−1, 1) and visible, bool [1, 9, 32, 48]."""
    pixels = numbers("input.pixels", (1, 3, 9, 32, 48))
    return pixels, pixels[:, 0] > 0
