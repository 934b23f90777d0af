"""Build the cameras of a clip (poses and intrinsics) from a named path or a file of poses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from ex4d.errors import ConfigError
from ex4d.geometry import trajectory, trajectory_files
from ex4d.geometry.camera import invert, relative_to

SOURCE_MOTIONS = ("remove", "keep", "smooth")
SMOOTH_S = 0.5  # standard deviation of the smoothing window, seconds
FILE_OPTIONS = ("scale", "resample", "format", "camera", "flip_y", "rebase")
# Extent of a path / distance of the scene. Metres mixed with millimetres are off by a factor of 1000.
PLAUSIBLE_EXTENT = (1e-3, 100.0)


def build(
    name: str,
    num_frames: int,
    angle_deg: float,
    radius: float,
    K: np.ndarray,
    options: Mapping[str, Any] | None = None,
    world: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Build the cameras: (w2c float64 [T, 4, 4], K float64 [3, 3], or [T, 3, 3] where the focal length changes).

    Args:
        name: a key of trajectory.TRAJECTORIES, or a file (`from_file`).
        angle_deg: the extent of a named path that turns.
        radius: distance of the point looked at, in the depth's unit (`trajectory.radius_of`).
        K: [3, 3] px of the source.
        options: the path's other options (`distance`, `turns`, `zoom`), or the file's (`scale`, `format`, …).
        world: w2c [4, 4] of the source camera of frame 0 in the world of a file with `rebase=false`, in the depth's
            unit; None: the source camera defines that world.

    Raises:
        ConfigError: `name` is neither a path nor a file, an option is unknown, or a value is out of range.
        ContractError: the file does not hold what its format says.
    """
    options = dict(options or {})
    if name in trajectory.TRAJECTORIES:
        w2c = trajectory.build(name, num_frames, angle_deg, radius, **options)
        return w2c, trajectory.zoom_intrinsics(K, num_frames, **options) if name == "zoom" else K
    check_name(name)
    return from_file(name, num_frames, radius, K, options, world)


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is a path of trajectory.TRAJECTORIES or a file."""
    if name not in trajectory.TRAJECTORIES and not Path(name).is_file():
        known = ", ".join(trajectory.TRAJECTORIES)
        raise ConfigError("trajectory", name, f"must be a pose file, or one of {known}")


def from_file(
    path: str | Path,
    num_frames: int,
    radius: float,
    K: np.ndarray,
    options: Mapping[str, Any],
    world: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Read (w2c [T, 4, 4], K [3, 3] or [T, 3, 3]) from a file, rebased so that its first camera is the source camera.

    With `rebase` false the poses stay in the file's world, to show what another camera sees. `world` is as in `build`.

    A JSON file of key poses, in radii, defines a spline, which is sampled at any number of frames. Other files have one
    pose per frame; `scale` converts their lengths to the depth's unit, and `resample` spreads the whole path over the
    frames. K follows the relative change of the file's focal length.
    """
    for key, value in options.items():
        if key not in FILE_OPTIONS:
            raise ConfigError(key, value, f"unknown option for a pose file; allowed: {', '.join(FILE_OPTIONS)}")
    rebase = options.get("rebase", True)
    if not isinstance(rebase, bool):
        raise ConfigError("rebase", rebase, "true or false")
    keys = trajectory_files.read_key_poses(path)
    if keys is not None:
        for key in options.keys() - {"rebase"}:
            raise ConfigError(key, options[key], "must be left out: key poses are in radii and take only rebase")
        if rebase:
            return trajectory.custom(num_frames, radius, keys), K
        keys[:, :3, 3] *= radius
        return trajectory.interpolate(keys, num_frames), K
    reader_options = {key: value for key, value in options.items() if key not in ("scale", "resample", "rebase")}
    poses = trajectory_files.read(path, **reader_options)
    count = len(poses.w2c) if options.get("resample", False) else num_frames
    origin = None if rebase else np.eye(4) if world is None else world
    w2c = _first_frames(path, poses.w2c, count, options.get("scale"), radius, origin=origin)
    if count != num_frames:
        w2c = trajectory.interpolate(w2c, num_frames)
    if poses.K is None or (poses.K[:count] == poses.K[0]).all():
        return w2c, K
    views, at = np.tile(np.asarray(K, np.float64), (num_frames, 1, 1)), np.linspace(0, count - 1, num_frames)
    for axis in (0, 1):
        views[:, axis, axis] *= np.interp(at, np.arange(count), poses.K[:count, axis, axis]) / poses.K[0, axis, axis]
    return w2c, views


def source_poses(
    path: str | Path, num_frames: int, scale: float | None = None, radius: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read (w2c [T, 4, 4] of the camera that took the video, its first pose [4, 4] in the file's world).

    The file has one pose per frame. w2c is relative to the first pose; the lengths of both are in the depth's unit.

    Args:
        scale: depth units per unit of the file; None: 1, if that is plausible.
        radius: distance of the point looked at, in the depth's unit, for the plausibility check; None skips it.

    Raises:
        ConfigError: too few poses, or lengths in a unit that differs from the depth's.
    """
    poses = trajectory_files.read(path).w2c
    w2c = _first_frames(path, poses, num_frames, scale, radius, "source_")
    poses[0, :3, 3] *= 1.0 if scale is None else scale
    return w2c, poses[0]


def _first_frames(
    path: str | Path,
    w2c: np.ndarray,
    num_frames: int,
    scale: object,
    radius: float | None,
    which: str = "",
    origin: np.ndarray | None = None,
) -> np.ndarray:
    """Return the first `num_frames` poses in the depth's unit, relative to pose 0 or to w2c `origin` [4, 4]."""
    if scale is not None and (not isinstance(scale, int | float) or not np.isfinite(scale) or scale <= 0):
        raise ConfigError(f"{which}scale", scale, "must be a finite number greater than 0")
    key = f"{which}poses" if which else "trajectory"
    if len(w2c) < num_frames:
        raise ConfigError(key, str(path), f"has {len(w2c)} poses, but {num_frames} frames need one each")
    w2c, factor = w2c[:num_frames].copy(), 1.0 if scale is None else float(scale)
    w2c[:, :3, 3] *= factor
    w2c = trajectory.relative_to_first(w2c) if origin is None else w2c @ invert(origin)
    extent = float(np.linalg.norm(w2c[:, :3, 3], axis=1).max())
    moves = extent > 1e-9 * (radius or 1.0)  # a fixed camera still moves by rounding errors
    if scale is None and radius and moves and not PLAUSIBLE_EXTENT[0] <= extent / radius <= PLAUSIBLE_EXTENT[1]:
        raise ConfigError(
            key,
            str(path),
            f"its camera moves by {extent:.3g}, but the scene is {radius:.3g} away: the units probably differ. "
            f"Set {which}scale to the number of depth units per unit of the file (1 keeps the lengths as they are)",
        )
    return w2c


def with_source(path: np.ndarray, source_w2c: np.ndarray, motion: str, fps: float) -> np.ndarray:
    """Return w2c [T, 4, 4] of the new cameras in the world of the first source camera.

    Args:
        path: [T, 4, 4], relative to a source camera that does not move.
        source_w2c: [T, 4, 4] of the source camera, the first the identity.
        motion: "remove": the path is fixed in the world; "keep": it follows the source camera; "smooth": it
            follows the stabilised source camera.

    Raises:
        ConfigError: unknown `motion`.
    """
    if motion not in SOURCE_MOTIONS:
        raise ConfigError("source_motion", motion, f"one of {', '.join(SOURCE_MOTIONS)}")
    if motion == "remove":
        return path
    return path @ (source_w2c if motion == "keep" else stabilised(source_w2c, fps))


def beside_source(path: np.ndarray, source_w2c: np.ndarray | None, motion: str, fps: float) -> np.ndarray:
    """Return w2c [T, 4, 4] of the new cameras, each in the world of the source camera of its own frame.

    Args: as for `with_source`; source_w2c None: the source does not move.
    """
    if source_w2c is None or motion == "keep":  # unchanged, bit for bit
        return path
    return relative_to(with_source(path, source_w2c, motion, fps), source_w2c)


def stabilised(w2c: np.ndarray, fps: float) -> np.ndarray:
    """Smooth the centres and rotations of poses [T, 4, 4] over time by a Gaussian; the first and last stay fixed.

    The path is extended by point reflection at both ends, so that the ends are not pulled inwards.
    """
    c2w = invert(w2c)
    turns = Rotation.from_matrix(c2w[:, :3, :3]).as_rotvec()  # assumes that no source turns by 180° within a clip
    values = np.concatenate([c2w[:, :3, 3], turns], axis=1)
    reach = min(len(values) - 1, round(3 * SMOOTH_S * fps))
    if reach < 1:
        return np.array(w2c)
    before, after = 2 * values[0] - values[reach:0:-1], 2 * values[-1] - values[-2 : -reach - 2 : -1]
    window = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / (SMOOTH_S * fps)))
    extended = np.concatenate([before, values, after])
    smooth = np.stack([np.convolve(column, window / window.sum(), "valid") for column in extended.T], axis=1)
    poses = np.tile(np.eye(4), (len(values), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = Rotation.from_rotvec(smooth[:, 3:]).as_matrix(), smooth[:, :3]
    return invert(poses)
