"""Pages of every kind from hostile data, in a real browser: no script of the data runs and no request leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_html import browse
from test_report_page import COUNTS
from test_scene_page import view as view
from web_server import web_server

from ex4d import video
from ex4d.viewer import page, report_page, scene_page, sweep_page

TAKEN = "document.title='taken'"
HOSTILE = {
    "elements": "<script>{taken};fetch('{url}/a')</script><img src={url}/b onerror=\"{taken}\">"
    '<svg onload="{taken}"><details open ontoggle="{taken}">',
    "ends": '"></style></script></title></textarea><script>{taken}</script><link rel=stylesheet href={url}/c>',
    "urls": "javascript:{taken} url({url}/d) @import '{url}/e'; {{}} {url}/f.mp4 \" onmouseover={taken} x=\"'",
    "frames": '--><iframe src="javascript:parent.{taken}"></iframe><base href={url}/>'
    "<meta http-equiv=refresh content='0;{url}/g'>",
    "letters": "\u202egnp.exe\u2066\u200b\x00\x1b[2J\x85\u2028;{taken}//&lt;script&gt;{{{{ 7*7 }}}}{{% raw %}}"
    "<form action={url}/h><input autofocus onfocus={taken}>",
}
ORDINARY = "clip of a garden"


def samples(text: str, path: Path) -> None:
    clip = page.embedded(video.encode(np.full((4, 32, 32, 3), 90, np.uint8), 8.0))
    clips = (page.Clip(text, clip), page.Clip("beside", text if text != ORDINARY else clip))
    table = page.Table(text, text, (text, "dB"), ((text, "1.0"),), best=0)
    content = page.Page(text, (text,), (page.Row(text, clips),), (table,), [2.0, 1.0], {text: text})
    page.write(content, path)


def dataset(text: str, path: Path) -> None:
    frames = np.zeros((3, 24, 32, 3), np.uint8)
    preview = report_page.Preview(text, (text, text), frames, frames[:1], (text,))
    values = {"motion": [0.1, 0.2, 0.4]}
    limits = {"motion": {"min": 0.15}}
    data = report_page.dataset_page(text, COUNTS, rejects(text), values, limits, [preview], {text: text}, [text])
    path.write_bytes(data)


def scores(text: str, path: Path) -> None:
    data = report_page.score_page(text, COUNTS, {"motion": [0.1, 0.2, 0.4]}, {}, 3, rejects(text))
    path.write_bytes(data)


def rejects(text: str) -> list[dict[str, str]]:
    row = {"unit": "video", "fate": "bad", "stage": text, "reason": text, "key": text, "message": text}
    return [row, row | {"unit": "clip"}]


def sweep(text: str, path: Path) -> None:
    def row(value: float, setting: object) -> dict:
        point = {text: setting, "train.lr": 1e-3 * value}
        return {"point": point, "state": "finished", "value": value, "step": 6, "curve": [[3, 2.0], [6, value]]}

    rows = [row(1.0, text), row(1.5, f"{text}2"), row(2.0, "plain")]
    keys = [text, "train.lr"]
    path.write_bytes(sweep_page.sweep_page(text, keys, rows, {text: 0.7}, {text: [1.2, 1.3]}, text))


KINDS = {"samples and evaluation": samples, "dataset": dataset, "scores": scores, "sweep": sweep}


def shown(path: Path, tmp_path: Path) -> tuple[str, list[str]]:
    dom, console = browse(path, tmp_path)
    assert dom.strip().endswith("</html>"), "the browser did not show the page"
    # What Chromium says of a machine without a graphics card is not about the page.
    return dom, [line for line in console if "WebGL" not in line and "GPU stall" not in line]


def refused(dom: str) -> bool:
    """Return whether the title is the data's text, unchanged by a script in the data."""
    return "<title>taken</title>" not in dom


@pytest.mark.heavy
@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("kind", [*KINDS, "mesh"])
def test_no_script_of_hostile_data_runs_and_no_request_leaves(kind, attack, tmp_path, view):
    (tmp_path / "served").mkdir()
    with web_server(tmp_path / "served") as site:
        text = HOSTILE[attack].format(url=site.url, taken=TAKEN)
        write_kind(kind, text, tmp_path / "a.html", view)
        dom, console = shown(tmp_path / "a.html", tmp_path)
        assert refused(dom)
        assert site.asked == []
    # What the data hold is text: the browser has nothing to refuse but what was given as the place of a video.
    assert [line for line in console if "Loading media from" not in line] == []
    assert dom.count("<script") == (2 if kind == "mesh" else int(kind == "samples and evaluation"))
    assert "<iframe" not in dom


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [*KINDS, "mesh"])
def test_the_browser_has_nothing_to_say_of_ordinary_pages(kind, tmp_path, view):
    write_kind(kind, ORDINARY, tmp_path / "a.html", view)
    dom, console = shown(tmp_path / "a.html", tmp_path)
    assert ORDINARY in dom
    assert console == []


def write_kind(kind: str, text: str, path: Path, view) -> None:
    if kind != "mesh":
        return KINDS[kind](text, path)
    choices, provenance = view.choices | {"trajectory": text}, view.provenance | {"estimator": text}
    scene_page.write(replace(view, choices=choices, provenance=provenance), path, text)
    return None


@pytest.mark.heavy
def test_the_check_can_fail(tmp_path):
    """In a page without escaping and policy, the browser runs the same data's script and contacts the server."""
    (tmp_path / "served").mkdir()
    with web_server(tmp_path / "served") as site:
        text = HOSTILE["elements"].format(url=site.url, taken=TAKEN)
        (tmp_path / "a.html").write_text(f"<!doctype html><html><title>fine</title>{text}</html>")
        dom, _ = shown(tmp_path / "a.html", tmp_path)
        assert not refused(dom)
        assert site.asked != []
