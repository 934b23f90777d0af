"""Known sources are checked in groups: a second run reads only changed files, and ends like a run from scratch."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_corpus import CORPUS, choices, inline

from ex4d import hub, storage, video
from ex4d.data.verify import verify
from ex4d.synthetic import write_corpus
from pipelines import inputs
from pipelines.preprocess import fingerprints, unchanged
from pipelines.preprocess.recipe import Stages
from pipelines.preprocess.stages import decode, shots
from pipelines.runtime.blocks import pack, unpack
from pipelines.runtime.stage import is_bug

FIRST, SECOND = "first", "second"
DEPTH = f"{FIRST}.depth.npz"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Three videos with captions, the second without depth, after a first run."""
    monkeypatch.setattr(hub, "SETTLED_S", -1.0)
    folder = tmp_path / "in"
    paths = write_corpus(folder, replace(CORPUS, num_videos=3, num_frames=5))
    for path, name in zip(paths, (FIRST, SECOND, "third"), strict=True):
        for suffix in (".mp4", ".depth.npz", ".txt"):
            os.rename(path.with_suffix(suffix), folder / f"{name}{suffix}")
    os.rename(folder / f"{SECOND}.depth.npz", tmp_path / "depth.npz")
    config = choices(folder, tmp_path / "out", clips_per_shot=1, max_bad_fraction=1.0, depth="sidecar")
    assert inline(config).worked == {"hash": 3, "split": 3, "clip": 3}
    return config


@pytest.fixture
def read(config, read):
    """The videos and depth files that are hashed after the first run."""
    read.clear()
    return lambda: sorted({name for name in read if name.endswith((".mp4", ".npz"))})


def change_video(folder):
    path = folder / f"{FIRST}.mp4"
    frames, fps = video.read(path)
    video.write(path, 255 - frames, fps)


def change_depth(folder):
    path = folder / f"{FIRST}.depth.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"z_depth": arrays["z_depth"] * 2})


def rename(folder):
    for suffix in (".mp4", ".depth.npz", ".txt"):
        os.rename(folder / f"{FIRST}{suffix}", folder / f"new{suffix}")


def copy(folder):
    for suffix in (".mp4", ".depth.npz"):
        (folder / f"a_copy{suffix}").write_bytes((folder / f"{FIRST}{suffix}").read_bytes())


# What happens between two runs; which files the second run reads (a clip that is made again needs its depth), and how
# many videos and clips it works on.
CHANGES = {
    "nothing": (lambda folder: None, [], 0, 0),
    "a changed video": (change_video, [DEPTH, f"{FIRST}.mp4"], 1, 1),
    "a touched video": (lambda folder: os.utime(folder / f"{FIRST}.mp4"), [f"{FIRST}.mp4"], 0, 0),
    "a new depth file": (
        lambda folder: os.rename(folder.parent / "depth.npz", folder / f"{SECOND}.depth.npz"),
        [f"{SECOND}.depth.npz"],
        *(0, 1),
    ),
    "a changed depth file": (change_depth, [DEPTH], 0, 1),
    "a removed depth file": (lambda folder: (folder / DEPTH).unlink(), [], 0, 1),
    "a changed caption": (lambda folder: (folder / f"{FIRST}.txt").write_text("another"), [DEPTH], 0, 1),
    "a removed caption": (lambda folder: (folder / f"{FIRST}.txt").unlink(), [DEPTH], 0, 1),
    "another name": (rename, ["new.depth.npz", "new.mp4"], 0, 1),
    "a copy under an earlier name": (copy, ["a_copy.depth.npz", "a_copy.mp4"], 0, 1),
    "a removed video": (lambda folder: (folder / f"{FIRST}.mp4").unlink(), [], 0, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_second_run_reads_what_was_changed_and_ends_like_a_first_one(config, read, name):
    change, files, num_videos, num_clips = CHANGES[name]
    change(Path(config.input))
    second = inline(config)
    assert read() == files
    assert (second.worked["split"], second.worked["clip"]) == (num_videos, num_clips)
    assert second.worked["hash"] == len(list(Path(config.input).glob("*.mp4")))
    fresh = inline(replace(config, output=f"{config.output}-fresh"))
    assert second.counts == fresh.counts
    assert list(second.rejects) == list(fresh.rejects)
    assert verify(config.output).tree_sha256 == verify(f"{config.output}-fresh").tree_sha256
    inline(config)
    assert verify(config.output).tree_sha256 == verify(f"{config.output}-fresh").tree_sha256


def test_unchanged_videos_do_not_pass_through_the_stage_that_hashes(config, read):
    assert inline(config).stages["identify"].done == 0
    os.utime(Path(config.input, f"{FIRST}.mp4"))
    assert inline(config).stages["identify"].done == 1


def test_a_bug_in_the_check_of_a_group_costs_only_the_fast_path(config, read, monkeypatch):
    def broken(row, config, may_read):
        raise RuntimeError("a bug")

    whole = verify(config.output).tree_sha256
    monkeypatch.setattr(unchanged, "identify", broken)
    result = inline(config)
    assert result.stages["identify"].done == 3
    assert result.worked == {"hash": 3, "split": 0, "clip": 0}
    assert read() == []
    assert not [row for row in result.rejects if row["reason"].startswith("bug:")]
    assert verify(config.output).tree_sha256 == whole


def test_a_group_is_divided_into_unchanged_and_other_videos(config, read):
    sources = [source for source in inputs.expand(config.input) if source.is_video]
    block = np.frombuffer(pack(map(unchanged.line_of, sources)), np.uint8)
    found = unchanged.check_group({"sources": block, "records": np.zeros(0, np.uint8), "digits": 1}, config)
    assert (len(found["contents"]), found["videos_ends"]) == (0, {})
    lines = [json.loads(line) for line in unpack(found["changed"].tobytes())]
    rows = [unchanged.row_of(*source) for _, *source in lines]
    assert [name for name, *_ in lines] == [source.name for source in sources]
    assert [row["name"] for row in rows] == [source.name for source in sources]
    assert all(row["known_source"] is None and not is_bug(row) for row in rows)
    assert read() == []


def test_unchanged_videos_without_a_record_are_streamed(config, read, monkeypatch):
    """Another version of the program keeps no record: no video's clips wait until all videos are split."""
    order = []

    def noted(stage):
        def function(row, config):
            order.append(stage.name)
            return stage.function(row, config)

        return replace(stage, function=function)

    usual = Stages()
    find_shots = tuple(noted(stage) if stage is shots.STAGE else stage for stage in usual.find_shots)
    clip = tuple(noted(stage) if stage is decode.STAGE else stage for stage in usual.clip)
    stages = replace(usual, find_shots=find_shots, clip=clip)
    monkeypatch.setattr(fingerprints, "VIDEO_CODE", fingerprints.VIDEO_CODE + 1)
    config = replace(config, seed=1)  # other clips
    assert inline(config, stages=stages).worked == {"hash": 3, "split": 3, "clip": 3}
    assert order == [shots.STAGE.name, decode.STAGE.name] * 3
    assert inline(config, stages=stages).worked == {"hash": 3, "split": 0, "clip": 0}


def test_a_ledger_that_cannot_be_read_ends_the_run_with_the_cause(config, monkeypatch):
    def broken(url, *more):
        if str(url).endswith(".records"):
            raise OSError("the disk is broken")
        return real(url, *more)

    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", broken)
    with pytest.raises(OSError, match="the disk is broken"):
        inline(config)


def test_a_copy_of_an_unchanged_video_makes_no_clip_before_the_video_does(config, read, monkeypatch):
    """The copy has another caption, so its clips would be others; the first name's are made."""
    monkeypatch.setattr(fingerprints, "VIDEO_CODE", fingerprints.VIDEO_CODE + 1)
    folder = Path(config.input)
    (folder / "z.mp4").write_bytes((folder / f"{FIRST}.mp4").read_bytes())
    (folder / "z.txt").write_text("another caption")
    assert inline(config).worked == {"hash": 4, "split": 3, "clip": 0}
