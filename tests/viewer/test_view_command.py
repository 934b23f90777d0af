"""`ex4d view`: one page of a dataset's samples, or of a video in three dimensions."""

from __future__ import annotations

import base64
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from ex4d import synthetic, video
from ex4d.data import manifest, sample
from ex4d.data.tar import read_sample
from ex4d.viewer import sample_page
from pipelines import cli

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
from make_run import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


def test_samples_are_shown_under_their_masks(dataset, tmp_path, capsys):
    row = manifest.read_table(str(dataset), manifest.MANIFEST).to_pylist()[2]
    output = tmp_path / "a.html"
    assert cli.main(["view", str(dataset), "--key", row["key"], "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output)
    text = output.read_text()
    assert row["key"] in text
    clips = [video.read(base64.b64decode(data))[0] for data in re.findall(r"base64,([^\"]+)", text)]
    blob = (dataset / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]]
    clip = sample.decode(read_sample(blob, row["key"]))
    assert clip.provenance["source_path"] in text
    assert len(clips) == 1 + len(clip.visible)
    for shown, visible in zip(clips[1:], clip.visible, strict=True):
        wanted = clip.frames * visible[..., None]
        assert np.abs(shown.astype(int) - wanted).mean() < 30  # noise through H.264 and its halved colours
        assert np.abs(shown.astype(int) - wanted).mean() < np.abs(shown.astype(int) - clip.frames).mean()
    assert cli.main(["view", str(dataset), "--samples", "3", "--output", str(output)]) == 0
    assert output.read_text().count("<h2>") == 3 + 1  # and the facts


def test_holes_of_a_dark_clip_can_be_seen():
    frames, visible = np.full((1, 48, 48, 3), 8, np.uint8), np.ones((1, 48, 48), bool)
    visible[:, 10:40, 10:40] = False
    shown = sample_page.hatched(frames, visible)
    assert (shown[visible] == 8).all()
    assert 0.05 < (shown[~visible] == sample_page.HATCH).all(axis=-1).mean() < 0.2
    assert (shown[~visible].max(axis=-1) == 0).mean() > 0.8


def test_a_video_is_shown_in_three_dimensions(tmp_path):
    world = synthetic.SyntheticConfig(num_videos=1, num_frames=3, size=(32, 48), seed=4)
    clip = synthetic.write_corpus(tmp_path, world)[0]
    argv = ["view", str(clip), "--angle-deg", "20", "--output", str(tmp_path / "a.html")]
    assert cli.main(argv) == 0
    text = (tmp_path / "a.html").read_text()
    assert clip.name in text
    assert '"shape": [3, 32, 48]' in text
    odd = tmp_path / os.fsdecode(b"a\xff.mp4")
    odd.write_bytes(clip.read_bytes())
    depth = str(clip.with_suffix(".depth.npz"))
    assert cli.main(["view", str(odd), "--depth-path", depth, "--output", str(tmp_path / "b.html")]) == 0


@pytest.mark.parametrize(
    ("thing", "flags", "status", "named"),
    [
        ("dataset", ("--key", "nobody"), 2, "key='nobody'"),
        ("dataset", ("--samples", "0"), 2, "samples"),
        ("empty", (), 2, "no dataset.json"),
        ("missing.mp4", (), 1, "missing.mp4"),
    ],
)
def test_what_cannot_be_shown_is_named(dataset, tmp_path, capsys, thing, flags, status, named):
    (tmp_path / "empty").mkdir()
    place = dataset if thing == "dataset" else tmp_path / thing
    assert cli.main(["view", str(place), *flags, "--output", str(tmp_path / "a.html")]) == status
    assert named in capsys.readouterr().err
    assert not (tmp_path / "a.html").exists()
    assert cli.main(["view", str(place), "--output", str(tmp_path / "a.txt")]) == 2
