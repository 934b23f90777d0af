"""Save a tiny Wan I2V checkpoint of the real classes, in the layout of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "image_dim": 16,
    "added_kv_proj_dim": 24,
}


def save_checkpoint(folder: Path, **changes: object) -> Path:
    """Write a whole diffusers folder: transformer, VAE, UMT5 and its tokenizer, CLIP and its settings."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**(TRANSFORMER | changes))
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLWan(base_dim=3, z_dim=16, num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    text = UMT5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, relative_attention_num_buckets=8
    )
    UMT5EncoderModel(text).save_pretrained(folder / "text_encoder")
    _save_tokenizer(folder / "tokenizer")
    if (TRANSFORMER | changes)["image_dim"] is not None:
        clip = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        CLIPVisionModel(clip).save_pretrained(folder / "image_encoder")
        (folder / "image_processor").mkdir()
        settings = {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.26, 0.27]}
        (folder / "image_processor" / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {
        word: index for index, word in enumerate(["a", "red", "ball", "rolls"], 3)
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
