"""The page is one file, escapes its input, and really contains its videos."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import numpy as np

from ex4d import video
from ex4d.viewer import page


def test_a_page_holds_its_videos_tables_and_curve(tmp_path):
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[:, :, 24:] = 200
    src = page.embedded(video.encode(frames, 8.0))
    content = page.Page(
        title="<b>unsafe</b>",
        summary=("a & b",),
        rows=(page.Row("row", (page.Clip("left", src), page.Clip("right", src), page.Clip("by", 'a "b".mp4'))),),
        tables=(page.Table("scores", "of two", ("method", "dB"), (("ours", "20.00"), ("theirs", "10.00")), best=0),),
        losses=[3.0, 2.0, 1.0],
        facts={"steps": "3"},
    )
    text = Path(page.write(content, tmp_path / "index.html")).read_text()
    assert "<b>unsafe</b>" not in text
    assert "&lt;b&gt;unsafe" in text
    clips = re.findall(r"data:video/mp4;base64,([^\"]+)", text)
    assert len(clips) == 2
    shown, fps = video.read(base64.b64decode(clips[0]))
    assert shown.shape == frames.shape
    assert fps == 8.0
    assert np.abs(shown[:, :, -8:].astype(int) - 200).mean() < 4
    assert 'src="a &#34;b&#34;.mp4"' in text
    assert text.count("<polyline") == 2
    assert "20.00" in text


def test_near_is_bright_in_depth_pictures():
    z_depth = np.linspace(1.0, 9.0, 64, dtype=np.float32).reshape(1, 8, 8)
    coloured = page.depth_colours(z_depth)
    assert coloured.shape == (1, 8, 8, 3)
    assert coloured[0, 0, 0].sum() > coloured[0, -1, -1].sum()
