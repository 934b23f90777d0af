"""The page of a sweep, as a browser sees it."""

from __future__ import annotations

import re

from test_html import HOSTILE, browse

from ex4d.viewer import charts
from ex4d.viewer.sweep_page import sweep_page


def rows() -> list[dict]:
    """Return trials in every state, with names, numbers and a setting that only some have."""

    def row(lr: float, decay: str, state: str, curve: list) -> dict:
        value, step = (curve[-1][1], curve[-1][0]) if curve else (None, None)
        point = {"train.lr": lr, "train.lr_decay": decay} | ({"train.warmup_steps": 10} if decay == "cosine" else {})
        return {"point": point, "state": state, "value": value, "step": step, "curve": curve}

    return [
        row(1e-3, "none", "finished", [[3, 2.0], [6, 1.5], [9, 1.2]]),
        row(3e-3, "cosine", "stopped", [[3, 2.5], [6, 2.4]]),
        row(1e-5, HOSTILE, "interrupted", [[3, 2.6]]),
        row(1e-1, "none", "failed", []),
    ]


def test_a_browser_shows_the_page_of_a_sweep_and_complains_of_nothing(tmp_path):
    keys = ["train.lr", "train.lr_decay", "train.warmup_steps"]
    path = tmp_path / "index.html"
    path.write_bytes(sweep_page("mse", keys, rows(), {"train.lr": 0.7}, {"best": [1.2, 1.3]}, HOSTILE))
    dom, console = browse(path, tmp_path)
    assert console == []
    assert dom.count("<svg") == 2 + 3  # curves, settings and value, three pairs
    assert all(word in dom for word in ("finished", "stopped", "interrupted", "failed", "train.lr × train.lr_decay"))


def test_a_page_of_one_trial_or_of_none_with_a_value_is_a_page():
    assert b"<svg" in sweep_page("mse", ["train.lr"], rows()[:1], {}, {}, "one")
    assert b"<svg" not in sweep_page("mse", ["train.lr"], rows()[3:], {}, {}, "none")


def test_lines_end_where_their_points_are():
    """The lowest value stands at the bottom, the highest at the top; steps run from left to right."""
    svg = charts.lines([charts.Line([[1, 5.0], [2, 3.0], [3, 4.0]])], "x")
    points = re.search('polyline points="([^"]*)"', svg)[1].split()
    (x1, y1), (x2, y2), (x3, y3) = (tuple(map(float, point.split(","))) for point in points)
    assert x2 - x1 == x3 - x2 > 0
    assert (y2 - y1) == 2 * (y2 - y3) > 0
    assert "step 1" in svg
    assert ">5<" in svg
