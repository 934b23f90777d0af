"""The nvdiffrast backend: its code on an emulated rasteriser, and on the real one if there is a GPU."""

from __future__ import annotations

import importlib.util

import numpy as np
import nvdiffrast_on_cpu
import pytest
from geometry_scenes import random_camera, random_scene

from ex4d.geometry.camera import Camera, intrinsics, look_at
from ex4d.geometry.mesh import PROFILES, build
from ex4d.geometry.render import cpu, nvdiffrast, render, warp_video

SIZE = (40, 56)


@pytest.fixture
def emulated(monkeypatch):
    """nvdiffrast's functions on the CPU, and tensors that stay there when moved to the GPU."""
    import torch

    monkeypatch.setattr(nvdiffrast, "_context", lambda: (nvdiffrast_on_cpu, None))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *_: tensor)


def scene(seed: int, profile: str, size: tuple[int, int] = SIZE):
    return build(*random_scene(seed, size), intrinsics(size), profile), random_camera(seed, size)


def parity(mesh, camera) -> tuple[float, float, float]:
    """Return the shares of pixels of equal visibility, of common pixels within 2 levels, of depth within 1 %."""
    ours, theirs = cpu.render(mesh, camera), nvdiffrast.render(mesh, camera)
    both = ours.visible_mask & theirs.visible_mask
    close = (np.abs(ours.colour.astype(int) - theirs.colour) <= 2).all(-1)
    depth = np.isclose(ours.z_depth, theirs.z_depth, rtol=0.01)
    assert (theirs.colour[~theirs.visible_mask] == 0).all()
    assert (np.isinf(theirs.z_depth) == (theirs.face_id < 0)).all()
    return (ours.visible_mask == theirs.visible_mask).mean(), close[both].mean(), depth.mean()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_backend_agrees_with_cpu_but_for_snapping(emulated, profile):
    visible, colour, depth = parity(*scene(1, profile))
    assert visible >= 0.985
    assert colour >= 0.985
    assert depth >= 0.975


@pytest.mark.heavy
def test_parity_over_scenes(emulated):
    """The figures of docs/decisions/masks_depth.md."""
    shares = {profile: np.array([parity(*scene(seed, profile, (96, 96))) for seed in range(3)]) for profile in PROFILES}
    for profile, values in shares.items():
        print(profile, *(f"{value:.4f}" for value in values.mean(0)), *(f"{value:.4f}" for value in values.min(0)))
        assert values[:, 0].mean() >= 0.997
        assert values[:, 1].mean() >= 0.998


def test_across_the_near_plane_and_through_a_lens(emulated):
    mesh, _ = scene(3, "closed")
    camera = Camera(intrinsics(SIZE), look_at([2.5, 0, 2.5], [0, 0.3, 2.5]), SIZE)
    local = mesh.vertices @ camera.w2c[:3, :3].T + camera.w2c[:3, 3]
    assert (local[:, 2] < 0).any()
    visible, _, depth = parity(mesh, camera)
    assert visible >= 0.985
    assert depth >= 0.97
    zoomed = intrinsics(SIZE) * np.array([[3, 1, 1], [1, 3, 1], [1, 1, 1]])
    visible, colour, _ = parity(mesh, Camera(zoomed, random_camera(3, SIZE).w2c, SIZE))
    assert visible >= 0.99
    assert colour >= 0.99


def test_a_trajectory_in_batches_equals_its_frames(emulated, monkeypatch):
    frames, depths = (np.stack(parts) for parts in zip(*(random_scene(seed, SIZE) for seed in range(3)), strict=True))
    K = intrinsics(SIZE)
    w2c = np.stack([random_camera(seed, SIZE).w2c for seed in range(3)])
    view_K = np.stack([K, K, K * np.array([[1.5, 1, 1], [1, 1.5, 1], [1, 1, 1]])])
    monkeypatch.setattr(nvdiffrast, "BATCH_VERTICES", 2 * SIZE[0] * SIZE[1])
    cond_video, visible = warp_video(frames, depths, K, w2c, "default", "nvdiffrast", view_K=view_K)
    for t in range(3):
        single = nvdiffrast.render(build(frames[t], depths[t], K), Camera(view_K[t], w2c[t], SIZE))
        np.testing.assert_array_equal(cond_video[t], single.colour)
        np.testing.assert_array_equal(visible[t], single.visible_mask)


def test_depth_far_away_is_told_apart():
    """50 and 50.01 times the nearest depth, seen from beside it: integers that differ, as the contract's near plane's
    would not."""
    depth = np.full(SIZE, 60.0, np.float32)
    depth[2:6, 2:6] = 1.0
    mesh = build(np.zeros((*SIZE, 3), np.uint8), depth, intrinsics(SIZE), "closed")
    camera = Camera(intrinsics(SIZE), look_at([0.2, 0.05, 0.1], [0.2, 0, 10]), SIZE)
    steps = {}
    local = mesh.vertices @ camera.w2c[:3, :3].T + camera.w2c[:3, 3]
    for name, near in (("own", nvdiffrast._near(mesh, local)), ("contract", 1e-3)):
        points = np.array([[0, 0, 50, 1], [0, 0, 50.01, 1]]) @ nvdiffrast._clip_matrix(camera, near).T
        clip = points.astype(np.float32)
        scale, middle = (np.float32(nvdiffrast_on_cpu.MOST + sign * nvdiffrast_on_cpu.LEAST) / 2 for sign in (-1, 1))
        nearer, farther = clip[:, 2] * scale * (np.float32(1) / clip[:, 3]) + middle
        steps[name] = int(farther) - int(nearer)
    assert steps["own"] > 1000
    assert steps["contract"] <= 512


def test_on_a_real_gpu():
    """Parity of the true rasteriser: visibility on 99.7 % of the pixels, colour within 2 levels on 99.8 % of common."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if importlib.util.find_spec("nvdiffrast") is None:
        pytest.skip("needs nvdiffrast, which is not on the package index")
    for profile in PROFILES:
        for seed in range(3):
            visible, colour, _ = parity(*scene(seed, profile, (512, 512)))
            assert visible >= 0.997
            assert colour >= 0.998
    frames, depths = (np.stack(parts) for parts in zip(*(random_scene(seed, SIZE) for seed in range(3)), strict=True))
    w2c = np.stack([random_camera(seed, SIZE).w2c for seed in range(3)])
    batched, _ = warp_video(frames, depths, intrinsics(SIZE), w2c, backend="nvdiffrast")
    for t in range(3):
        mesh = build(frames[t], depths[t], intrinsics(SIZE))
        np.testing.assert_array_equal(batched[t], render(mesh, Camera(mesh.K, w2c[t], SIZE), "nvdiffrast").colour)
