"""Depth of a clip: one protocol, one dict of estimators. Nothing heavy is imported before an estimator is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d import hub
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry import depth as conversion
from ex4d.geometry.camera import Camera

if TYPE_CHECKING:
    from ex4d.video import Fit


def release() -> None:
    """Release the networks that estimators cache between clips, and their GPU memory."""
    import gc
    import sys

    for name in ("transformers", "depthcrafter_weights"):
        module = sys.modules.get(f"ex4d.depth.{name}")
        if module is not None:
            module._load.cache_clear()
    if "ex4d.depth.foreign" in sys.modules:
        sys.modules["ex4d.depth.foreign"].release()
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Geometry:
    """The geometry of a clip from an estimator: depth and, if known, cameras, confidence and moving surfaces.

    Args:
        values: float32 [T, H, W], finite; z_depth (> 0, along the camera's z) or disparity (>= 0, larger is nearer).
        kind: "z_depth" or "disparity" (1/z, up to scale, and up to shift unless `metric`).
        K: float64 [3, 3] px of the frames; None if the estimator has none.
        metric: True if the unit is the metre.
        provenance: JSON-serialisable facts: estimator, weights and their sha256, licence.
        w2c: float64 [T, 4, 4] of the source camera in the unit of z_depth, OpenCV axes, the first the identity; None
            if unknown.
        confidence: float32 [T, H, W], larger is more certain; None if the estimator has none.
        dynamic_mask: bool [T, H, W], True where the surface moves in the world; None if unknown.
        valid_mask: bool [T, H, W], True where depth was measured. Elsewhere `values` only keep the mesh watertight,
            which shows nothing there. None: everywhere.
    """

    values: np.ndarray
    kind: str
    K: np.ndarray | None = None
    metric: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    w2c: np.ndarray | None = None
    confidence: np.ndarray | None = None
    dynamic_mask: np.ndarray | None = None
    valid_mask: np.ndarray | None = None


@dataclass(frozen=True)
class DepthRequest:
    """The inputs of an estimator besides the frames.

    video_path: the source video (sidecar files lie beside it); "" if there is none.
    depth_path: a file of depth, or a folder of them; for networks the weights, as `hub-id@revision` or a local folder.
    name: the video's path relative to the folder of all videos, which a folder of depth files mirrors; "" is unknown.
    twin, namesake: another video with the same stem in the same folder, or in another one; "" if there is none. A
        depth file that is named by the stem alone could then belong to that video.
    frame_index: int64 [T], positions of the clip's frames in the source's presentation order; None is 0 … T − 1.
    frame_s: float64 [T], seconds of the clip's frames from the source's first; None is unknown.
    source_frames, source_s: number of frames of the whole source, and seconds from its first to its last; 0 is unknown.
    fit: how the source's pictures were cropped and scaled to the clip's frames; None if unchanged.
    seed: random seed.
    device: of a network: cpu, cuda or cuda:N; None is a GPU if there is one.
    batch_size: frames that a per-frame network processes at once; None is 8 on a GPU (Depth Pro: 2), 1 on the CPU.
    fov_deg: field of view over the longer side; None leaves it to the estimator.
    cameras: where the source's cameras come from: see `source_cameras`.
    python: the interpreter of a foreign estimator's environment.
    fill_px: fill holes of measured depth up to this width in px of the frames.
    """

    video_path: str = ""
    depth_path: str | None = None
    name: str = ""
    twin: str = ""
    namesake: str = ""
    frame_index: np.ndarray | None = None
    frame_s: np.ndarray | None = None
    source_frames: int = 0
    source_s: float = 0.0
    fit: Fit | None = None
    seed: int = 0
    device: str | None = None
    batch_size: int | None = None
    fov_deg: float | None = None
    cameras: str = "auto"
    fill_px: int = 0
    python: str | None = None


def _late(module: str, frames: np.ndarray, request: DepthRequest, **options: Any) -> Geometry:
    return importlib.import_module(f"ex4d.depth.{module}").estimate(frames, request, **options)


Estimator = Callable[[np.ndarray, DepthRequest], Geometry]
ESTIMATORS: dict[str, Estimator] = {
    "sidecar": partial(_late, "sidecar"),
    "parallax": partial(_late, "parallax"),
    "depth-anything-v2": partial(_late, "transformers", name="depth-anything-v2"),
    "depth-pro": partial(_late, "transformers", name="depth-pro"),
    "zoedepth": partial(_late, "transformers", name="zoedepth"),
    "depthcrafter": partial(_late, "depthcrafter"),
    "da3": partial(_late, "foreign", name="da3"),
    "video-depth-anything": partial(_late, "foreign", name="video-depth-anything"),
    "own": partial(_late, "foreign", name="own"),
}
WITHOUT_NETWORK = ("sidecar", "parallax")
FOREIGN = ("da3", "video-depth-anything", "own")  # run in a separate Python environment, `depth_python`
AUTO = "auto"  # a setting may have this value instead of a key of ESTIMATORS; `depth.auto` then chooses one
CHOICES = (AUTO, *ESTIMATORS)


def weight_folders(name: str, depth_path: str | None) -> list[Path]:
    """Return the folders that hold an estimator's weights, fetched if missing; [] if it has no weights.

    Args:
        name: a key of ESTIMATORS.
        depth_path: as in DepthRequest.

    Raises:
        ConfigError: the weights are missing and cannot be fetched; says what to download.
    """
    if name == "depthcrafter":
        unet, base = importlib.import_module("ex4d.depth.depthcrafter_weights").folders(depth_path)
        return [Path(unet), Path(base) / "vae", Path(base) / "image_encoder", Path(base) / "scheduler"]
    networks = importlib.import_module("ex4d.depth.transformers")
    if name not in networks.NETWORKS:
        return []
    return [hub.resolve(depth_path or networks.NETWORKS[name].hub_id, networks.FILES, "depth_path")]


def estimate(name: str, frames: np.ndarray, request: DepthRequest) -> Geometry:
    """Estimate the depth of a clip, and its cameras and moving surfaces where known, and check the result.

    Args:
        name: a key of ESTIMATORS.
        frames: uint8 [T, H, W, 3], RGB.

    Raises:
        ConfigError: unknown estimator, or missing weights.
        BadSample: depth_missing, sidecar_ambiguous, depth_frames, depth_unit, depth_pickle, depth_shape, depth_nan,
            depth_nonpositive, depth_constant, depth_fov, depth_holes, depth_worker_*, cameras_missing.
        Filtered: no_parallax, parallax_noise, parallax_certainty, parallax_moving.
    """
    if name not in ESTIMATORS:
        raise ConfigError("depth", name, f"allowed: {', '.join(ESTIMATORS)}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise BadSample("depth_shape", f"frames are {frames.dtype} {list(frames.shape)}, not uint8 [T, H, W, 3]")
    result = ESTIMATORS[name](frames, request)
    check(result, frames.shape[:3])
    return importlib.import_module("ex4d.depth.source_cameras").joined(result, frames, request)


def check(result: Geometry, shape: tuple[int, ...]) -> None:
    """Raise BadSample unless values are float32 of `shape`, finite, nonnegative, not constant, and K is plausible."""
    values = result.values
    if result.K is not None:
        try:
            Camera(result.K, np.eye(4), (shape[1], shape[2]))
        except ConfigError as error:  # K comes from data, not from a setting
            raise BadSample("depth_shape", f"K is not an intrinsics matrix in px: {error.allowed}") from None
    if values.shape != tuple(shape) or values.dtype != np.float32:
        raise BadSample("depth_shape", f"{values.dtype} {list(values.shape)} where float32 {list(shape)} is needed")
    valid = result.valid_mask
    if valid is not None and (valid.shape != values.shape or valid.dtype != bool):
        raise BadSample("depth_shape", f"valid_mask is {valid.dtype} {list(valid.shape)}, not bool {list(shape)}")
    bad = ~np.isfinite(values)
    if bad.any():
        raise BadSample("depth_nan", f"{bad.mean():.2%} of the values are not finite")
    low = float(values.min())
    if low < 0 or (low == 0 and result.kind == "z_depth"):
        raise BadSample("depth_nonpositive", f"{result.kind} falls to {low:.4g}")
    if np.ptp(values) <= 1e-6 * abs(float(values.max())):
        raise BadSample("depth_constant", f"every value is {low:.4g}")


def z_depth_of(result: Geometry, profile: str = "default") -> np.ndarray:
    """Convert an estimator's result to bounded, positive z_depth float32 [T, H, W] (`geometry.depth.to_z_depth`).

    Args:
        profile: "released" maps relative disparity as the released code does, by its minimum and maximum.

    Raises:
        BadSample: depth_shape, depth_nan, depth_nonpositive, depth_constant.
    """
    mapping: dict[str, Any] = conversion.RELEASED_MAPPING if profile == "released" else {}
    return conversion.to_z_depth(result.values, result.kind, metric=result.metric, **mapping)
