"""Black bars are found to the exact line, without false positives; a logo is distinguished from a still picture."""

from __future__ import annotations

import numpy as np
import pytest
from scenes import barred, grey, pan, written

from ex4d.quality import SCORES, shot


@pytest.mark.parametrize("bars", [(18, 18, 0, 0), (0, 0, 40, 40), (10, 10, 24, 24), (30, 12, 0, 0), (0, 0, 0, 9)])
def test_bars_are_found_to_the_line(bars):
    top, bottom, left, right = bars
    found = shot.find_box(grey(barred(pan(16), *bars)))
    assert found == (top, left, 144 - top - bottom, 256 - left - right)


def test_a_subtitle_in_a_bar_does_not_hide_it():
    frames = written(barred(pan(16), 20, 20), "a long line of words in the lower bar", where=0.96, height=0.08)
    assert shot.find_box(grey(frames)) == (20, 0, 104, 256)


def test_dark_pictures_have_no_bars():
    whole = (0, 0, 144, 256)
    assert shot.find_box(grey(pan(16))) == whole
    assert shot.find_box(grey((pan(16) * 0.1).astype(np.uint8))) == whole
    assert shot.find_box(np.zeros((0, 144, 256), np.uint8)) == whole
    night = pan(16)
    night[:, :60] = 8  # a dark sky above roofs has no straight edge
    for column, top in zip(range(0, 256, 16), np.random.default_rng(0).integers(10, 60, 16), strict=True):
        night[:, top:60, column : column + 16] = 90
    assert shot.find_box(grey(night)) == whole
    spot = np.full((16, 144, 256, 3), 6, np.uint8)
    spot[:, 60:80, 110:150] = 220
    assert shot.find_box(grey(spot)) == whole


def test_a_fade_does_not_widen_bars():
    frames = barred(pan(20), 16, 16)
    frames[:8] = 3
    assert shot.find_box(grey(frames)) == (16, 0, 112, 256)


def test_the_box_of_the_source_lies_inside_the_picture():
    box = shot.source_box((18, 0, 108, 256), (144, 256), (1080, 1920))
    assert box == [143, 0, 794, 1920]  # bars of 135 px: 8 px further in on either side
    assert shot.source_box((0, 0, 144, 256), (144, 256), (1080, 1920)) == [0, 0, 1080, 1920]
    assert shot.source_box((2, 4, 40, 30), (48, 64), (48, 64)) == [3, 5, 38, 28]


def _logo(frames, corner):
    y, x = 118 * (corner // 2) + 6, 210 * (corner % 2) + 8
    out = frames.copy()
    mark = np.random.default_rng(3).integers(0, 2, (4, 8)).repeat(4, 0).repeat(4, 1).astype(bool)
    out[:, y : y + 16, x : x + 32][:, mark] = 240
    return out


@pytest.mark.parametrize("corner", range(4))
@pytest.mark.parametrize("seed", [0, 1])
def test_a_logo_stays_while_the_picture_moves(corner, seed):
    frames, box = pan(32, step=(3.0, 1.5), seed=seed), (0, 0, 144, 256)
    limit = SCORES["logo"].suggested
    assert shot.logo_share(grey(frames), box) < limit / 2
    assert shot.logo_share(grey(_logo(frames, corner)), box) > limit


def test_nothing_is_said_of_a_logo_where_the_camera_rests():
    rest = grey(_logo(pan(32, step=(0, 0)), 1))
    assert shot.logo_share(rest, (0, 0, 144, 256)) == 0.0
    assert shot.logo_share(rest[:3], (0, 0, 144, 256)) == 0.0


def test_samples_of_a_shot_are_few_even_and_all_before_the_cut():
    samples = shot.Samples()
    for index in range(1000):
        samples.add(index, np.full((2, 2), index % 251, np.uint8))
        assert len(samples.frames) <= shot.MAX_SAMPLES
    indices = [index for index, _ in samples.frames]
    assert len(indices) > shot.MAX_SAMPLES / 2 - 1
    assert len(set(np.diff(indices))) == 1
    assert len(samples.take_until(500)) == sum(index < 500 for index in indices)
    assert all(index >= 500 for index, _ in samples.frames)
    assert len(samples.take_until(2000)) > 0
    assert samples.take_until(2000).shape[0] == 0
