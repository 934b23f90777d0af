"""The policy of a page: its own style and script run, and nothing that a hostile name injects."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ex4d import video
from ex4d.viewer import page
from ex4d.viewer.html import document, policy

HOSTILE = "<script>document.title='taken'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='taken'\">"


def test_what_a_page_is_given_is_text():
    text = document("results.html", HOSTILE, ("page.css",), summary=[HOSTILE], rows=[], tables=[], facts={},
                    loss_curve=None).decode()  # fmt: skip
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("&lt;script&gt;") == 3  # title, heading, summary


def test_the_policy_names_the_hashes_of_what_is_in_the_page(tmp_path):
    content = page.Page(title="a", summary=())
    text = Path(page.write(content, tmp_path / "a.html")).read_text()
    style, script = (re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1] for tag in ("style", "script"))
    asked = re.search('Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    assert asked == policy(style, script)
    assert "default-src 'none'" in asked
    assert "unsafe" not in asked


def browse(path, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    own = [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=3000", "--enable-logging=stderr", "--v=0"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    argv = [browser, *flags, *own, "--dump-dom", path.as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_the_page_and_its_videos_and_complains_of_nothing(tmp_path):
    frames = np.full((4, 32, 32, 3), 90, np.uint8)
    (tmp_path / "beside.mp4").write_bytes(video.encode(frames, 8.0))
    clips = (page.Clip("inside", page.embedded(video.encode(frames, 8.0))), page.Clip("beside", "beside.mp4"))
    content = page.Page(title="fine", summary=(HOSTILE,), rows=(page.Row(HOSTILE, clips),), losses=[2.0, 1.0])
    path = tmp_path / "a.html"
    page.write(content, path)
    dom, console = browse(path, tmp_path)
    assert "<title>fine</title>" in dom
    assert console == []


def test_a_browser_refuses_what_was_smuggled_in(tmp_path):
    path = tmp_path / "a.html"
    page.write(page.Page(title="fine", summary=("PLACE",)), path)
    path.write_text(path.read_text().replace("PLACE", HOSTILE))  # as if the escaping had failed
    dom, console = browse(path, tmp_path)
    assert "<title>fine</title>" in dom
    assert any("Content Security Policy" in line for line in console)
