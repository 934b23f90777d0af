"""Tiny checkpoints of the networks behind Fréchet distances, by the library's own classes."""

from __future__ import annotations

import json
from pathlib import Path

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


def _write(folder: Path, model) -> Path:
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
