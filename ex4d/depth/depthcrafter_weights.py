"""Locate and load the weights of DepthCrafter's networks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ex4d import hub, storage
from ex4d.errors import ConfigError, ContractError

UNET_ID, BASE_ID = "tencent/DepthCrafter", "stabilityai/stable-video-diffusion-img2vid-xt"
LICENCE = (
    "DepthCrafter: academic, research and education only, no commercial use; "
    "Stable Video Diffusion: Stability AI Community License"
)
UNET_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
BASE_FILES = (
    *("vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"),
    *("image_encoder/config.json", "image_encoder/model.fp16.safetensors"),
    *("feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json"),
)
ADVICE = (
    f"where there is a network run `hf download {UNET_ID} --local-dir models/depthcrafter/unet` and "
    f"`hf download {BASE_ID} {' '.join(BASE_FILES)} --local-dir models/depthcrafter`, bring the folder here and set "
    "depth_path to it"
)


@dataclass(frozen=True)
class Networks:
    """DepthCrafter's networks on one device; `clip_mean` and `clip_std` are those of the image encoder."""

    unet: Any
    vae: Any
    image_encoder: Any
    scheduler: Any
    clip_mean: tuple[float, ...]
    clip_std: tuple[float, ...]
    device: str
    facts: dict[str, Any]


def folders(depth_path: str | None) -> tuple[str, str]:
    """Locate the folders of the network and of SVD's other parts. Raises ConfigError, which says what to download."""
    if depth_path and Path(depth_path).is_dir():
        parts = ["unet", *sorted({file.partition("/")[0] for file in BASE_FILES})]
        missing = [part for part in parts if not (Path(depth_path) / part).is_dir()]
        if missing:
            raise ConfigError("depth_path", depth_path, f"{', '.join(missing)} is missing there: {ADVICE}")
        return str(Path(depth_path) / "unet"), str(depth_path)
    unet = hub.resolve(depth_path or UNET_ID, UNET_FILES, "depth_path", ADVICE)
    return str(unet), str(hub.resolve(BASE_ID, BASE_FILES, "depth_path", ADVICE))


def load(depth_path: str | None, device: str) -> Networks:
    """Load the networks in eval mode, in half precision on a GPU; they stay cached between clips.

    Raises:
        ConfigError: the weights are missing and cannot be fetched, or are those of another network.
        ContractError: the folder does not match its configs.
    """
    return _load(hub.name_of(depth_path or UNET_ID), *folders(depth_path), device)


@lru_cache(maxsize=1)
def _load(weights: str, unet_folder: str, base_folder: str, device: str) -> Networks:
    unet, base = Path(unet_folder), Path(base_folder)
    kind = str(_json(unet / "config.json").get("_class_name"))
    if not kind.startswith(("UNetSpatioTemporalConditionModel", "DiffusersUNetSpatioTemporalConditionModel")):
        raise ConfigError("depth_path", unet_folder, f"holds a {kind}; depthcrafter is a UNetSpatioTemporalCondition…")
    settings = _json(base / "feature_extractor" / "preprocessor_config.json")
    try:
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
        networks, scheduler = _from_pretrained(unet, base, device)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ContractError(f"{unet_folder}, {base_folder} cannot be loaded as DepthCrafter: {error}") from error
    hub.say_licence("depthcrafter", weights, LICENCE)
    facts = {
        "estimator": "depthcrafter",
        "weights": weights,
        "revision": hub.revision_of(unet),
        "weights_sha256": "+".join(_sha256(folder) for folder in (unet, base / "vae", base / "image_encoder")),
        "licence": LICENCE,
    }
    return Networks(networks[0], networks[1], networks[2], scheduler, mean, std, device, facts)


def _from_pretrained(unet: Path, base: Path, device: str) -> tuple[list[Any], Any]:
    """Load ([network, VAE, image encoder], scheduler)."""
    import torch
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionModelWithProjection

    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    # diffusers classes never run code from a folder, and reject the keyword trust_remote_code.
    classes: list[tuple[Any, Path, dict[str, Any]]] = [
        (UNetSpatioTemporalConditionModel, unet, {"torch_dtype": dtype}),
        (AutoencoderKLTemporalDecoder, base / "vae", {"torch_dtype": dtype}),
        (CLIPVisionModelWithProjection, base / "image_encoder", {"dtype": dtype, "trust_remote_code": False}),
    ]
    networks = []
    for cls, folder, options in classes:
        options |= {"variant": _variant(folder), "local_files_only": True, "use_safetensors": True}
        networks.append(cls.from_pretrained(folder, **options).to(device).eval().requires_grad_(False))
    return networks, EulerDiscreteScheduler.from_pretrained(base / "scheduler", local_files_only=True)


def _variant(folder: Path) -> str | None:
    return "fp16" if any(folder.glob("*.fp16.safetensors")) else None


def _sha256(folder: Path) -> str:
    variant = _variant(folder)
    return "+".join(storage.sha256(path) for path in sorted(folder.glob(f"*{'.fp16' if variant else ''}.safetensors")))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContractError(f"{path} cannot be read: {error}") from error
