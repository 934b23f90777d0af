"""Warps are compared with pictures that the new camera really sees."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import warp

from ex4d.evaluate.metrics import psnr
from ex4d.geometry import trajectory_files
from ex4d.geometry.camera import Camera, relative_to
from ex4d.geometry.mesh import build
from ex4d.geometry.render import render

# benchmarks/results/warp_truth.md holds the figures of more scenes at 256² and 512².
LEAST_PSNR_DB = {30.0: 28.0, 60.0: 25.0, 90.0: 22.0}
LEAST_RECALL = 0.9


@pytest.fixture(scope="module")
def pairs():
    return {
        angle: [warp.make_pair((72, i), (160, 160), angle, max_frequency=80.0, supersample=3) for i in range(3)]
        for angle in LEAST_PSNR_DB
    }


@pytest.mark.parametrize("angle", LEAST_PSNR_DB)
def test_what_is_visible_is_true(pairs, angle):
    scores = [warp.score(pair) for pair in pairs[angle]]
    assert np.mean([s.psnr for s in scores]) >= LEAST_PSNR_DB[angle]
    assert np.mean([s.recall for s in scores]) >= LEAST_RECALL
    assert np.mean([s.false_share for s in scores]) <= 0.03


def test_curtains_that_hide_all_the_way_refuse_what_both_cameras_see(pairs):
    """Seen past a body's back, the wall behind is hidden, the price of no false colours."""
    closed, default = ([warp.score(pair, p) for pair in pairs[60.0]] for p in ("closed", "default"))
    assert np.mean([s.recall for s in closed]) < LEAST_RECALL
    assert np.mean([s.false_share for s in closed]) <= np.mean([s.false_share for s in default])


def test_the_corrected_mesh_beats_the_released_one_and_the_torn_one(pairs):
    for angle in LEAST_PSNR_DB:
        mean = {
            p: np.mean([warp.score(pair, p).psnr for pair in pairs[angle]]) for p in ("default", "released", "torn")
        }
        assert mean["default"] > mean["released"] + 2
        assert mean["default"] > mean["torn"] + 0.5


def test_exact_correspondences_are_the_ceiling_at_small_angles(pairs):
    ceiling = np.mean([warp.score_ceiling(pair).psnr for pair in pairs[30.0]])
    assert ceiling >= np.mean([warp.score(pair).psnr for pair in pairs[30.0]]) - 0.5


@pytest.mark.parametrize(("source", "target"), [(0, 1), (3, 4)])
def test_a_real_depth_camera_s_pictures_are_warped_onto_each_other(media, source, target, tmp_path):
    """ICL-NUIM: exact depth of a rendered living room; its K has fy < 0, so cameras and world are mirrored in y."""
    folder = media / "rgbd_icl_tum" / "ch12" / "dense_RGBD" / "data"
    rows = (folder / "pose.txt").read_text().splitlines()  # TUM without its time stamps
    (tmp_path / "poses.txt").write_text("\n".join(f"{i} {row}" for i, row in enumerate(rows) if row.strip()))
    w2c = trajectory_files.read(tmp_path / "poses.txt", format="tum", flip_y=True).w2c
    K = np.array([[481.2, 0.0, 320.0], [0.0, 480.0, 240.0], [0.0, 0.0, 1.0]])  # centres at integers there: + 0.5
    frames = [cv2.imread(str(folder / "color" / f"{i + 1}.png"))[..., ::-1].copy() for i in (source, target)]
    z_depth = cv2.imread(str(folder / "depth" / f"{source + 1}.png"), cv2.IMREAD_UNCHANGED).astype(np.float32) / 5000
    shown = render(build(frames[0], z_depth, K), Camera(K, relative_to(w2c[target], w2c[source]), z_depth.shape))
    moved = psnr(shown.colour, frames[1], shown.visible_mask)
    unmoved = psnr(frames[0], frames[1], shown.visible_mask)
    assert shown.visible_mask.mean() > 0.2
    assert moved > 28
    assert moved > unmoved + 5
