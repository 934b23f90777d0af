"""From a user's choice, a path's name or a file, to the cameras of a clip: poses and intrinsics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ex4d.errors import ConfigError
from ex4d.geometry import trajectory, trajectory_files

FILE_OPTIONS = ("scale", "resample", "format", "camera", "flip_y")


def build(
    name: str,
    num_frames: int,
    angle_deg: float,
    radius: float,
    K: np.ndarray,
    options: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (w2c float64 [T, 4, 4], K float64 [3, 3], or [T, 3, 3] where the focal length changes).

    Args:
        name: a key of trajectory.TRAJECTORIES, or a file: see `from_file`.
        angle_deg: the extent of a named path that turns.
        radius: distance of the point looked at, in the depth's unit (`trajectory.radius_of`).
        K: [3, 3] px of the source.
        options: what else the path takes (`distance`, `turns`, `zoom`), or the file (`scale`, `format`, …).

    Raises:
        ConfigError: neither a name nor a file, an unknown option, a value out of its range.
        ContractError: the file does not hold what its format says.
    """
    options = dict(options or {})
    if name in trajectory.TRAJECTORIES:
        w2c = trajectory.build(name, num_frames, angle_deg, radius, **options)
        return w2c, trajectory.zoom_intrinsics(K, num_frames, **options) if name == "zoom" else K
    check_name(name)
    return from_file(name, num_frames, radius, K, options)


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a path of trajectory.TRAJECTORIES or a file."""
    if name not in trajectory.TRAJECTORIES and not Path(name).is_file():
        known = ", ".join(trajectory.TRAJECTORIES)
        raise ConfigError("trajectory", name, f"a file of poses, or one of {known}")


def from_file(
    path: str | Path, num_frames: int, radius: float, K: np.ndarray, options: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (w2c [T, 4, 4], K [3, 3] or [T, 3, 3]) of the cameras that a file holds, the first made the source.

    A JSON file of key poses is a spline through them, in radii, over any number of frames. Another file has one pose a
    frame, times `scale` in the depth's unit; with `resample` its whole path is spread over the frames. Where the focal
    length changes along the file, K is scaled as it does.
    """
    for key, value in options.items():
        if key not in FILE_OPTIONS:
            raise ConfigError(key, value, f"a file of poses takes {', '.join(FILE_OPTIONS)}")
    keys = trajectory_files.read_key_poses(path)
    if keys is not None:
        return trajectory.custom(num_frames, radius, keys), K
    told = {key: value for key, value in options.items() if key not in ("scale", "resample")}
    poses = trajectory_files.read(path, **told)
    count = len(poses.w2c) if options.get("resample", False) else num_frames
    w2c = _first_frames(path, poses.w2c, count, options.get("scale", 1.0))
    if count != num_frames:
        w2c = trajectory.interpolate(w2c, num_frames)
    if poses.K is None or (poses.K[:count] == poses.K[0]).all():
        return w2c, K
    views, at = np.tile(np.asarray(K, np.float64), (num_frames, 1, 1)), np.linspace(0, count - 1, num_frames)
    for axis in (0, 1):
        views[:, axis, axis] *= np.interp(at, np.arange(count), poses.K[:count, axis, axis]) / poses.K[0, axis, axis]
    return w2c, views


def source_poses(path: str | Path, num_frames: int, scale: float = 1.0) -> np.ndarray:
    """Return w2c [T, 4, 4] of the camera that took the video: one pose a frame of a file, the first the identity.

    Args:
        scale: units of the depth for one unit of the file.
    """
    return _first_frames(path, trajectory_files.read(path).w2c, num_frames, scale, "source_")


def _first_frames(path: str | Path, w2c: np.ndarray, num_frames: int, scale: object, which: str = "") -> np.ndarray:
    if not isinstance(scale, int | float) or not np.isfinite(scale) or scale <= 0:
        raise ConfigError(f"{which}scale", scale, "a finite number above 0")
    if len(w2c) < num_frames:
        key = f"{which}poses" if which else "trajectory"
        raise ConfigError(key, str(path), f"has {len(w2c)} poses, {num_frames} frames need one each")
    w2c = trajectory.relative_to_first(w2c[:num_frames])
    w2c[:, :3, 3] *= scale
    return w2c
