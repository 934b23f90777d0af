"""The comparison of methods against true novel views: with methods whose scores are known beforehand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ex4d.evaluate import novel_views
from ex4d.evaluate.metrics import PSNR_CAP_DB, psnr
from ex4d.generate import GenerateConfig
from ex4d.synthetic import SyntheticConfig


@pytest.fixture(scope="module")
def views() -> list[novel_views.View]:
    world = SyntheticConfig(num_frames=3, size=(32, 48), seed=5, camera_motion="static")
    return [novel_views.make_view(index, world, novel_views.EvaluateConfig(angle_deg=30.0)) for index in range(2)]


def test_a_view_starts_at_the_source_and_its_condition_is_nearly_true_where_it_is_seen(views):
    for view in views:
        np.testing.assert_array_equal(view.truth[0], view.frames[0])
        assert view.visible[0].all()
        assert not view.cond_video[~view.visible].any()
        assert psnr(view.cond_video, view.truth, view.visible) > psnr(view.frames, view.truth, view.visible) + 2


def test_a_perfect_adapter_wins_and_a_wrong_condition_is_seen(views, monkeypatch):
    """The stand-in gives the truth of the clip whose condition it got, dimmed where it is not the trained one."""
    truth = {view.cond_video.tobytes(): view.truth for view in views}

    def perfect(base, model, cond_video, visible, sampler, seed, mask_range, first_frame=None):
        return truth[cond_video.tobytes()] if model == "trained" else truth[cond_video.tobytes()] // 2

    monkeypatch.setattr(novel_views, "generate", perfect)
    base = SimpleNamespace(device="cpu", encode_video=lambda pixels: pixels, decode_latents=lambda latents: latents)
    scores, videos = novel_views.compare(base, "trained", "untrained", views, GenerateConfig(), 0)
    by_name = {score.method: score for score in scores}
    assert by_name["trained adapter"].whole == by_name["trained adapter"].holes == [PSNR_CAP_DB] * 2
    assert by_name["trained adapter"].ssim == pytest.approx([1.0, 1.0])
    assert by_name["codec ceiling"].whole == [PSNR_CAP_DB] * 2
    for name in ("zero adapter", "other clip's condition", "warp only", "OpenCV inpainting"):
        assert max(by_name[name].whole) < 40, name
        assert max(by_name[name].ssim) < 0.99, name
        assert min(novel_views.margins(scores)[name]) > 0, name
    # The seen pixels are those of the condition, whatever the method made of them.
    assert by_name["zero adapter"].whole_pasted[0] > by_name["zero adapter"].whole[0]
    assert [len(v) for v in videos] == [len(novel_views.METHODS)] * 2
    columns, rows = novel_views.table(scores)
    assert all(len(row) == len(columns) for row in rows)
    assert rows[0][-1] == "1.00 ± 0.00"


def test_a_clip_without_holes_does_not_count():
    assert novel_views.spread([10.0, float("nan"), 12.0]) == "11.00 ± 1.00"
