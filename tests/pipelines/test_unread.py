"""The record of a local file saves the next run from reading it, as long as the file is unchanged."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ex4d import hub, storage
from ex4d.geometry.masks import MaskConfig
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.preprocess import fetch
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig
from pipelines.runtime.ledger import Ledger


@pytest.fixture
def config(tmp_path):
    write_corpus(tmp_path / "in", SyntheticConfig(num_videos=3, num_frames=5, size=(32, 32), supersample=1))
    masks = MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0)
    return PreprocessConfig(
        input=str(tmp_path / "in"), output=str(tmp_path / "out"), num_frames=5, size=(32, 32), masks=masks
    )


def first_of(config, suffix):
    return min(os.path.join(config.input, name) for name in os.listdir(config.input) if name.endswith(suffix))


def test_a_second_run_reads_only_what_was_changed(config, monkeypatch, read):
    monkeypatch.setattr(hub, "SETTLED_S", -1.0)
    first = preprocess.run(config, runner_name="inline")
    assert first.counts["samples"] == 3
    assert len({name for name in read if name.endswith((".mp4", ".npz"))}) == 6
    read.clear()
    assert preprocess.run(config, runner_name="inline").worked["clip"] == 0
    assert not [name for name in read if name.endswith((".mp4", ".npz"))]
    # Other bytes of the same size with the old mtime restored: only the inode's change time reveals it.
    changed = first_of(config, ".npz")
    before = os.stat(changed)
    with open(changed, "r+b") as file:
        file.seek(10)  # the time of the zip's first member, which nobody reads
        file.write(b"\1\2")
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    result = preprocess.run(config, runner_name="inline")
    assert {name for name in read if name.endswith((".mp4", ".npz"))} == {os.path.basename(changed)}
    assert result.worked["clip"] == 1


def test_depth_may_be_named_by_a_url_of_this_machine(config, tmp_path):
    (tmp_path / "maps").mkdir()
    for name in os.listdir(config.input):
        if name.endswith(".npz"):
            os.rename(os.path.join(config.input, name), tmp_path / "maps" / name)
    result = preprocess.run(replace(config, depth_path=(tmp_path / "maps").as_uri()), runner_name="inline")
    assert result.counts["samples"] == 3


def test_a_link_that_leads_to_another_file_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SETTLED_S", -1.0)
    times = os.stat(tmp_path)
    facts = {"st_size": 4, "st_mtime_ns": times.st_mtime_ns, "st_ctime_ns": times.st_ctime_ns}
    tags = []
    for inode in (1, 2):  # two files of one size that were written within a tick of a coarse clock
        stat = SimpleNamespace(**facts, st_ctime=times.st_ctime, st_ino=inode)
        monkeypatch.setattr(fetch.storage, "local_path", lambda _path, stat=stat: SimpleNamespace(stat=lambda: stat))
        tags.append(fetch._stamp(["link"]))
    assert tags[0] != tags[1]


def test_a_file_that_was_changed_a_moment_ago_is_not_trusted(config, monkeypatch):
    monkeypatch.setattr(hub, "SETTLED_S", 3600.0)
    preprocess.run(config, runner_name="inline")
    assert not [name for name in Ledger(config.output).records if name.startswith("sources/")]


def test_a_note_of_another_file_or_of_another_form_is_not_taken(config, monkeypatch):
    monkeypatch.setattr(hub, "SETTLED_S", -1.0)
    path = first_of(config, ".mp4")
    local = fetch.Local({})
    truth = local.digest([path], "video", lambda: storage.sha256(path))
    note = local.found["video"]
    assert fetch.Local({"video": note}).digest([path], "video", lambda: "unread") == truth
    for wrong in ({"url": path + "x"}, {"tag": "0 0 0"}, {"sha256": "../../etc"}, {"size_bytes": "5"}, {"tag": ""}):
        found = fetch.Local({"video": note | wrong}).digest([path], "video", lambda: "read again")
        assert found == ("read again", truth[1])
