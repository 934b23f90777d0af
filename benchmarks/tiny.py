"""The small real model: the classes of Wan2.1-I2V at a size that a CPU trains, saved in diffusers' layout.

WanTransformer3DModel with its image-to-video path, UMT5 text encoder, CLIP vision encoder, and a linear codec where Wan
has its VAE. The encoders are random and frozen: they give each caption and each picture features of its own, which is
what the transformer learns to use. `benchmarks/pretrain_tiny.py` trains the transformer; its weights lie in
`assets/tiny`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "grey")
THINGS = ("a", "an", "and", "sphere", "box", "in", "room", "under", "the", "sky", "video", "scene", "moving")
WORDS = (*COLOURS, *THINGS)  # what the captions of the synthetic corpus are made of, and a few more
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


def build_tiny(folder: str | Path, codec: Any, transformer: Any, seed: int = 0, half: bool = True) -> Path:
    """Return `folder`, written as a diffusers folder that `load_base` reads.

    Args:
        codec: a fitted LinearVideoCodec.
        transformer: of `new_transformer`, trained or not.
        seed: of the random text and image encoders.
        half: store the transformer as bfloat16; it is loaded in whatever dtype is asked for.
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
