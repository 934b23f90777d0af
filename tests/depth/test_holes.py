"""Measured depth with holes (0, NaN, inf): they are read, filled for the mesh, and never shown or textured."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from ex4d.depth import DepthRequest, estimate, holes
from ex4d.geometry import imperfect, masks, mesh, trajectory
from ex4d.geometry.camera import intrinsics
from ex4d.geometry.render import persistent, warp_video

SIZE = (48, 64)
K = intrinsics(SIZE)


def scene(num_frames: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Return (frames, z_depth) of a box at 2 before a wall at 4, which is tilted so that depth varies."""
    picture = np.random.default_rng(0).integers(1, 255, (SIZE[0] // 4, SIZE[1] // 4, 3), dtype=np.uint8)
    picture = cv2.resize(picture, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
    frames = np.repeat(picture[None], num_frames, axis=0)
    z_depth = np.repeat((4 + np.linspace(0, 0.2, SIZE[1]))[None, None], num_frames, 0).repeat(SIZE[0], 1)
    z_depth[:, 14:34, 20:40] = 2
    return frames, z_depth.astype(np.float32)


def with_holes(z_depth: np.ndarray, value: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (depth with a wide hole on the wall, one across the box's edge and a narrow one; mask of known pixels)."""
    valid = np.ones(z_depth.shape, bool)
    valid[:, 5:15, 44:56], valid[:, 20:26, 38:46], valid[:, 40:42, 10:20] = False, False, False
    return np.where(valid, z_depth, np.float32(value)), valid


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_hole_is_read_whatever_a_sensor_calls_it(tmp_path, value):
    frames, z_depth = scene()
    stored, valid = with_holes(z_depth, value)
    np.savez(tmp_path / "clip.depth.npz", z_depth=stored)
    found = estimate("sidecar", frames, DepthRequest(str(tmp_path / "clip.mp4")))
    np.testing.assert_array_equal(found.valid_mask, valid)
    np.testing.assert_array_equal(found.values[valid], z_depth[valid])
    assert np.isfinite(found.values).all()
    assert found.values.min() > 0
    assert found.provenance["measured_share"] == pytest.approx(valid.mean())
    # Unmeasured pixels beside an edge belong to the surface behind it.
    assert found.values[0, 20:26, 38:46].min() > 3.9


def test_whole_numbers_and_pictures_have_zeros_where_nothing_was_measured(tmp_path):
    frames, z_depth = scene()
    stored, valid = with_holes(z_depth, 0.0)
    in_mm = np.rint(stored * 1000).astype(np.uint16)
    np.savez(tmp_path / "clip.depth.npz", z_depth=in_mm)
    (tmp_path / "other.depth").mkdir()
    for index, image in enumerate(in_mm):
        assert cv2.imwrite(str(tmp_path / "other.depth" / f"{index}.png"), image)
    for name in ("clip.mp4", "other.mp4"):
        found = estimate("sidecar", frames, DepthRequest(str(tmp_path / name)))
        np.testing.assert_array_equal(found.valid_mask, valid)
        assert np.abs(found.values - z_depth)[valid].max() < 1e-3


def test_zero_disparity_is_far_and_no_hole(tmp_path):
    frames, z_depth = scene()
    disparity = 1 / z_depth
    disparity[:, :4] = 0
    disparity[:, 10, 10] = np.nan
    np.savez(tmp_path / "clip.depth.npz", disparity=disparity)
    found = estimate("sidecar", frames, DepthRequest(str(tmp_path / "clip.mp4")))
    assert not found.valid_mask[:, 10, 10].any()
    assert found.valid_mask.sum() == found.valid_mask.size - len(frames)


def test_holes_that_are_narrow_are_filled_and_wide_ones_stay(tmp_path):
    frames, z_depth = scene()
    stored, valid = with_holes(z_depth, 0.0)
    np.savez(tmp_path / "clip.depth.npz", z_depth=stored)
    share = []
    for fill_px in (0, 1, 2, 6, 10):
        found = estimate("sidecar", frames, DepthRequest(str(tmp_path / "clip.mp4"), fill_px=fill_px))
        share.append(1.0 if found.valid_mask is None else float(found.valid_mask.mean()))
    assert share[0] == share[1] == pytest.approx(valid.mean())
    assert share[1] < share[2] < share[3] < share[4] == 1.0  # 2, 6 and 10 px wide


def test_rows_without_a_value_take_the_nearest():
    values = np.full((1, 6, 8), 3.0, np.float32)
    valid = np.ones(values.shape, bool)
    valid[:, 2:4] = False
    values[:, 2:4], values[:, 4:] = np.nan, 5
    closed, _ = holes.close(values, "z_depth", valid)
    assert closed[0, 2].tolist() == [3] * 8
    assert closed[0, 3].tolist() == [5] * 8


@pytest.mark.parametrize("profile", ["default", "closed", "torn", "released"])
def test_the_mesh_is_there_over_a_hole_and_shows_nothing(profile):
    frames, z_depth = scene()
    _, valid = with_holes(z_depth, 0.0)
    whole = mesh.build(frames[0], z_depth[0], K, profile)
    made = mesh.build(frames[0], z_depth[0], K, profile, valid=valid[0])
    np.testing.assert_array_equal(made.faces, whole.faces)  # the surface, watertight, is the same
    np.testing.assert_array_equal(made.vertices, whole.vertices)
    rows, columns = np.unravel_index(made.faces[: made.face_occluded.size], SIZE)
    touched = (~valid[0])[rows, columns].any(axis=1)
    assert made.occluded[: touched.size][touched].all()
    assert (made.occluded[: touched.size] == whole.occluded[: touched.size])[~touched].all()


@pytest.mark.parametrize("profile", ["default", "released"])
def test_no_colour_of_a_hole_reaches_the_condition(profile):
    """Holes are painted red: no red may appear in the warp, the zoom or filled holes, from any camera."""
    frames, z_depth = scene()
    frames[..., 0] //= 2
    _, valid = with_holes(z_depth, 0.0)
    frames[~valid] = (255, 0, 0)
    path = trajectory.build("orbit", len(frames), 20.0, 3.0)
    zoom = trajectory.zoom_intrinsics(K, len(frames), 1.7)
    for w2c, view_K in ((path, K), (trajectory.build("static", len(frames), radius=3.0), zoom), (path[[0] * 4], K)):
        cond, visible = warp_video(frames, z_depth, K, w2c, profile, "cpu", view_K=view_K, valid=valid)
        assert (cond[1:, ..., 0] < 200).all()
        assert visible[0].all()
        assert visible[1:].mean() < 0.99
        world = (frames, z_depth, K, w2c, np.tile(np.eye(4), (4, 1, 1)), 2)
        filled, seen = persistent.fill(cond, visible, *world, None, profile, "cpu", view_K, valid)
        assert (filled[1:, ..., 0] < 200).all()
        assert (seen >= visible).all()
    np.testing.assert_array_equal(visible[1:] & ~valid[1:], False)  # from the source camera


def test_a_hole_is_hidden_by_every_mask_and_condition():
    frames, z_depth = scene(5)
    _, valid = with_holes(z_depth, 0.0)
    config = masks.MaskConfig(num_masks=6, visibility=1, tracking=1, novel_view=0, hole_share=(0.2, 0.9))
    drawn = masks.draw(frames, z_depth, K, config, 0, valid)
    assert set(drawn.kind) == {0, 2}
    assert not (drawn.visible[:, 1:] & ~valid[1:]).any()
    assert drawn.visible[:, 0].all()
    w2c = next(path for path in drawn.w2c if path is not None)
    _, seen = imperfect.condition(frames, z_depth, K, w2c, 0, valid=valid)
    assert not (seen[1:] & ~valid[1:]).any()
