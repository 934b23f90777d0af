"""Depth from networks of the transformers library, frame by frame: Depth Anything V2, Depth Pro, ZoeDepth.

Pictures are preprocessed here from the checkpoint's `preprocessor_config.json`, because two of the library's three
processors need torchvision. Relative disparity is aligned from frame to frame (`geometry.depth.align_clip`); metric
depth is used as it is. On a GPU: half precision, in batches.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import hub, storage
from ex4d.depth import DepthRequest, Geometry
from ex4d.errors import BadSample, ConfigError, ContractError
from ex4d.geometry.depth import align_clip

FILES = ("*.json", "*.safetensors")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Network:
    """A family of checkpoints: hub id and licence of the default, `model_type` of the config, class in transformers.

    gpu_batch: frames per batch on a GPU. Depth Pro's decoder takes 2 GB a frame in half precision (counted on tensors
    without memory). Its encoder sees a frame as 36 pictures, so larger batches gain little.
    """

    hub_id: str
    licence: str
    model_type: str
    cls: str
    gpu_batch: int = 8


NETWORKS = {
    "depth-anything-v2": Network(
        "depth-anything/Depth-Anything-V2-Small-hf",
        "Apache-2.0 (Small; Base and Large are CC-BY-NC-4.0)",
        "depth_anything",
        "DepthAnythingForDepthEstimation",
    ),
    "depth-pro": Network(
        "apple/DepthPro-hf", "Apple AMLR (research)", "depth_pro", "DepthProForDepthEstimation", gpu_batch=2
    ),
    "zoedepth": Network("Intel/zoedepth-nyu-kitti", "MIT", "zoedepth", "ZoeDepthForDepthEstimation"),
}


def estimate(frames: np.ndarray, request: DepthRequest, name: str) -> Geometry:
    """Estimate the depth of frames uint8 [T, H, W, 3] by the network `name`, a key of NETWORKS.

    Args:
        request: `depth_path` is the weights: a local folder or `hub-id[@revision]`; None: the family's default.

    Raises:
        ConfigError: the weights are missing and cannot be fetched, or belong to another family.
        ContractError: the folder does not match its config.
        BadSample: depth_nan, depth_nonpositive, depth_constant, depth_fov.
    """
    import torch

    network = NETWORKS[name]
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = hub.resolve(request.depth_path or network.hub_id, FILES, "depth_path")
    model, settings, digest = _load(name, str(folder), device)
    size = request.batch_size or (network.gpu_batch if device.startswith("cuda") else 1)
    parts, fields = [], []
    for start in range(0, len(frames), size):
        values, fov = _run(model, settings, frames[start : start + size], device)
        parts.append(values)
        fields.append(fov)
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        raise BadSample("depth_nan", f"{name} gave {(~np.isfinite(values)).mean():.2%} non-finite values")
    if values.min() < 0:
        raise BadSample("depth_nonpositive", f"{name} gave values down to {values.min():.4g}")
    provenance = {
        "estimator": name,
        "weights": hub.name_of(request.depth_path or network.hub_id),
        "revision": hub.revision_of(folder),
        "weights_sha256": digest,
        "licence": network.licence,
    }
    return _result(values, fields, model.config, provenance)


def _result(values: np.ndarray, fields: list[Any], config: Any, provenance: dict[str, Any]) -> Geometry:
    """Convert the raw output [T, H, W] by each family's convention."""
    if config.model_type == "depth_pro":
        return _depth_pro(values, fields, provenance)
    if config.model_type == "zoedepth" or config.depth_estimation_type == "metric":
        return Geometry(values.astype(np.float32), "z_depth", None, True, provenance)
    aligned = align_clip(values)
    return Geometry(aligned - min(0.0, float(aligned.min())), "disparity", None, False, provenance)


def _depth_pro(values: np.ndarray, fields: list[Any], provenance: dict[str, Any]) -> Geometry:
    """Convert to metric depth and K. The output is inverse depth at a focal length of one picture width (paper §3.2).

    One focal length serves the clip, the median of its frames: K does not change within a clip.
    """
    height, width = values.shape[1:]
    if fields[0] is None:  # a checkpoint without the field-of-view head
        return Geometry((1 / np.clip(values, 1e-4, 1e4)).astype(np.float32), "z_depth", None, False, provenance)
    fov_deg = float(np.median(np.concatenate(fields)))
    if not 1 < fov_deg < 170:
        raise BadSample("depth_fov", f"the field of view was estimated as {fov_deg:.3g} degrees")
    focal = 0.5 * width / np.tan(np.radians(fov_deg) / 2)
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    z_depth = 1 / np.clip(values * (width / focal), 1e-4, 1e4)
    return Geometry(z_depth.astype(np.float32), "z_depth", K, True, {**provenance, "fov_deg": fov_deg})


@lru_cache(maxsize=1)
def _load(name: str, folder: str, device: str) -> tuple[Any, dict[str, Any], str]:
    """Load (model in eval mode, preprocessor settings, sha256 of the weights), cached between clips."""
    import torch
    import transformers

    network = NETWORKS[name]
    config = _json(Path(folder) / "config.json")
    if config.get("model_type") != network.model_type:
        raise ConfigError("depth_path", folder, f"holds a {config.get('model_type')}; {name} is a {network.model_type}")
    try:
        model = getattr(transformers, network.cls).from_pretrained(
            folder,
            dtype=torch.float16 if device.startswith("cuda") else torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ContractError(f"{folder} cannot be loaded as {network.cls}: {error}") from error
    hub.say_licence(name, folder, network.licence)
    digests = [storage.sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    return model.to(device).eval(), _json(Path(folder) / "preprocessor_config.json"), "+".join(digests)


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContractError(f"{path} cannot be read: {error}") from error


def _run(model: Any, settings: dict[str, Any], frames: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (raw output float32 [B, H, W] at the frames' size, field of view [B] in degrees or None)."""
    import torch
    from torch.nn import functional

    height, width = frames.shape[1:3]
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (
        torch.tensor(settings.get(key) or default, device=device)[:, None, None]
        for key, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD))
    )
    pixels = (pixels - mean) / std
    # ZoeDepth is poor at the border: its authors pad the picture by reflection and crop the result (depth_model.py).
    pad_y, pad_x = (int(np.sqrt(side / 2) * 3) if settings.get("do_pad") else 0 for side in (height, width))
    if pad_y or pad_x:
        pixels = functional.pad(pixels, (pad_x, pad_x, pad_y, pad_y), mode="reflect")
    padded = tuple(pixels.shape[-2:])
    pixels = functional.interpolate(
        pixels, size=working_size(padded, settings), mode="bicubic", align_corners=False, antialias=True
    )
    with torch.inference_mode():
        output = model(pixels.to(model.dtype))
    raw = output.predicted_depth.float()[:, None]
    raw = functional.interpolate(raw, size=padded, mode="bilinear", align_corners=False)[:, 0]
    raw = raw[:, pad_y : pad_y + height, pad_x : pad_x + width]
    fov = getattr(output, "field_of_view", None)
    return raw.cpu().numpy(), None if fov is None else fov.float().reshape(-1).cpu().numpy()


def working_size(size: tuple[int, ...], settings: dict[str, Any]) -> tuple[int, int]:
    """Return a network's input (H, W) for a picture of `size`, from its preprocessor settings.

    With `keep_aspect_ratio`, both sides are scaled by the factor at which neither is below the settings' size. Sides
    are rounded to multiples of `ensure_multiple_of`.
    """
    wanted = settings.get("size") or {"height": 384, "width": 384}
    height, width = int(wanted["height"]), int(wanted["width"])
    if settings.get("keep_aspect_ratio"):
        scale = max(height / size[0], width / size[1])
        height, width = round(size[0] * scale), round(size[1] * scale)
    multiple = int(settings.get("ensure_multiple_of") or 1)
    return max(multiple, round(height / multiple) * multiple), max(multiple, round(width / multiple) * multiple)
