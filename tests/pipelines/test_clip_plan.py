"""The plan of clips decides what is to do, and frame times are packed without loss."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from ex4d.errors import Filtered
from pipelines.preprocess import clips
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.stages.shots import pack_pts, unpack_pts

CONFIG = PreprocessConfig(output="unused", num_frames=5, clips_per_shot=10)


def record(num_frames=40, cuts=(), step=512, time_base=(1, 12288), pts=None):
    pts = [step * index for index in range(num_frames)] if pts is None else pts
    info = {"time_base": list(time_base), "size": [48, 64]}
    shots = [{"box": [0, 0, 48, 64], "bars": 0.0, "logo": 0.0}] * (len(cuts) + 1)
    return {"info": info, "pts_runs": pack_pts(pts), "cuts": list(cuts), "shots": shots}


@pytest.mark.parametrize("pts", [[0], [-512, 0, 512, 1024], [3, 4, 6, 9, 10, 11, 20], list(range(0, 9000, 512))])
def test_pts_survive_packing(pts):
    assert unpack_pts(pack_pts(pts)) == pts


def test_a_constant_rate_packs_small():
    assert pack_pts(range(0, 108_000 * 512, 512)) == [0, [512, 107_999]]


def test_clips_are_disjoint_inside_their_shots_and_keyed_by_span():
    plan = clips.plan("ab" * 32, record(40, cuts=[12, 30]), CONFIG)
    shots = [range(0, 12), range(12, 30), range(30, 40)]
    assert [sum(clip.frame_index[0] in shot for clip in plan) for shot in shots] == [2, 3, 2]
    taken = [index for clip in plan for index in clip.frame_index]
    assert len(taken) == len(set(taken))
    for clip in plan:
        assert any(set(clip.frame_index) <= set(shot) for shot in shots)
        assert clip.pts == [512 * index for index in clip.frame_index]
        assert clip.fps == pytest.approx(24)
    assert len({clip.key for clip in plan}) == len(plan)
    assert plan[0].key.startswith("abababababababab-0000")


def test_caps_spread_over_the_video():
    config = replace(CONFIG, clips_per_shot=1, clips_per_video=2)
    plan = clips.plan("ab" * 32, record(80, cuts=[20, 40, 60]), config)
    assert [clip.frame_index[0] // 20 for clip in plan] == [1, 3]


def test_stride_and_rate_choose_frames():
    (clip,) = clips.plan("ab" * 32, record(13), replace(CONFIG, stride=3))
    assert clip.frame_index == [0, 3, 6, 9, 12]
    assert clip.fps == pytest.approx(8)
    (clip,) = clips.plan("ab" * 32, record(9), replace(CONFIG, fps=12.0))
    assert clip.frame_index == [0, 2, 4, 6, 8]
    assert clip.fps == 12.0


def test_times_in_the_source_are_those_of_exact_fractions():
    rng = np.random.default_rng(0)
    pts = (-7 + np.cumsum(rng.integers(990, 1013, 300))).tolist()
    facts = record(pts=pts, time_base=(1001, 30_000_007))
    tick_s = Fraction(1001, 30_000_007)
    for clip in clips.plan("ab" * 32, facts, replace(CONFIG, clips_per_shot=9)):
        found = clips.in_source(clip, facts)
        assert found["frame_s"] == [float((tick - pts[0]) * tick_s) for tick in clip.pts]
        assert found["source_s"] == float((pts[-1] - pts[0]) * tick_s)
        assert found["source_frames"] == len(pts)


def test_a_wanted_rate_takes_the_nearest_frame_of_a_variable_one():
    rng = np.random.default_rng(0)
    pts = np.cumsum(rng.integers(20, 60, 200)).tolist()
    config = replace(CONFIG, fps=5.0, clips_per_shot=3)
    for clip in clips.plan("ab" * 32, record(pts=pts, time_base=(1, 1000)), config):
        seconds = (np.array(clip.pts) - pts[0]) / 1000
        assert np.abs(seconds * 5 - np.round(seconds * 5)).max() <= 0.5 * 0.06 * 5


def test_why_a_video_gives_no_clip():
    with pytest.raises(Filtered, match="shot_length"):
        clips.plan("ab" * 32, record(40, cuts=range(4, 40, 4)), CONFIG)
    with pytest.raises(Filtered, match="frame_rate") as caught:
        clips.plan("ab" * 32, record(40), replace(CONFIG, fps=60.0))
    assert caught.value.score == pytest.approx(24)
    with pytest.raises(Filtered, match="shot_length"):
        clips.plan("ab" * 32, record(40), replace(CONFIG, min_shot_s=3.0))
