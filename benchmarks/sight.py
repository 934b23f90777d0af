"""Compute exactly what a camera sees of a synthetic scene's surfaces, and where points project to."""

from __future__ import annotations

import numpy as np

from ex4d.geometry.camera import Camera
from ex4d.synthetic import Scene, camera_rays
from ex4d.synthetic_bodies import Body


def to_world(body: Body, points: np.ndarray, time_s: float) -> np.ndarray:
    """Return body points [N,3] in world coordinates at a time."""
    return points @ body.rotation(time_s).T + body.position(time_s)


def visible_from(
    scene: Scene, source: Camera, time_s: float, camera: Camera, other_time_s: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (visible bool [H,W], uv float64 [H,W,2] px): whether another camera sees the surface of each source pixel.

    uv is where that surface point projects in the other picture; it is meaningless behind the camera.

    Args:
        source: rays start at its pixel centres; its size is that of the result.
        time_s: time of the source picture.
        camera: the other camera.
        other_time_s: time of the other picture; the surface points move with their bodies. None: the same time.
    """
    later = time_s if other_time_s is None else other_time_s
    _, index, local = scene.cast(*camera_rays(source, 1), time_s)
    world = np.empty_like(local)
    for number, body in enumerate(scene.bodies):
        chosen = index == number
        world[chosen] = to_world(body, local[chosen], later)
    inside = world @ camera.w2c[:3, :3].T + camera.w2c[:3, 3]
    in_front = inside[:, 2] > 1e-6
    uv = (inside / np.where(in_front, inside[:, 2], 1.0)[:, None]) @ camera.K.T
    height, width = camera.size
    in_frame = (uv[:, 0] >= 0) & (uv[:, 0] < width) & (uv[:, 1] >= 0) & (uv[:, 1] < height)
    eye = np.linalg.inv(camera.w2c)[:3, 3]
    reached, hit, _ = scene.cast(eye[None], world - eye, later)
    seen = in_front & in_frame & (np.abs(reached - 1.0) < 1e-6) & (hit == index)
    return seen.reshape(source.size), uv[:, :2].reshape(*source.size, 2)


def project(points: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Return (uv float64 [..., 2] in pixels, z float64 [...] along the camera's axis) of world points [..., 3].

    Points on or behind the camera's plane (z <= 0) get uv = NaN.
    """
    points = np.asarray(points, np.float64)
    local = points @ camera.w2c[:3, :3].T + camera.w2c[:3, 3]
    z = local[..., 2]
    safe = np.where(z > 0, z, np.nan)
    focal, centre = np.array([camera.K[0, 0], camera.K[1, 1]]), camera.K[:2, 2]
    return local[..., :2] / safe[..., None] * focal + centre, z
