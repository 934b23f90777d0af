"""Write tiny checkpoints with the library's own classes: the networks of Fréchet distances, and captioners."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ["a", "an", "the", "man", "woman", "dog", "room", "walks", "sits", "red", "blue", "box", "ball", "in", "on"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PREPROCESSOR = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def make_dinov2(folder: Path) -> Path:
    """Write a DINOv2 of pictures of 28 px; return its folder."""
    from transformers import Dinov2Config, Dinov2Model

    return _write(folder, Dinov2Model(Dinov2Config(**SHAPE, image_size=28, patch_size=14, mlp_ratio=2)))


def make_videomae(folder: Path) -> Path:
    """Write a VideoMAE of four frames of 32 px; return its folder."""
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(**SHAPE, image_size=32, patch_size=16, num_frames=4, intermediate_size=64)
    return _write(folder, VideoMAEModel(config))


def make_blip(folder):
    """Write a BLIP of about 40,000 parameters with its tokenizer and image processor; return its folder."""
    import torch
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    text = {**shape, **ids, "vocab_size": len(vocabulary), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = BlipForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_llava(folder):
    """Write a LLaVA of about 60,000 parameters with its processor and chat template; return its folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, additional_special_tokens=["<image>"])
    template = (
        "{% for message in messages %}{% for part in message.content %}{% if part.type == 'image' %}<image>"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    pictures = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        **{"image_processor": pictures, "tokenizer": fast, "patch_size": 8, "num_additional_image_tokens": 1},
        **{"vision_feature_select_strategy": "default", "chat_template": template},
    )
    processor.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **shape, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    text = {"model_type": "llama", **shape, **ids, "vocab_size": len(words), "num_key_value_heads": 2}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-2)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    return folder


def make_clip(folder: Path) -> Path:
    """Write a CLIP of pictures of 32 px with its processor; return its folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    pictures = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)).save_pretrained(folder)
    shape = {**SHAPE, "intermediate_size": 48, "projection_dim": 16}
    text = {**shape, "vocab_size": len(words), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 8}))
    model.save_pretrained(folder)
    return folder


def _write(folder: Path, model) -> Path:
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
