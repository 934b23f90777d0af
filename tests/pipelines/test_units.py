"""Videos are planned in units, and the way they are divided does not change the plan."""

from __future__ import annotations

import random

import pytest
from small_corpus import inline

from ex4d.data.verify import verify
from pipelines.inputs import Entry, Source, Sources, Span
from pipelines.inputs.sources import Found
from pipelines.preprocess import tables
from pipelines.runtime.scratch import scratch


@pytest.mark.parametrize("keep_staging", ["all", "current"])
def test_units_of_any_size_give_the_same_dataset(config, tmp_path, monkeypatch, keep_staging):
    inline(config)
    whole = verify(config.output, full=True).tree_sha256
    monkeypatch.setattr(tables, "UNIT_VIDEOS", 1)
    small = type(config)(**vars(config) | {"output": str(tmp_path / "units"), "keep_staging": keep_staging})
    inline(small)
    assert inline(small).worked == {"hash": 4, "split": 0, "clip": 0}
    assert verify(small.output, full=True).tree_sha256 == whole


def test_units_hold_each_content_once_under_its_first_name():
    table = tables.Tables(scratch())
    contents = [f"{random.Random(number).getrandbits(256):064x}" for number in range(300)]
    for number, content in enumerate([*contents, *contents[:50]]):
        table.add_video(
            {"content": content, "sha256": content, "name": f"{number:03d}.mp4", "key": f"{number:03d}.mp4"}
        )
    assert [row["name"] for row, _ in table.duplicates()] == [f"{number:03d}.mp4" for number in range(300, 350)]
    assert table.units() == [""]
    for prefixes in ([""], list(tables.HEX), [a + b for a in tables.HEX for b in tables.HEX]):
        found = [row for prefix in prefixes for row in table.videos(prefix)]
        assert [row["content"] for row in found] == sorted(contents)
        assert {row["name"] for row in found} == {f"{number:03d}.mp4" for number in range(300)}


def test_sources_come_back_as_they_were_put_in():
    sources = [
        Source(
            "/in/a\udcff.mp4", "a.mp4", (Span(0.0, None, "a caption", "CC0"), Span(1.5, 2.0)), "b.avi", "", root="/in"
        ),
        Source("", "list.csv:3", reason="bad_row", message="names no file"),
    ]
    kept = Sources(sources)
    assert list(kept) == list(kept) == sources
    assert (len(kept), kept.num_videos) == (2, 1)


def test_twins_and_sidecars_are_found_whatever_came_first():
    paths = [
        "/in/a/x.mp4",
        "/in/a/x.mov",
        "/in/b/x.mp4",
        "/in/a/x.npz",
        "/in/a/x.mp4.txt",
        "/in/a/y.npz",
        "/in/a/notes.md",
    ]
    expected = None
    for seed in range(4):
        random.Random(seed).shuffle(paths)
        found = {s.name: (s.twin, s.namesake, s.reason) for s in Found([Entry("/in", path) for path in paths])}
        expected = expected or found
        assert found == expected
        assert list(found) == sorted(found)
    assert expected == {
        "a/notes.md": ("", "", "not_a_video"),
        "a/x.mov": ("a/x.mp4", "a/x.mp4", ""),
        "a/x.mp4": ("a/x.mov", "a/x.mov", ""),
        "a/y.npz": ("", "", "not_a_video"),
        "b/x.mp4": ("", "a/x.mov", ""),
    }


def test_what_is_decided_is_noted_in_time_that_grows_with_the_videos_and_not_with_their_square():
    def steps(count):
        database, names, found = scratch(), [f"{number:064x}" for number in range(count)], []
        table = tables.Tables(database)
        for name in names:
            table.add_video({"content": name, "name": name, "sha256": name})
        database.set_progress_handler(lambda: found.append(1), 100)
        table.decide(dict.fromkeys(names, names[0]), {})
        return len(found)

    assert steps(2000) < 3 * steps(1000)
