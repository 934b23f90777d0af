"""Camera paths: w2c float64 [T, 4, 4], OpenCV axes, world = the source camera of the first frame.

Every path starts at the source camera (identity) and, where it turns, looks at the point (0, 0, radius). Lengths are
multiples of `radius`, so that scaling the depth scales the path and leaves the pictures unchanged (docs/method.md, 2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation, RotationSpline

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import look_at

ORBIT_RISE = 0.2  # released code: the eye rises by 0.2 r (1 - cos phi) while it goes around


def radius_of(z_depth0: np.ndarray, rule: str = "percentile") -> float:
    """Return the orbit radius r > 0 for the first frame's z_depth [H, W], in the unit of the depth.

    Args:
        rule: "percentile" is 1.06 times the 1st percentile (scales with the depth); "released" is the smallest depth
            inside the border ring (pushed back in the released code) plus 0.15, which does not scale with the depth.

    Raises:
        BadSample: depth_nan, if no depth is finite and positive. ConfigError: unknown rule.
    """
    values = np.asarray(z_depth0, np.float64)
    if rule == "released" and min(values.shape) > 2:
        values = values[1:-1, 1:-1]
    values = values[np.isfinite(values) & (values > 0)]
    if values.size == 0:
        raise BadSample("depth_nan", "the first frame has no finite, positive depth")
    if rule == "percentile":
        return float(1.06 * np.percentile(values, 1))
    if rule == "released":
        return float(values.min() + 0.15)
    raise ConfigError("radius_rule", rule, "allowed: percentile, released")


def _w2c(rotation: np.ndarray, eyes: np.ndarray) -> np.ndarray:
    w2c = np.tile(np.eye(4), (len(eyes), 1, 1))
    w2c[:, :3, :3] = rotation
    w2c[:, :3, 3] = -np.einsum("tij,tj->ti", rotation, eyes)
    return w2c


def _around(x: np.ndarray, y: np.ndarray, z: np.ndarray, radius: float) -> np.ndarray:
    """Return the path of eyes radius · (x, y, z) that look at (0, 0, radius)."""
    return look_at(radius * np.stack([x, y, z], axis=1), np.array([0.0, 0.0, radius]))


def _straight(offsets: np.ndarray) -> np.ndarray:
    """Return the path of eyes at `offsets` [T, 3] that keep looking along the source's axis."""
    return _w2c(np.tile(np.eye(3), (len(offsets), 1, 1)), offsets)


def _unit(num_frames: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, num_frames)


def orbit(num_frames: int, radius: float, angle_deg: float = 90.0) -> np.ndarray:
    """Return an orbit to the right (to the left when negative) from 0 to `angle_deg`, |angle| <= 90.

    eye(phi) = (r sin phi, 0.2 r (cos phi - 1), r - r |cos phi|): the released 30 / 60 / 90.
    """
    _check("angle_deg", angle_deg, abs(angle_deg) <= 90, "from -90 to 90 degrees for an orbit")
    phi = np.radians(angle_deg) * _unit(num_frames)
    return _around(np.sin(phi), ORBIT_RISE * (np.cos(phi) - 1), 1 - np.abs(np.cos(phi)), radius)


def right(num_frames: int, radius: float, angle_deg: float = 90.0) -> np.ndarray:
    """Return the orbit to the right by |angle_deg|."""
    return orbit(num_frames, radius, abs(angle_deg))


def left(num_frames: int, radius: float, angle_deg: float = 90.0) -> np.ndarray:
    """Return the orbit to the left by |angle_deg|."""
    return orbit(num_frames, radius, -abs(angle_deg))


def full(num_frames: int, radius: float, angle_deg: float = 90.0) -> np.ndarray:
    """Return the sweep 0 -> +angle -> 0 -> -angle -> 0; at 90 it is the released `180_outer`, phi from 0 to 360."""
    _check("angle_deg", angle_deg, 0 < angle_deg <= 90, "above 0 and up to 90 degrees for a full sweep")
    turn = 2 * np.pi * _unit(num_frames)
    yaw = np.radians(angle_deg) * np.arcsin(np.sin(turn)) / (np.pi / 2)  # a triangle wave
    rise = ORBIT_RISE * (1 - np.cos(np.radians(angle_deg))) * (np.cos(turn) - 1)
    return _around(np.sin(yaw), rise, 1 - np.cos(yaw), radius)


def lateral(num_frames: int, radius: float, angle_deg: float = 45.0) -> np.ndarray:
    """Return a slide in the source's image plane whose yaw reaches +-angle_deg: 0 -> + -> 0 -> - -> 0.

    At 45 degrees it is the released `180`: eye(phi) = (r sin phi, 0.2 r (cos phi - 1), 0), phi from 0 to 360.
    """
    _check("angle_deg", angle_deg, 0 < angle_deg < 90, "above 0 and below 90 degrees for a lateral slide")
    phi = 2 * np.pi * _unit(num_frames)
    reach = np.tan(np.radians(angle_deg))
    return _around(reach * np.sin(phi), ORBIT_RISE * (np.cos(phi) - 1), np.zeros(num_frames), radius)


def released_180(num_frames: int, radius: float) -> np.ndarray:
    """Return the path that the released code calls `--cam 180`: in fact a lateral slide of +-45 degrees of yaw."""
    return lateral(num_frames, radius, 45.0)


def arc(num_frames: int, radius: float, angle_deg: float = 90.0) -> np.ndarray:
    """Return a level circle around the target from 0 to `angle_deg`, |angle| <= 180: an orbit that does not rise."""
    _check("angle_deg", angle_deg, abs(angle_deg) <= 180, "from -180 to 180 degrees for an arc")
    phi = np.radians(angle_deg) * _unit(num_frames)
    return _around(np.sin(phi), np.zeros(num_frames), 1 - np.cos(phi), radius)


def crane(num_frames: int, radius: float, angle_deg: float = 45.0) -> np.ndarray:
    """Return a rise (a fall when negative) on a circle over the target to the elevation `angle_deg`, |angle| <= 85."""
    _check("angle_deg", angle_deg, abs(angle_deg) <= 85, "from -85 to 85 degrees for a crane")
    phi = np.radians(angle_deg) * _unit(num_frames)
    return _around(np.zeros(num_frames), -np.sin(phi), 1 - np.cos(phi), radius)


def spiral(num_frames: int, radius: float, angle_deg: float = 20.0, turns: float = 2.0) -> np.ndarray:
    """Return a spiral in the source's image plane that opens from 0 to a yaw of `angle_deg`, |angle| < 90."""
    _check("angle_deg", angle_deg, abs(angle_deg) < 90, "between -90 and 90 degrees for a spiral")
    u = _unit(num_frames)
    reach = np.tan(np.radians(angle_deg)) * u
    turn = 2 * np.pi * turns * u
    return _around(reach * np.cos(turn), -reach * np.sin(turn), np.zeros(num_frames), radius)


def dolly(num_frames: int, radius: float, distance: float = 0.5) -> np.ndarray:
    """Return a straight move by `distance` radii: forward, or back when negative."""
    _check("distance", distance, distance < 1, "below 1: the radius is where the scene begins")
    return _straight(radius * distance * _unit(num_frames)[:, None] * np.array([0.0, 0.0, 1.0]))


def static(num_frames: int, radius: float) -> np.ndarray:
    """Return the source camera for every frame."""
    return _straight(np.zeros((num_frames, 3)))


def zoom_poses(num_frames: int, radius: float, zoom: float = 2.0) -> np.ndarray:
    """Return the source camera for every frame: a zoom does not move it; `zoom_intrinsics` gives the focal lengths."""
    _check("zoom", zoom, np.isfinite(zoom) and zoom > 0, "finite and above 0")
    return static(num_frames, radius)


def custom(num_frames: int, radius: float, key_poses: np.ndarray) -> np.ndarray:
    """Return a smooth path through `key_poses`, w2c [N, 4, 4] with eyes in radii; the first becomes the source."""
    poses = relative_to_first(np.asarray(key_poses, np.float64))
    poses[:, :3, 3] *= radius
    return interpolate(poses, num_frames)


TRAJECTORIES: dict[str, Callable[..., np.ndarray]] = {
    "orbit": orbit,
    "full": full,
    "lateral": lateral,
    "left": left,
    "right": right,
    "dolly": dolly,
    "zoom": zoom_poses,
    "crane": crane,
    "arc": arc,
    "spiral": spiral,
    "static": static,
    "custom": custom,
    "released-180": released_180,
}


def build(
    name: str, num_frames: int, angle_deg: float | None = None, radius: float = 1.0, **options: Any
) -> np.ndarray:
    """Build w2c float64 [T, 4, 4] of the named path, which spans the given angle at any number of frames.

    Args:
        name: a key of TRAJECTORIES. A zoom's poses are static: give the renderer `zoom_intrinsics`.
        angle_deg: the extent of a path that turns; None: the path's default. A path without an angle ignores it.
        radius: distance of the point looked at, in the depth's unit (see `radius_of`).
        options: other arguments of the path's function (`distance`, `turns`, `zoom`, `key_poses`).

    Raises:
        ConfigError: unknown name or option, or a value outside what the path allows.
    """
    if name not in TRAJECTORIES:
        raise ConfigError("trajectory", name, f"allowed: {', '.join(TRAJECTORIES)}, or a pose file")
    _check("num_frames", num_frames, num_frames >= 1, "at least 1")
    _check("radius", radius, np.isfinite(radius) and radius > 0, "finite and above 0")
    function = TRAJECTORIES[name]
    allowed = [key for key in inspect.signature(function).parameters if key not in ("num_frames", "radius")]
    if angle_deg is not None and "angle_deg" in allowed:
        options["angle_deg"] = float(angle_deg)
    required = [
        key for key in allowed if inspect.signature(function).parameters[key].default is inspect.Parameter.empty
    ]
    for key in required:
        _check(
            key, options.get(key), key in options, f"{name} needs it; on the command line give a JSON file that has it"
        )
    for key, value in options.items():
        _check(key, value, key in allowed, f"{name} takes {', '.join(allowed) or 'no options'}")
        _check(key, value, key == "key_poses" or isinstance(value, int | float), "a number")
    return function(num_frames, float(radius), **options)


def has_angle(name: str) -> bool:
    """Return whether `angle_deg` changes a path; False for a name that is not one."""
    return name in TRAJECTORIES and "angle_deg" in inspect.signature(TRAJECTORIES[name]).parameters


def zoom_intrinsics(K: np.ndarray, num_frames: int, zoom: float = 2.0) -> np.ndarray:
    """Return K [T, 3, 3] px whose focal lengths grow geometrically from 1 to `zoom` times those of K [3, 3]."""
    _check("zoom", zoom, np.isfinite(zoom) and zoom > 0, "finite and above 0")
    scaled = np.tile(np.asarray(K, np.float64), (num_frames, 1, 1))
    scaled[:, [0, 1], [0, 1]] *= (zoom ** _unit(num_frames))[:, None]
    return scaled


def relative_to_first(w2c: np.ndarray) -> np.ndarray:
    """Return the path w2c [T, 4, 4] with its first camera, which becomes the identity, as the world."""
    return w2c @ np.linalg.inv(w2c[0])


def interpolate(key_poses: np.ndarray, num_frames: int) -> np.ndarray:
    """Interpolate w2c [T, 4, 4] through key poses [N, 4, 4], evenly spaced in time: cubic for eyes and rotations."""
    count = len(key_poses)
    if count == 1:
        return np.repeat(key_poses, num_frames, axis=0)
    c2w = np.linalg.inv(key_poses)
    times, at = np.arange(count, dtype=np.float64), np.linspace(0, count - 1, num_frames)
    eyes = CubicSpline(times, c2w[:, :3, 3])(at)
    rotation = RotationSpline(times, Rotation.from_matrix(c2w[:, :3, :3]))(at).as_matrix()
    return _w2c(rotation.transpose(0, 2, 1), eyes)


def _check(key: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise ConfigError(key, value, allowed)
