"""Compute features of images and videos with models of the transformers library, for distances between sets.

The paper's FID and FVD use Inception and I3D, whose weights come as code or pickles. DINOv2 (Stein et al. 2023) and
VideoMAE (after Ge et al. 2024, who use other weights of it) replace them; the values are not comparable to the paper's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import hub
from ex4d.errors import ConfigError, ContractError

FILES = ("*.json", "*.safetensors")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 16


@dataclass(frozen=True)
class Network:
    """A family: its class in transformers, the recommended checkpoint, its licence, and whether it takes videos."""

    cls: str
    hub_id: str
    licence: str
    of_videos: bool


NETWORKS = {
    "dinov2": Network("Dinov2Model", "facebook/dinov2-large", "Apache-2.0", of_videos=False),
    "videomae": Network("VideoMAEModel", "MCG-NJU/videomae-large", "CC-BY-NC-4.0", of_videos=True),
}


def image_features(frames: np.ndarray, weights: str, device: str = "cpu") -> np.ndarray:
    """Return float32 [T, D], the class token of each of the frames uint8 [T, H, W, 3].

    Args:
        weights: of a DINOv2 model, a folder or `hub-id[@revision]`.
    """
    import torch

    model, settings = load(weights, False, device)
    side = _side(model, settings)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(frames), BATCH):
            pixels = _pixels(frames[start : start + BATCH], side, settings, device)
            parts.append(model(pixels.to(model.dtype)).last_hidden_state[:, 0].float().cpu().numpy())
    return np.concatenate(parts)


def video_features(frames: np.ndarray, weights: str, device: str = "cpu") -> np.ndarray:
    """Return float32 [1, D], the mean token over evenly spaced frames of a video, uint8 [T, H, W, 3].

    Args:
        weights: of a VideoMAE model, a folder or `hub-id[@revision]`.
    """
    import torch

    model, settings = load(weights, True, device)
    chosen = np.linspace(0, len(frames) - 1, int(model.config.num_frames)).round().astype(int)
    pixels = _pixels(frames[chosen], _side(model, settings), settings, device)
    with torch.inference_mode():
        return model(pixels[None].to(model.dtype)).last_hidden_state.mean(dim=1).float().cpu().numpy()


def load(weights: str, of_videos: bool, device: str) -> tuple[Any, dict[str, Any]]:
    """Return (model in eval mode, preprocessor settings), cached as long as the files do not change.

    Raises:
        ConfigError: the weights are missing and cannot be fetched, or are not of a supported family.
        ContractError: the folder does not hold what its config says.
    """
    folder = folder_of(weights, of_videos)
    return _load(folder, hub.fingerprint([folder]), device)


@lru_cache(maxsize=2)
def _load(folder: Path, fingerprint: str, device: str) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers
    from safetensors import SafetensorError

    kind = _json(folder / "config.json")["model_type"]
    network = NETWORKS[kind]
    try:
        model = getattr(transformers, network.cls).from_pretrained(
            folder,
            dtype=torch.float16 if device.startswith("cuda") else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ContractError(f"{folder} cannot be loaded as {network.cls}: {error}") from error
    hub.say_licence(kind, str(folder), network.licence)
    return model.to(device).eval(), _json(folder / "preprocessor_config.json")


def folder_of(weights: str, of_videos: bool) -> Path:
    """Return the local folder of the weights. Raises ConfigError, which says what to download or what it found."""
    key = "evaluate.video_features" if of_videos else "evaluate.image_features"
    allowed = {kind: network for kind, network in NETWORKS.items() if network.of_videos == of_videos}
    advice = ", ".join(f"{network.hub_id} ({network.licence})" for network in allowed.values())
    folder = hub.resolve(weights, FILES, key, f"get them with `hf download` and give their folder; {advice}")
    try:
        kind = _json(folder / "config.json").get("model_type")
        _json(folder / "preprocessor_config.json")
    except (OSError, ValueError) as error:
        raise ConfigError(key, weights, f"holds no model ({error}); take {advice}") from error
    if kind not in allowed:
        raise ConfigError(key, weights, f"holds a {kind}; allowed: {', '.join(allowed)}, e.g. {advice}")
    return folder


def _side(model: Any, settings: dict[str, Any]) -> int:
    """Return the side in px that pictures are resized to: the preprocessor's crop size, else the model's image size."""
    crop = settings.get("crop_size") or {}
    return int(crop.get("height", model.config.image_size) if isinstance(crop, dict) else crop)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _pixels(frames: np.ndarray, side: int, settings: dict[str, Any], device: str) -> Any:
    """Return float32 [B, 3, side, side]: whole pictures, resized rather than cropped, so that their borders count."""
    import torch
    from torch.nn import functional

    pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float() / 255
    pixels = functional.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    mean, std = (
        torch.tensor(settings.get(name) or default, device=device)[:, None, None]
        for name, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD))
    )
    return (pixels.clamp(0, 1) - mean) / std
