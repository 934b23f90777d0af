"""Build the small real model: the classes of Wan2.1-I2V at a size that a CPU can train, in diffusers' layout.

It has WanTransformer3DModel with its image-to-video path, the UMT5 text encoder, the CLIP vision encoder, and a linear
codec in place of Wan's VAE. The encoders are random and frozen: they give each caption and picture distinct features,
which the transformer learns to use. `benchmarks/pretrain_tiny.py` trains the transformer; its weights are in
`assets/tiny`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ex4d.models.linear_codec import GROUP, LinearVideoCodec, to_blocks
from ex4d.models.quantize import QuantizedLinear

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "grey")
THINGS = ("a", "an", "and", "sphere", "box", "in", "room", "under", "the", "sky", "video", "scene", "moving")
WORDS = (*COLOURS, *THINGS)  # the words of the synthetic corpus's captions, and a few more
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
TEXT_DIM = 32
IMAGE_DIM = 32
SHIFT = 3.0

TRANSFORMER: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 384,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": IMAGE_DIM,
    "rope_max_seq_len": 64,
}


def new_transformer(z_dim: int, seed: int = 0, **changes: Any) -> Any:
    """Return an untrained WanTransformer3DModel of the tiny configuration, in_channels = 2·z + 4."""
    from diffusers import WanTransformer3DModel

    config = TRANSFORMER | changes
    width = config["num_attention_heads"] * config["attention_head_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(in_channels=2 * z_dim + 4, out_channels=z_dim, added_kv_proj_dim=width, **config)


@torch.no_grad()
def fit_codec(videos: np.ndarray, z_dim: int = 24, num_shared: int = 12, side: int = 8) -> LinearVideoCodec:
    """Return a codec fitted to videos, uint8 [N, 4k + 1, H, W, 3] RGB.

    latents_std is the square root of a channel's standard deviation (times a constant that makes the mean square 1):
    between equal weight for each pixel (no scaling) and equal weight for each channel (full scaling).
    """
    pixels = torch.from_numpy(videos).permute(0, 4, 1, 2, 3).double() / 127.5 - 1
    firsts = to_blocks(pixels[:, :, :1], 1, side).flatten(0, 3)
    groups = to_blocks(pixels[:, :, 1:], GROUP, side).flatten(0, 3)
    frame_basis = _principal(firsts - firsts.mean(0), z_dim)
    shared = frame_basis[:, :num_shared].repeat(GROUP, 1) / GROUP**0.5
    centred = groups - groups.mean(0)
    own = _principal(centred - (centred @ shared) @ shared.T, z_dim - num_shared)
    group_basis = torch.cat([shared, own], dim=1)
    codes = torch.cat([(firsts - firsts.mean(0)) @ frame_basis, centred @ group_basis / GROUP**0.5])
    spread = codes.std(0)
    std = spread.sqrt() * spread.mean().sqrt()
    codec = LinearVideoCodec(
        z_dim=z_dim,
        num_shared=num_shared,
        latents_mean=[0.0] * z_dim,
        latents_std=[round(value, 5) for value in std.tolist()],
        scale_factor_spatial=side,
    )
    codec.frame_mean.copy_(firsts.mean(0))
    codec.frame_basis.copy_(frame_basis)
    codec.group_mean.copy_(groups.mean(0))
    codec.group_basis.copy_(group_basis)
    return codec.eval().requires_grad_(False)


def _principal(rows: Tensor, count: int) -> Tensor:
    """Return the first `count` principal directions [D, count] of centred rows [M, D], each with a fixed sign."""
    vectors = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :count]
    strongest = vectors.abs().argmax(dim=0)
    return vectors * vectors[strongest, torch.arange(count)].sign()


def quantize_linears(within: nn.Module, style: str, device: torch.device | str = "cpu") -> None:
    """Replace every linear layer below a module in place, one at a time; codes land on `device`."""
    for module in within.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, QuantizedLinear(child, style, device))


def build_tiny(folder: str | Path, codec: Any, transformer: Any, seed: int = 0, half: bool = True) -> Path:
    """Return `folder`, written as a diffusers folder that `load_base` reads.

    Args:
        codec: a fitted LinearVideoCodec.
        transformer: from `new_transformer`, trained or not.
        seed: of the random text and image encoders.
        half: store the transformer as bfloat16; `load_base` chooses the dtype to load it in.
    """
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder, image_encoder = _text_encoder(), _image_encoder()
    transformer.to(torch.bfloat16 if half else torch.float32).save_pretrained(folder / "transformer")
    codec.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    image_encoder.save_pretrained(folder / "image_encoder")
    _tokenizer().save_pretrained(folder / "tokenizer")
    side = image_encoder.config.image_size
    _write_json(
        folder / "image_processor" / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
        },
    )
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": SHIFT},
    )
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "WanImageToVideoPipeline",
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "UMT5EncoderModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "transformer": ["diffusers", "WanTransformer3DModel"],
            "vae": ["ex4d.models.linear_codec", "LinearVideoCodec"],
        },
    )
    return folder


def _text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(SPECIAL_TOKENS) + len(WORDS),
            d_model=TEXT_DIM,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=32,
            is_encoder_decoder=False,
            initializer_factor=1.0,
        )
    )


def _image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=IMAGE_DIM,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            initializer_factor=1.0,
        )
    )


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
