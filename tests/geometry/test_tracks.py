"""Optical flow and tracks against the true motion of synthetic clips."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.errors import BadSample
from ex4d.geometry import tracks
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip, visible_from

SIZE = (96, 96)


def texture(seed: int = 0, size: int = 160) -> np.ndarray:
    import cv2

    noise = np.random.default_rng(seed).uniform(0, 255, (size, size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


def grid(step: int = 6) -> np.ndarray:
    y, x = np.mgrid[step // 2 : SIZE[0] : step, step // 2 : SIZE[1] : step] + 0.5
    return np.stack([x.ravel(), y.ravel()], axis=1)


def shifted(num_frames: int = 6) -> np.ndarray:
    picture = texture()
    return np.stack([picture[20 : 20 + SIZE[0], 40 - 3 * t : 40 - 3 * t + SIZE[1]] for t in range(num_frames)])


def test_a_shift_is_followed_until_it_leaves_the_picture():
    xy, visible = tracks.track(shifted(), grid())
    truth = grid()[None] + np.arange(6)[:, None, None] * np.array([3.0, 0])
    inside = truth[..., 0] < SIZE[1]
    error = np.linalg.norm(xy - truth, axis=-1)
    assert (error[visible] < 1).mean() > 0.98
    assert not visible[~inside].any()
    assert visible[inside & (truth[..., 0] < SIZE[1] - 6)].mean() > 0.95
    assert visible[0].all()


@pytest.mark.parametrize("moving_bodies", [False, True])
def test_tracks_follow_the_true_motion(moving_bodies: bool):
    close, kept, covered = [], [], []
    for seed in range(3):
        config = SyntheticConfig(num_frames=9, size=SIZE, seed=seed, moving_bodies=moving_bodies, max_frequency=12.0)
        scene, cameras = clip_scene(config, 0)
        frames, _ = render_clip(scene, cameras, 8.0, supersample=2)
        points = grid(4)
        xy, visible = tracks.track(frames, points)
        for t in range(1, 9):
            seen, uv = visible_from(scene, cameras[0], 0.0, cameras[t], t / 8.0)
            row, column = points[:, 1].astype(int), points[:, 0].astype(int)
            error = np.linalg.norm(xy[t] - uv[row, column], axis=1)
            close.append((error < 2)[visible[t]])
            kept.append(visible[t][seen[row, column]])
            covered.append(visible[t][~seen[row, column]])
    assert np.concatenate(close).mean() >= 0.95
    assert np.concatenate(kept).mean() >= 0.5
    assert np.concatenate(covered).mean() <= 0.1


def test_wide_pairs_are_chained():
    frames = shifted(5)
    flows = tracks.pair_flows(frames, gaps=(1, 2, 4))
    assert set(flows) >= {(0, 1), (1, 0), (0, 2), (4, 2), (0, 4), (4, 0)}
    error = np.abs(flows[0, 4][:, : SIZE[1] - 20] - [12, 0]).max(axis=-1)
    assert np.median(error) < 0.3


def test_consistency_is_infinite_outside():
    flow = np.zeros((20, 20, 2), np.float32)
    flow[:, 10:, 0] = 15
    error = tracks.consistency(flow, np.zeros_like(flow))
    assert np.isinf(error[:, 10:]).all()
    assert (error[:, :10] == 0).all()


def test_pictures_without_texture_keep_their_points_where_they_are():
    xy, visible = tracks.track(np.full((3, *SIZE, 3), 128, np.uint8), grid())
    np.testing.assert_array_equal(xy, np.tile(grid().astype(np.float32), (3, 1, 1)))
    assert visible.all()


def test_points_outside_are_not_visible_and_two_runs_are_equal():
    points = np.concatenate([grid(), [[-5, 3], [200, 3]]])
    first, second = tracks.track(shifted(4), points), tracks.track(shifted(4), points)
    assert not first[1][:, -2:].any()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))


def test_tiny_pictures_are_refused():
    with pytest.raises(BadSample, match="flow_size"):
        tracks.pair_flows(np.zeros((2, 8, 40, 3), np.uint8))
