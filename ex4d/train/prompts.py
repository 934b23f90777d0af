"""Embed a run's single prompt: rank 0 computes the embeddings once and caches them in the run's folder.

The text encoder, 11 GB for 14B, is never loaded beside the transformer, on another rank, or again after a restart.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ex4d import config as configs
from ex4d.models import backbone
from ex4d.train.config import Place, TrainConfig


def fixed(config: TrainConfig, model: backbone.ModelConfig, place: Place, device: torch.device) -> dict[str, Tensor]:
    """Return {text: embeddings [1, 512, d] on the device} of `train.prompt` and the empty prompt. A collective call."""
    embeddings: list[Any] = [_read_or_compute(config, model, device) if place.rank == 0 else None]
    if place.world_size > 1:
        torch.distributed.broadcast_object_list(embeddings, src=0)
    return {text: embeds.to(device) for text, embeds in embeddings[0].items()}


def _read_or_compute(config: TrainConfig, model: backbone.ModelConfig, device: torch.device) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    texts = {"empty": "", "prompt": str(config.prompt)}
    folder = backbone.resolve(model.base, model.revision, ("text_encoder",))
    files = [path for name in backbone.FOLDERS["text_encoder"] for path in sorted((folder / name).glob("*"))]
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = configs.fingerprint(config.prompt, str(backbone.dtype_of(model.dtype, device)), facts)
    path = Path(config.output) / "prompts" / f"{digest}.safetensors"
    try:
        tensors = load_file(path)
        return {text: tensors[name] for name, text in texts.items()}
    except (OSError, KeyError, SafetensorError):  # missing, or only partly written
        pass
    embeds = _compute(texts, model, device)
    # Loading leaves frames that refer to each other and to the encoder, which would stay on the GPU until Python next
    # looks for such circles.
    gc.collect()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    save_file(embeds, partial)
    partial.replace(path)
    return {text: embeds[name] for name, text in texts.items()}


def _compute(texts: Mapping[str, str], model: backbone.ModelConfig, device: torch.device) -> dict[str, Tensor]:
    components = ("text_encoder",)
    base = backbone.load_base(model.base, model.revision, model.dtype, device, components=components)
    return {name: base.encode_text([text]).cpu() for name, text in texts.items()}
