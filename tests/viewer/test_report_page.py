"""The pages of a dataset: no untrusted text becomes markup, figures match the data, equal data give equal bytes."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ex4d.viewer import charts, report_page

HOSTILE = "<img src=x onerror=alert(1)>\"'&\u202e.mp4"
COUNTS = {
    **{"videos_in": 9, "videos_split": 7, "videos_rejected": 2},
    **{"clips_planned": 20, "samples": 15, "clips_filtered": 4, "clips_bad": 1},
}


def rejects():
    row = {"unit": "video", "fate": "bad", "stage": "probe", "reason": "html_page", "key": HOSTILE, "message": HOSTILE}
    clip = {"unit": "clip", "fate": "filtered", "stage": "score", "reason": "text", "message": "a.mp4: score 1"}
    return [row, *({**clip, "key": f"k{number}"} for number in range(4))]


def page():
    frames = np.zeros((3, 24, 32, 3), np.uint8)
    preview = report_page.Preview(HOSTILE, (HOSTILE,), frames, frames[:1], (HOSTILE,))
    return report_page.dataset_page(
        HOSTILE, COUNTS, rejects(), {"motion": [0.1, 0.2, 0.4], "text": [0.0] * 3}, {"motion": {"min": 0.15}},
        [preview], {HOSTILE: HOSTILE}, [HOSTILE],
    )  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.bad = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        for name, value in attrs:
            if name.startswith("on") or (name == "src" and not value.startswith("data:image/jpeg;base64,")):
                self.bad.append((tag, name, value))


def test_names_from_outside_are_never_markup():
    tags = Tags(page().decode())
    assert tags.bad == []
    assert tags.seen.count("img") == 4
    assert "script" not in tags.seen


def test_equal_data_give_equal_bytes_and_lone_surrogates_do_not_break_it():
    assert page() == page()
    broken = [{**rejects()[0], "key": "\udcff.mp4", "message": "x"}]
    assert b"udcff" in report_page.dataset_page("d", COUNTS, broken, {}, {}, [], {})


def test_the_counts_and_the_reasons_are_those_of_the_run():
    text = re.sub(r"<[^>]+>", " ", page().decode())
    text = " ".join(text.split())
    assert "9 videos in = split into clips 7 77.8% rejected 2 22.2%" in text
    assert "20 clips planned = samples 15 75.0% filtered 4 20.0% bad 1 5.0%" in text
    assert "clip filtered score text 4 a.mp4: score 1" in text
    assert text.index("clip filtered") < text.index("video bad")


def test_a_histogram_holds_every_value_and_its_threshold():
    values = np.random.default_rng(0).random(500)
    svg = charts.histogram(values, "label", 0.5)
    assert sum(int(count) for count in re.findall(r"<title>(\d+) from", svg)) == 500
    assert svg.count("stroke-dasharray") == 1
    assert "nan" not in charts.histogram([0.0, 0.0], "label") + charts.kept_curve([3.0], "max", "label")


@pytest.mark.parametrize("keep", ["min", "max"])
def test_what_a_threshold_keeps_is_counted(keep):
    values = np.arange(100) / 100
    points = re.search(r'points="([^"]+)"', charts.kept_curve(values, keep, "label"))[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    plot = charts.HEIGHT - charts.TOP - charts.BOTTOM
    shares = [1 - (height - charts.TOP) / plot for height in heights]
    assert shares == sorted(shares, reverse=keep == "min")
    assert shares[60] == pytest.approx(0.5, abs=0.02)
    for share in (0.99, 0.9, 0.5, 0.07):
        limit = report_page._threshold_of(values, keep, share)
        kept = (values >= limit).mean() if keep == "min" else (values <= limit).mean()
        assert share <= kept < share + 0.011


def test_the_score_page_says_what_the_set_and_the_suggested_threshold_keep():
    scores = {"still": [0.0] * 30 + [0.9] * 10}
    html = report_page.score_page("d", COUNTS, scores, {"still": {"max": 0.95}}, 40, []).decode()
    assert "0.6 (suggested)</td><td>75.0%: 30 of 40" in html
    assert "0.95 (set)</td><td>100.0%: 40 of 40" in html
    assert "preprocess.filters.max_still" in html


def test_holes_are_striped_and_the_rest_is_the_frame():
    frame = np.random.default_rng(0).integers(100, 255, (64, 64, 3), dtype=np.uint8)
    visible = np.zeros((64, 64), bool)
    visible[:32] = True
    shown = report_page.masked_picture(frame, visible)
    assert (shown[:32] == frame[:32]).all()
    assert set(np.unique(shown[32:])) == {40, 62}
