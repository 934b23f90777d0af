"""Synthetic scenes, the ground truth of all other tests, are checked against independent computations."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sight import to_world, visible_from

from ex4d import synthetic, video
from ex4d.errors import ConfigError
from ex4d.geometry.camera import Camera, intrinsics, look_at
from ex4d.synthetic import Scene, SyntheticConfig, clip_scene, render_clip
from ex4d.synthetic_bodies import Body

SIZE = (48, 64)
SEEDS = range(6)


def clearance(body: Body, points: np.ndarray, time_s: float) -> np.ndarray:
    """Return how far world points [N,3] are from the solid, float64 [N]; negative inside (a room: outside)."""
    local = body.to_local(points, time_s)
    if body.kind == "sphere":
        return np.linalg.norm(local, axis=1) - body.half[0]
    outside = np.max(np.abs(local) - body.half, axis=1)
    return -outside if body.kind == "room" else outside


def orbit_eye(radius: float, angle_deg: float) -> np.ndarray:
    phi = np.radians(angle_deg)
    return np.array([radius * np.sin(phi), 0.2 * radius * (np.cos(phi) - 1), radius - radius * abs(np.cos(phi))])


def source(size: tuple[int, int] = SIZE) -> Camera:
    return Camera(K=intrinsics(size), w2c=np.eye(4), size=size)


def test_equal_seeds_give_equal_pixels_and_others_do_not():
    first, again, other = (Scene.random(seed).render(source(), 0.3) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert np.abs(first[0].astype(int) - other[0]).mean() > 5


@pytest.mark.parametrize("sky", [False, True])
def test_depth_is_finite_and_eyes_keep_out_of_solids_on_every_orbit(sky):
    for seed in range(20):
        scene = Scene.random(seed, sky=sky)
        depth = scene.render(source(), 0.0)[1]
        radius = 1.06 * float(np.percentile(depth, 1))
        eyes = np.stack([orbit_eye(radius, angle) for angle in range(-90, 91, 10)])
        for time_s in (0.0, 1.3, 4.1):
            least = min(float(clearance(body, eyes, time_s).min()) for body in scene.bodies)
            assert least > 0.05 * radius, (seed, time_s)
        for angle in (-90, 90):
            pose = look_at(orbit_eye(radius, angle), np.array([0, 0, radius]))
            z_depth = scene.render(Camera(intrinsics(SIZE), pose, SIZE), 1.0)[1]
            assert np.isfinite(z_depth).all()
            assert z_depth.min() > 0
        assert (depth.max() > 50 * scene.scale) == sky


def test_moving_source_cameras_keep_out_of_solids_and_start_at_the_origin():
    for seed in range(12):
        scene = Scene.random(seed)
        for motion in ("gentle", "strong"):
            cameras = scene.source_cameras(48, 8.0, SIZE, motion)
            np.testing.assert_allclose(cameras[0].w2c, np.eye(4), atol=1e-12)
            for number, camera in enumerate(cameras):
                assert min(float(clearance(body, camera.eye[None], number / 8.0)[0]) for body in scene.bodies) > 0


def test_static_cameras_do_not_move_and_unknown_motion_is_refused():
    scene = Scene.random(1)
    assert all(np.array_equal(camera.w2c, np.eye(4)) for camera in scene.source_cameras(5, motion="static"))
    with pytest.raises(ConfigError, match="gentle"):
        scene.source_cameras(5, motion="wild")


def test_ray_hits_lie_on_surfaces_and_nothing_is_in_front_of_them():
    """Marching along the ray is the slow twin of the closed-form intersections."""
    rng = np.random.default_rng(0)
    for seed in SEEDS:
        scene = Scene.random(seed)
        directions = rng.normal(size=(200, 3))
        distance, index, local = scene.cast(np.zeros((1, 3)), directions, 0.7)
        points = distance[:, None] * directions
        clearances = np.stack([clearance(body, points, 0.7) for body in scene.bodies])
        assert np.abs(clearances[index, np.arange(200)]).max() < 1e-9
        for share in np.linspace(0.02, 0.98, 49):
            steps = np.stack([clearance(body, points * share, 0.7) for body in scene.bodies])
            assert steps.min() > -1e-9
        world = np.stack([to_world(scene.bodies[i], p[None], 0.7)[0] for i, p in zip(index, local, strict=True)])
        np.testing.assert_allclose(world, points, atol=1e-9)


def test_correspondences_carry_colour_between_views():
    """Where the other camera truly sees a point, both pictures show the same colour there."""
    for seed in SEEDS:
        scene = Scene.random(seed, max_frequency=3.0)
        size = (96, 96)
        depth = scene.render(source(size), 0.4)[1]
        radius = 1.06 * float(np.percentile(depth, 1))
        other = Camera(intrinsics(size), look_at(orbit_eye(radius, 40), np.array([0, 0, radius])), size)
        frame = scene.render(source(size), 0.4)[0].astype(float)
        novel = scene.render(other, 0.4)[0].astype(float)
        visible, uv = visible_from(scene, source(size), 0.4, other)
        assert 0.2 < visible.mean() < 0.98
        column, row = (np.clip(np.floor(uv[..., axis]), 0, 95).astype(int) for axis in (0, 1))
        error = np.abs(novel[row, column] - frame).mean(axis=-1)
        assert np.median(error[visible]) < 4
        assert np.median(error[visible]) < 0.3 * np.median(error[~visible])


def test_a_point_sees_itself_and_motion_is_followed():
    scene = Scene.random(3)
    visible, uv = visible_from(scene, source(), 0.5, source())
    assert visible.all()
    grid = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(48) + 0.5), axis=-1)
    np.testing.assert_allclose(uv, grid, atol=1e-9)
    _, later = visible_from(scene, source(), 0.5, source(), other_time_s=1.0)
    moved = np.linalg.norm(later - grid, axis=-1)
    assert moved.max() > 1
    assert np.median(moved) < 1e-9  # the room stays where it is


def test_textures_keep_to_their_band():
    """A wall seen straight on has no energy above the stated frequency."""
    scene = Scene.random(2, max_frequency=6.0)
    size = (128, 128)
    for body_number, body in enumerate(scene.bodies):
        waves = scene.textures.waves[6 * body_number : 6 * body_number + 6]
        cycles_per_unit = np.linalg.norm(waves, axis=-1) / (2 * np.pi)
        distance = 3 * scene.scale if body.kind == "room" else max(np.linalg.norm(body.centre), 0.5 * scene.scale)
        per_height = cycles_per_unit * distance / (intrinsics(size)[1, 1] / size[0])
        assert per_height.max() <= 6.0 * 1.001


def test_supersampling_converges_and_leaves_depth_alone():
    scene = Scene.random(4)
    once, twice, thrice, much = (scene.render(source(), 0.0, n) for n in (1, 2, 3, 8))
    errors = [np.abs(view[0].astype(float) - much[0]).mean() for view in (once, twice, thrice)]
    assert errors[0] > errors[1] > errors[2]
    np.testing.assert_array_equal(once[1], twice[1])
    np.testing.assert_allclose(once[1], thrice[1], rtol=1e-6)


def test_a_clip_renders_fast():
    scene, cameras = clip_scene(SyntheticConfig(num_frames=9), 0)
    render_clip(scene, cameras, 8.0)
    elapsed = []
    for _ in range(3):
        start = time.process_time()
        render_clip(scene, cameras, 8.0)
        elapsed.append(time.process_time() - start)
    assert min(elapsed) < 0.3  # measured 0.05 s


def test_corpus_is_deterministic_idempotent_and_exact(tmp_path):
    config = SyntheticConfig(num_videos=2, num_frames=5, size=(32, 48), seed=3, supersample=1)
    paths = synthetic.write_corpus(tmp_path / "a", config)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 6
    before = {path: path.stat().st_mtime_ns for path in paths}
    assert synthetic.write_corpus(tmp_path / "a", config) == paths
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    synthetic.write_corpus(tmp_path / "b", config)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    scene, cameras = clip_scene(config, 1)
    frames, z_depth = render_clip(scene, cameras, config.fps)
    with np.load(paths[1].with_suffix(".depth.npz"), allow_pickle=False) as sidecar:
        np.testing.assert_array_equal(sidecar["z_depth"], z_depth)
        np.testing.assert_array_equal(sidecar["K"], cameras[0].K)
        np.testing.assert_array_equal(sidecar["w2c"], np.stack([camera.w2c for camera in cameras]))
    decoded, fps = video.read(paths[1])
    assert decoded.shape == frames.shape
    assert fps == config.fps
    assert np.abs(decoded.astype(float) - frames).mean() < 8  # 4:2:0 chroma at 48 px
    assert paths[1].with_suffix(".txt").read_text().startswith("a")
