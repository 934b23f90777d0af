"""The figures of one video, for methods whose scores are known in advance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ex4d.evaluate import measures, summary, views
from ex4d.evaluate.metrics import PSNR_CAP_DB, psnr
from ex4d.geometry import masks
from ex4d.synthetic import SyntheticConfig


@pytest.fixture(scope="module")
def view() -> views.View:
    world = SyntheticConfig(num_frames=3, size=(48, 64), seed=5, camera_motion="static")
    clip = views.scene_clip(0, world)
    return views.with_truth(views.along(clip, views.Path("orbit", 30.0, {})), 0, world)


@pytest.fixture(scope="module")
def seen(view) -> np.ndarray:
    return masks.erode(view.visible, 5)


def test_a_view_starts_at_the_source_and_its_condition_is_nearly_true_where_it_is_seen(view):
    np.testing.assert_array_equal(view.truth[0], view.clip.frames[0])
    assert view.visible[0].all()
    assert not view.cond_video[~view.visible].any()
    assert psnr(view.cond_video, view.truth, view.visible) > psnr(view.clip.frames, view.truth, view.visible) + 2


def test_the_truth_is_perfect_and_the_dimmed_truth_is_not(view, seen):
    best = measures.measure(view, view.truth, seen)
    assert list(best) == list(measures.MEASURES)
    assert best["psnr"] == best["psnr_holes"] == PSNR_CAP_DB
    assert best["ssim"] == pytest.approx(1.0)
    assert best["psnr_seen"] == pytest.approx(psnr(view.truth[1:], view.cond_video[1:], seen[1:]))
    dim = measures.measure(view, view.truth // 2, seen)
    assert max(dim["psnr"], dim["psnr_holes"]) < 30
    assert dim["ssim"] < 0.99
    # Seen pixels are those of the condition, whatever the method shows there.
    assert dim["psnr_pasted"] > dim["psnr"]


def test_frame_0_is_given_and_does_not_count(view, seen):
    spoilt = view.truth.copy()
    spoilt[0] = 0
    assert measures.measure(view, spoilt, seen) == measures.measure(view, view.truth, seen)


def test_without_truth_what_was_asked_for_is_left(view, seen):
    found = measures.measure(replace(view, truth=None), view.truth, seen)
    assert {name for name, value in found.items() if value is not None} == {
        *("psnr_seen", "rotation_deg", "translation", "flow_px", "cameras_found", "cameras_near")
    }
    with_truth = measures.measure(view, view.truth, seen)
    assert all(found[name] == with_truth[name] for name in found if found[name] is not None)


def test_a_clip_without_holes_does_not_count(view):
    whole = np.ones_like(view.visible)
    assert measures.measure(view, view.truth, whole)["psnr_holes"] is None
    assert summary.spread([10.0, None, 12.0]) == "11.00 ± 1.00 (of 2)"
    assert summary.spread([None]) == ""
    assert summary.spread([0.5], 0, percent=True) == "50 ± 0"


def test_a_table_has_a_row_a_method_and_no_empty_column(view, seen):
    views_of_range = summary.Range()
    rng = np.random.default_rng(0)
    for _ in range(2):
        figures = {name: measures.measure(view, view.truth // part, seen) for name, part in (("a", 1), ("b", 2))}
        features = {f"{name}.image": rng.normal(size=(4, 3)) for name in ("real", "a", "b")}
        views_of_range.add(figures, features)
    labels = {"a": "ours", "b": "dimmed", "c": "not made"}
    columns, rows = summary.table(views_of_range, labels, views_of_range.distances())
    assert [row[0] for row in rows] == ["ours", "dimmed"]
    assert all(len(row) == len(columns) for row in rows)
    assert columns[-1] == summary.FRECHET["image"] + " (n = 8)"
    assert not any(summary.FRECHET["video"] in column for column in columns)
    lead = summary.lead(views_of_range, "a", "b", "psnr")
    assert lead == pytest.approx(PSNR_CAP_DB - psnr(view.truth[1:] // 2, view.truth[1:]))
    assert summary.lead(views_of_range, "a", "c", "psnr") is None
    without = summary.Range()
    without.add({"a": measures.measure(replace(view, truth=None), view.truth, seen)}, {})
    assert measures.MEASURES["psnr"].label not in summary.table(without, {"a": "ours"}, {})[0]


def test_a_zoom_is_seen_by_the_true_camera_too():
    world = SyntheticConfig(num_frames=3, size=(48, 64), seed=5, camera_motion="static", moving_bodies=False)
    clip = views.scene_clip(0, world)
    view = views.with_truth(views.along(clip, views.Path("zoom", 0.0, {"zoom": 2.0})), 0, world)
    assert view.view_K[-1, 0, 0] == pytest.approx(2 * clip.K[0, 0])
    assert psnr(view.truth[-1], view.clip.frames[-1]) < 25, "nothing was zoomed"
    assert psnr(view.cond_video[-1], view.truth[-1], view.visible[-1]) > 25
    found = measures.measure(view, view.truth, view.visible)
    assert found["cameras_near"] == 1
