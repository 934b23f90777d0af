"""The compiled visibility rule, compared with the same rule in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.geometry import trajectory
from ex4d.geometry.camera import Camera, intrinsics, pixel_rays
from ex4d.geometry.mask_scene import Scene
from ex4d.geometry.mesh import PROFILES, angle_threshold_deg, build, occlusion_flags
from ex4d.geometry.render import cpu, render
from ex4d.geometry.visibility import landing, visibility
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip


def land_slowly(z_depth: np.ndarray, K: np.ndarray, w2c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    points = (pixel_rays(z_depth.shape, K) * z_depth[..., None]) @ w2c[:3, :3].T + w2c[:3, 3]
    z = points[..., 2]
    ahead = z > 1e-9
    safe = np.where(ahead, z, np.inf)
    u = np.where(ahead, points[..., 0] / safe * K[0, 0] + K[0, 2], -1)
    v = np.where(ahead, points[..., 1] / safe * K[1, 1] + K[1, 2], -1)
    return u, v, z


def has_good_face(z_depth: np.ndarray, mesh, u: np.ndarray, v: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    bad = occlusion_flags(z_depth, mesh.K, np.radians(angle_threshold_deg(mesh.K[0, 0], mesh.profile)))
    corner, right, down, diagonal = np.s_[:-1, :-1], np.s_[:-1, 1:], np.s_[1:, :-1], np.s_[1:, 1:]

    def winding(a: tuple, b: tuple, c: tuple) -> np.ndarray:
        area = (u[b] - u[a]) * (v[c] - v[a]) - (u[c] - u[a]) * (v[b] - v[a])
        return (area > 0) & ahead[a] & ahead[b] & ahead[c]

    first, second = ~bad[0] & winding(corner, right, down), ~bad[1] & winding(diagonal, down, right)
    good = np.zeros(mesh.size, bool)
    good[corner] |= first
    good[down] |= first | second
    good[right] |= first | second
    good[diagonal] |= second
    return good


def seen_slowly(z_depth: np.ndarray, mesh, w2c: np.ndarray, tolerance: float = 0.02) -> np.ndarray:
    height, width = mesh.size
    u, v, z = land_slowly(z_depth, mesh.K, w2c)
    inside = (z > 1e-9) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    farthest = np.pad(render(mesh, Camera(mesh.K, w2c, mesh.size), backend="cpu").z_depth, 1, mode="edge")
    farthest = np.maximum(farthest[:-1], farthest[1:])
    farthest = np.maximum(farthest[:, :-1], farthest[:, 1:])  # [i, j]: the four pixels around the corner (j, i)
    row = np.clip(v + 0.5, 0, height).astype(int)
    column = np.clip(u + 0.5, 0, width).astype(int)
    behind = z > farthest[row, column] * (1 + tolerance)
    return inside & ~behind & has_good_face(z_depth, mesh, u, v, z > 1e-9)


@pytest.mark.parametrize("index", range(3))
def test_the_compiled_rule_is_the_one_in_numpy(index):
    scene, cameras = clip_scene(SyntheticConfig(num_frames=2, size=(72, 96), supersample=1), index)
    frames, depths = render_clip(scene, cameras, 8.0, 1)
    mesh = build(frames[0], depths[0], cameras[0].K)
    for name, angle_deg in (("orbit", 5.0), ("orbit", 40.0), ("orbit", 90.0), ("dolly", None), ("crane", None)):
        w2c = trajectory.build(name, 5, angle_deg=angle_deg, radius=trajectory.radius_of(depths[0]))[-1]
        fast, slow = visibility(depths[0], mesh, w2c), seen_slowly(depths[0], mesh, w2c)
        assert (fast != slow).mean() <= 1e-4  # sums in another order may round a point over an edge
        assert 0 < fast.mean() < 1
        for ours, theirs in zip(landing(depths[0], mesh.K, w2c), land_slowly(depths[0], mesh.K, w2c), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(720, 1280), (721, 1280), (511, 512), (385, 600), (512, 511)])
def test_a_smaller_shadow_map_leaves_no_row_and_no_column_out(size):
    """Sides that are not multiples of its step are rounded separately."""
    z_depth, K = np.full((1, *size), 3.0, np.float32), intrinsics(size)
    scene = Scene(np.zeros((1, *size, 3), np.uint8), z_depth, K)
    assert scene.view(0, np.eye(4)[None], "visibility", 0.02).all()


def test_depth_alone_is_the_depth_of_the_whole_picture():
    scene, cameras = clip_scene(SyntheticConfig(num_frames=2, size=(72, 96), supersample=1), 0)
    frames, depths = render_clip(scene, cameras, 8.0, 1)
    w2c = trajectory.build("orbit", 5, angle_deg=70.0, radius=trajectory.radius_of(depths[0]))[-1]
    for profile in PROFILES:
        mesh = build(frames[0], depths[0], cameras[0].K, profile)
        camera = Camera(mesh.K, w2c, mesh.size)
        np.testing.assert_array_equal(cpu.render_depth(mesh, camera), cpu.render(mesh, camera).z_depth)
