"""Cameras and depth from parallax for clips that mostly rotate: near and far are never swapped."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from sight import visible_from

from ex4d import video
from ex4d.depth import DepthRequest, bundle, cameras, estimate, moving, parallax
from ex4d.errors import Filtered
from ex4d.geometry.camera import Camera, intrinsics, invert
from ex4d.synthetic import Scene, SyntheticConfig, clip_scene, render_clip

SIZE = (96, 128)
FOV_DEG = 57.4


def turning_clip(seed: int, num_frames: int = 9, moving_bodies: bool = False):
    """Return (scene, cameras) of a hand-held shot: 30° of turn, and a shift of a tenth of the scene's depth."""
    scene = Scene.random((900, seed), 6.0, moving_bodies)
    side, K = np.random.default_rng([900, seed]).choice([-1, 1]), intrinsics(SIZE, FOV_DEG)
    path = []
    for share in np.linspace(0, 1, num_frames):
        c2w = np.eye(4)
        turn = [side * 30 * (share - 0.5), 5 * share - 2.5, 8 * share - 4]
        c2w[:3, :3] = Rotation.from_euler("yxz", turn, degrees=True).as_matrix()
        c2w[:3, 3] = scene.scale * share * np.array([0.065 * side, 0.012, -0.07])
        path.append(Camera(K, invert(c2w), SIZE))
    return scene, path


def outcome(frames: np.ndarray, truth: np.ndarray, request: DepthRequest | None = None) -> float | None:
    """Return the correlation of 1/z with the truth; None if the clip is rejected."""
    try:
        values = estimate("parallax", frames, request or DepthRequest()).values
    except Filtered:
        return None
    known = truth > 0
    return float(np.corrcoef(1 / values[known], 1 / truth[known])[0, 1])


def check_none_inverted(found: list[float | None], accepted: int) -> None:
    kept = [value for value in found if value is not None]
    print(f"accepted {len(kept)} of {len(found)}, least correlation {min(kept):.2f}")
    assert min(kept) > 0.4
    assert len(kept) >= accepted


def test_clips_that_mostly_turn_are_not_turned_inside_out():
    check_none_inverted([outcome(*render_clip(*turning_clip(seed, 5), 8.0)) for seed in range(2)], 1)


@pytest.mark.heavy
def test_twenty_clips_that_mostly_turn():
    check_none_inverted([outcome(*render_clip(*turning_clip(seed), 8.0, 2)) for seed in range(20)], 14)


@pytest.mark.heavy
def test_eighteen_encodes_of_a_real_shot(media, tmp_path):
    import cv2

    folder = media / "found_in_use" / "kitchen_turned_inside_out"
    frames, fps = video.read(folder / "inverted.mp4")
    stored = np.load(folder / "truth_with_holes.npz")["z_depth"].astype(np.float32)
    truth = np.stack([cv2.resize(z, (320, 240), interpolation=cv2.INTER_NEAREST) for z in stored])
    found = []
    for crf in range(12, 21):
        for step in (2, 3):
            video.write(tmp_path / "clip.mp4", frames[::step], fps / step, crf=crf)
            found.append(outcome(video.read(tmp_path / "clip.mp4")[0], truth[::step]))
    check_none_inverted(found, 12)


def exact_matches(scene: Scene, path: list[Camera], step: int = 8) -> bundle.Matches:
    """Return the true correspondences of a grid of points, between frames 1 and 2 apart."""
    height, width = SIZE
    cut = (slice(step // 2, None, step), slice(step // 2, None, step))
    grid = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)[cut].reshape(-1, 2)
    pairs = [(i, j) for i in range(len(path)) for j in range(len(path)) if 0 < abs(i - j) <= 2]
    seen = [visible_from(scene, path[i], 0.0, path[j]) for i, j in pairs]
    centre = (width / 2, height / 2)
    targets = np.stack([uv[cut].reshape(-1, 2) - centre for _, uv in seen])
    weights = np.stack([visible[cut].ravel().astype(float) for visible, _ in seen])
    return bundle.Matches(np.tile(grid - centre, (len(path), 1, 1)), np.array(pairs), targets, weights)


def test_exact_flow_gives_exact_cameras_and_the_lens():
    scene, path = turning_clip(1, 5)
    found = cameras.find(exact_matches(scene, path), SIZE)
    truth = np.stack([camera.w2c for camera in path]) @ path[0].c2w
    np.testing.assert_allclose(found.bundle.focal, path[0].K[0, 0], rtol=1e-3)
    np.testing.assert_allclose(found.bundle.w2c[:, :3, :3], truth[:, :3, :3], atol=1e-3)
    shifts = found.bundle.w2c[1:, :3, 3]
    np.testing.assert_allclose(
        shifts / np.linalg.norm(shifts), truth[1:, :3, 3] / np.linalg.norm(truth[1:, :3, 3]), atol=0.01
    )
    assert found.bundle.residual_px < 0.01
    assert found.certainty > 2


def test_a_field_of_view_that_is_known_is_taken():
    scene, path = turning_clip(1, 5)
    frames, _ = render_clip(scene, path, 8.0)
    result = estimate("parallax", frames, DepthRequest(fov_deg=70.0))
    np.testing.assert_allclose(result.K, intrinsics(SIZE, 70.0))
    sought = estimate("parallax", frames, DepthRequest())
    assert abs(sought.provenance["fov_deg"] - FOV_DEG) < 6


def test_cameras_come_with_the_depth_in_its_unit():
    config = SyntheticConfig(num_frames=9, size=(96, 96), seed=2, moving_bodies=False)
    scene, path = clip_scene(config, 0)
    frames, truth = render_clip(scene, path, 8.0)
    result = estimate("parallax", frames, DepthRequest())
    assert result.w2c.shape == (9, 4, 4)
    np.testing.assert_allclose(result.w2c[0], np.eye(4), atol=1e-9)
    scale = np.median(truth) / np.median(result.values)
    moved = np.linalg.norm(invert(result.w2c)[-1, :3, 3]) * scale
    assert 0.7 < moved / np.linalg.norm(path[-1].eye - path[0].eye) < 1.4


def followed(num_frames: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Return (frames, body bool [T, H, W]): a camera slides past a wall, after a figure whose limbs move."""
    rng = np.random.default_rng(4)
    import cv2

    wall = cv2.GaussianBlur(rng.integers(0, 256, (96, 400, 3), np.uint8), (0, 0), 1.5) * 1.0
    wall = np.clip((wall - wall.mean()) * 4 + 120, 0, 255).astype(np.uint8)
    rows = np.arange(96)[:, None]
    floor = np.clip(rows - 48, 0, None) / 48  # inverse depth grows from the wall's 1 to the floor's 3
    figure = np.roll(wall[:, 100:140], 30, axis=0)[20:80]
    frames, bodies = [], []
    for t in range(num_frames):
        shift = (20 + 2.0 * t * (1 + 2 * floor) + np.arange(128)[None]).astype(np.float32)
        picture = cv2.remap(wall, shift, np.broadcast_to(rows, shift.shape).astype(np.float32), cv2.INTER_LINEAR)
        body = np.zeros((96, 128), bool)
        body[20:80, 50:86] = True
        wobble = np.arange(36)[None] + 2 + 2 * np.sin(np.arange(60)[:, None] / 5 + 1.6 * t)
        up = np.arange(60)[:, None] + 1.5 * np.sin(np.arange(36)[None] / 4 + 2.1 * t)
        drawn = cv2.remap(figure, wobble.astype(np.float32), up.astype(np.float32), cv2.INTER_LINEAR)
        picture[20:80, 50:86] = drawn
        frames.append(picture)
        bodies.append(body)
    return np.stack(frames), np.stack(bodies)


def test_a_subject_that_the_camera_follows_stands_before_the_wall():
    frames, body = followed()
    result = estimate("parallax", frames, DepthRequest())
    inner = body[:, 26:74, 56:80]
    assert result.dynamic_mask[:, 26:74, 56:80][inner].mean() > 0.9
    assert result.dynamic_mask[~body].mean() < 0.1
    wall = np.median(1 / result.values[:, 22:40, 95:120])
    floor = np.median(1 / result.values[:, 76:84, 95:120])
    placed = np.median(1 / result.values[body])
    assert wall < placed < 1.5 * floor


def test_most_of_the_picture_moving_is_refused():
    inverse, residual = np.ones((2, 40, 40), np.float32), np.zeros((2, 40, 40), np.float32)
    inverse[:, :, :30], residual[:, :, :30] = 2, 9
    flows = {pair: np.zeros((40, 40, 2), np.float32) for pair in ((0, 1), (1, 0))}
    weights = {pair: np.ones((40, 40), np.float32) for pair in flows}
    with pytest.raises(Filtered, match="parallax_moving"):
        moving.find(inverse, residual, flows, weights)


@pytest.mark.parametrize(("parallax_says", "placed"), [(0.1, 1.0), (1.6, 1.6), (9.0, 2.0)])
def test_a_body_stands_where_it_stands_or_hangs_before_that(parallax_says: float, placed: float):
    inverse, mask = np.ones((1, 40, 40), np.float32), np.zeros((1, 40, 40), bool)
    mask[0, 10:25, 12:24] = True
    inverse[mask] = parallax_says
    found = moving.place(inverse, mask)
    np.testing.assert_allclose(found[mask], placed, rtol=1e-6)
    np.testing.assert_array_equal(found[~mask], 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_gaps_without_evidence_are_filled_with_depths_that_are_there(seed: int):
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.5, 2.0, (240, 320)).astype(np.float32)
    weights = np.zeros_like(values)
    weights[:40, :40] = rng.uniform(1e3, 1e9, (40, 40))
    filled = parallax._fill(values, weights)
    assert 0.4 < filled.min() <= filled.max() < 2.1


def turning_past_bodies(seed: int, size: int = 96, moving_bodies: bool = True) -> np.ndarray:
    """Return frames of a camera that turns by 6 to 24 degrees about its centre, in a scene of the synthetic corpus."""
    config = SyntheticConfig(num_frames=9, size=(size, size), seed=seed, moving_bodies=moving_bodies)
    scene, path = clip_scene(config, 0)
    rng, poses = np.random.default_rng([5, seed]), []
    total = rng.uniform(6, 24) * rng.choice([-1, 1])
    for share in np.linspace(0, 1, 9):
        w2c = np.eye(4)
        angles = [total * share, 4 * np.sin(3 * share), 3 * share]
        w2c[:3, :3] = Rotation.from_euler("yxz", angles, degrees=True).as_matrix()
        poses.append(Camera(path[0].K, w2c, (size, size)))
    return render_clip(scene, poses, 8.0)[0]


def accepted_shift(frames: np.ndarray) -> float | None:
    """Return the estimated shift of the camera, in median depths; None if the clip is rejected."""
    try:
        return float(np.linalg.norm(invert(estimate("parallax", frames, DepthRequest()).w2c)[:, :3, 3], axis=1).max())
    except Filtered:
        return None


@pytest.mark.parametrize("seed", [1, 3])
def test_a_camera_that_turns_past_moving_bodies_is_given_no_translation(seed: int):
    with pytest.raises(Filtered, match="no_parallax"):
        estimate("parallax", turning_past_bodies(seed), DepthRequest())


@pytest.mark.heavy
@pytest.mark.parametrize("moving_bodies", [False, True])
def test_static_and_turning_cameras_are_given_no_translation_in_twenty_tries(moving_bodies: bool):
    for seed in range(20):
        config = SyntheticConfig(
            num_frames=9, size=(128, 128), seed=seed, moving_bodies=moving_bodies, camera_motion="static"
        )
        still = render_clip(*clip_scene(config, 0), 8.0)[0]
        for frames in (still, turning_past_bodies(seed, 128, moving_bodies)):
            shift = accepted_shift(frames)
            assert shift is None or shift <= 0.01


@pytest.mark.heavy
@pytest.mark.parametrize(("motion", "most_refused"), [("gentle", 10), ("strong", 4)])
def test_cameras_that_move_past_moving_bodies_are_found(motion: str, most_refused: int):
    refused = 0
    for seed in range(20):
        config = SyntheticConfig(num_frames=9, size=(128, 128), seed=seed, camera_motion=motion)
        refused += accepted_shift(render_clip(*clip_scene(config, 0), 8.0)[0]) is None
    print(f"{motion}: {refused} of 20 refused")
    assert refused <= most_refused
