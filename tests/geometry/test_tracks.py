"""Optical flow and tracks against the true motion of synthetic clips."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sight import visible_from

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry import cotracker, masks, tracks
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

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


# The interface of CoTrackerPredictor: video [B, T, 3, H, W] of 0 … 255, queries [B, N, (frame, x, y)]
# with pixel centres at integers → tracks [B, T, N, 2], visibilities [B, T, N]. This one moves points evenly.
STAND_IN = """
import torch

class CoTrackerPredictor(torch.nn.Module):
    def __init__(self, checkpoint="", offline=True, window_len=60):
        super().__init__()
        assert checkpoint is None and offline and window_len == 60
        self.model = torch.nn.Module()
        self.model.step = torch.nn.Parameter(torch.zeros(2))

    def forward(self, video, queries=None):
        assert video.ndim == 5 and video.shape[2] == 3 and video.max() > 1 and (queries[..., 0] == 0).all()
        times = torch.arange(video.shape[1])[None, :, None, None]
        tracks = queries[:, None, :, 1:] + times * self.model.step
        return tracks, torch.ones(tracks.shape[:3], dtype=torch.bool)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `cotracker.FETCH` describes it."""
    (tmp_path / "cotracker").mkdir()
    (tmp_path / "cotracker" / "__init__.py").write_text("")
    (tmp_path / "cotracker" / "predictor.py").write_text(STAND_IN)
    (tmp_path / "checkpoints").mkdir()
    torch.save({"model": {"step": torch.tensor([3.0, 0.0])}}, tmp_path / "checkpoints" / cotracker.CHECKPOINT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("cotracker", "cotracker.predictor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    cotracker._predictor.cache_clear()
    yield tmp_path
    for name in ("cotracker", "cotracker.predictor"):
        sys.modules.pop(name, None)
    cotracker._predictor.cache_clear()


def test_cotracker_speaks_our_coordinates_and_says_its_licence(checkout: Path, caplog: pytest.LogCaptureFixture):
    frames = shifted()
    for _ in range(2):
        xy, visible = tracks.track(frames, grid(), method="cotracker3", folder=str(checkout))
    truth = grid()[None] + np.arange(6)[:, None, None] * np.array([3.0, 0])
    np.testing.assert_allclose(xy, truth, atol=1e-4)
    np.testing.assert_array_equal(visible, truth[..., 0] < SIZE[1])
    assert caplog.text.count("not for commercial use") <= 1  # once a process
    config = masks.MaskConfig(2, 0, 1, 0, tracker="cotracker3", tracker_path=str(checkout), generation=())
    drawn = masks.draw(frames, np.full(frames.shape[:3], 2.0, np.float32), np.diag([96.0, 96, 1]), config, 0)
    assert "tracking" in {masks.KINDS[kind] for kind in drawn.kind}


def test_what_cotracker_lacks_is_said(checkout: Path, tmp_path_factory: pytest.TempPathFactory):
    for folder in (None, str(tmp_path_factory.mktemp("empty"))):
        with pytest.raises(ConfigError, match="git clone"):
            tracks.track(shifted(2), grid(), method="cotracker3", folder=folder)
    file = checkout / "checkpoints" / cotracker.CHECKPOINT
    file.write_bytes(pickle.dumps(print, protocol=2))  # a pickle that would run code is not loaded
    with pytest.raises(ConfigError, match="weights of CoTracker3"):
        tracks.track(shifted(2), grid(), method="cotracker3", folder=str(checkout))
    torch.save({"other": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match="weights of CoTracker3"):
        tracks.track(shifted(2), grid(), method="cotracker3", folder=str(checkout))
    with pytest.raises(ConfigError, match=r"masks\.tracker"):
        tracks.track(shifted(2), grid(), method="raft")
