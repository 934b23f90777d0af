"""Videos are planned in units, and the way they are divided does not change the plan."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
from small_corpus import choices, inline

from ex4d.data.verify import verify
from pipelines.inputs import Entry, Source, Sources, Span
from pipelines.inputs.sources import Found
from pipelines.preprocess import tables
from pipelines.preprocess.compare import COMPARE, compare_unit, names_of
from pipelines.preprocess.identity import FACTS, Decision
from pipelines.preprocess.units import videos_of
from pipelines.runtime.blocks import columns, pack
from pipelines.runtime.scratch import scratch
from pipelines.runtime.stage import new_row, refused


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
    contents = [f"{random.Random(number).getrandbits(256):064x}" for number in range(300)]
    for digits in range(3):
        table = tables.Tables(scratch(), digits)
        for number, content in enumerate([*contents, *contents[:50]]):
            row = {"content": content, "name": f"{number:03d}.mp4"}
            if number % 2:
                table.add_video(row)
            else:
                table.unchanged.add(content[:digits], pack([json.dumps(row)]))
        table.drop_video(contents[60])
        assert len(table.units()) == 16**digits
        found = [videos_of(table.unit(prefix)) for prefix in table.units()]
        firsts, copies = ([row for unit in found for row in unit[part]] for part in (0, 1))
        assert [row["content"] for row in firsts] == sorted({*contents} - {contents[60]})
        assert {row["name"] for row in firsts} == {f"{number:03d}.mp4" for number in range(300) if number != 60}
        assert {(row["name"], first) for row, first in copies} == {
            (f"{number:03d}.mp4", f"{number - 300:03d}.mp4") for number in range(300, 350)
        }


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


@pytest.mark.parametrize(
    ("num_videos", "ledger_bytes", "digits"), [(1, 0, 0), (4000, 0, 0), (4001, 0, 1), (10**6, 0, 2), (10, 10**9, 2)]
)
def test_the_number_of_units_follows_the_videos_of_the_input_or_of_the_ledger(num_videos, ledger_bytes, digits):
    assert tables.digits_for(num_videos, ledger_bytes) == digits


def test_what_is_decided_is_noted_in_time_that_grows_with_the_videos_and_not_with_their_square():
    def steps(count):
        database, names, found = scratch(), [f"{number:064x}" for number in range(count)], []
        table = tables.Tables(database, 0)
        database.set_progress_handler(lambda: found.append(1), 100)
        table.decide(Decision(name, names[0], None) for name in names)
        return len(found)

    assert steps(2000) < 3 * steps(1000)


def digest(text):
    return hashlib.sha256(str(text).encode()).hexdigest()


def video_row(name, content, sha256=None, other=None):
    """Return the row of a video; `other` is the sha256 of the other camera's video."""
    names = {"artifact": f"videos/{content}.1.json", "refusal_artifact": f"videos/{content}.2.json"}
    more = {} if other is None else {"other_sha256": other}
    return new_row(name, name=name, content=content, sha256=sha256 or content, **names, **more)


def record(other=None):
    """Return the record of a video's shots."""
    more = {} if other is None else {"other": {"hashes": [other[:16]] * 8}}
    return {"refusal": None, "hashes": ["0" * 16] * 8, "info": {"size": [4, 6], "duration_s": 2.0}, **more}


def refusal(reason):
    return {"refusal": refused({}, "bad", "shots", reason, "took long")["refusal"]}


def compared(tmp_path, videos, records, retry=(), tried=(), **more):
    """Compare a unit of these videos."""
    block = pack(json.dumps(video) for video in videos)
    lines = pack(f"{name} {json.dumps(body)}" for name, body in records.items())
    facts = {
        "prefix": "",
        "dropped": [],
        "sizes": {},
        "shards": [],
        "retry": list(retry),
        "tried": [list(row) for row in tried],
    }
    arrays = {name: np.frombuffer(blob, np.uint8) for name, blob in (("videos", block), ("records", lines))}
    found = compare_unit({**arrays, **facts}, choices(tmp_path, tmp_path, **more))
    assert found.keys() == set(COMPARE.writes)
    return found, tables.unpack_rows(found["missing"].tobytes())


def test_copies_are_rejected_by_the_first_name_and_videos_without_a_record_are_missing(tmp_path):
    one, two = video_row("b.mp4", digest(1)), video_row("c.mp4", digest(2))
    copies = [video_row(name, digest(1)) for name in ("z.mp4", "a.mp4")]
    found, missing = compared(tmp_path, [one, copies[0], two, copies[1]], {one["artifact"]: record()})
    rejects = [(row["key"], row["reason"], row["message"]) for row in found["compared"]["rejects"]]
    assert rejects == [(name, "duplicate", "same content as a.mp4") for name in ("b.mp4", "z.mp4")]
    assert [row["name"] for row in missing] == ["c.mp4"]
    assert found["compared"]["num_missing"] == 1
    assert np.frombuffer(found["facts"], FACTS)["sha256"].tobytes().hex() == digest(1)


@pytest.mark.parametrize("retry", [(), ("decode_timeout",), ("other",)])
@pytest.mark.parametrize("tried", ["", "a.mp4", "b.mp4"])
def test_a_rejection_is_retried_for_its_reason_unless_this_run_made_it(tmp_path, retry, tried):
    video = video_row("a.mp4", digest(1))
    name = video["refusal_artifact"]
    refusals = {name: refusal("decode_timeout")}
    found, missing = compared(tmp_path, [video], refusals, retry, [(name, tried)] if tried else [])
    is_retried = retry == ("decode_timeout",) and tried != "a.mp4"
    assert missing == ([video] if is_retried else [])
    assert found["compared"]["retried"] == ({"a.mp4": "decode_timeout"} if is_retried else {})
    assert found["compared"]["changes"]["removed"] == ([name] if is_retried else [])
    assert not len(found["facts"])


def test_pairs_bring_their_content_and_the_look_of_the_other_video(tmp_path):
    pair, alone = video_row("a.mp4", digest(1), digest("a"), digest("other")), video_row("b.mp4", digest("b"))
    bodies = {pair["artifact"]: record(digest("look")), alone["artifact"]: record()}
    found, missing = compared(tmp_path, [pair, alone], bodies, near_duplicates="filter")
    assert missing == []
    assert found["compared"]["pairs"] == [(digest(1), digest("a"))]
    facts, looks = np.frombuffer(found["facts"], FACTS), found["hashes"].tobytes()
    names, owners = ([one.tobytes().hex() for one in facts[column]] for column in ("sha256", "owner"))
    both = list(zip(names, owners, strict=True))
    assert set(both) == {(digest("a"), digest("a")), (digest("other"), digest("a")), (digest("b"), digest("b"))}
    place = 64 * both.index((digest("other"), digest("a")))
    assert looks[place : place + 64] == bytes.fromhex(digest("look")[:16])[::-1] * 8
    assert sorted(facts["pixels"].tolist()) == [0, 24, 24]
    assert sorted(facts["duration_s"].tolist()) == [0.0, 2.0, 2.0]
    assert sorted(found["names_ends"]) == sorted({digest("a")[:2], digest("b")[:2]})
    assert compared(tmp_path, [pair, alone], bodies, near_duplicates="group")[0]["names_ends"] == {}


def test_a_video_whose_record_is_a_rejection_is_neither_compared_nor_missing(tmp_path):
    videos = [video_row(f"{number}.mp4", digest(number)) for number in range(2)]
    bodies = {videos[0]["artifact"]: refusal("shot_length"), videos[1]["refusal_artifact"]: refusal("decode_timeout")}
    found, missing = compared(tmp_path, videos, bodies)
    assert missing == []
    assert not len(found["facts"])


@pytest.mark.parametrize("digits", [0, 2])
def test_finished_samples_are_in_packing_order_however_they_were_found(digits):
    """Blocks come from units in any order, rows one by one."""
    rng = random.Random(digits)
    table = tables.Tables(scratch(), digits)
    clips = [
        tables.Clip(rng.choice(["train", "val"]), f"{digest(number)[:16]}-0", f"clips/{number}.tar", number, digest(0))
        for number in range(200)
    ]
    rows, in_blocks = clips[:70], clips[70:]
    table.add_staged(rows[:30])
    for prefix in random.Random(0).sample(table.units(), len(table.units())):
        own = sorted(clip for clip in in_blocks if clip.key.startswith(prefix))
        groups = {
            f"{split}/{prefix}": [json.dumps(clip) for clip in own if clip.split == split] for split in ("train", "val")
        }
        table.add_staged_of({"planned": {"num_staged": len(own)}, **columns("staged", groups)})
    table.add_staged(rows[30:])
    assert list(table.staged()) == sorted(clips)
    assert table.num_staged() == 200
    some = [clips[10], clips[100]]
    assert sorted(table.artifacts(clip.key for clip in some)) == sorted(clip.artifact for clip in some)
    assert table.artifacts(["none"]) == []


def test_decisions_reach_the_units_of_pairs_and_name_the_video_that_replaces_another(tmp_path):
    config = choices(tmp_path, tmp_path, near_duplicates="filter")
    table = tables.Tables(scratch(), 1)
    plain, group, best = (digest(number) for number in ("plain", "group", "best"))
    contents = [letter * 64 for letter in "0af"]
    pairs = [(contents[0], digest("pair")), (contents[1], digest("pair")), (contents[2], best)]
    table.add_pairs(pairs)
    for videos in ([("z.mp4", contents[2], best), ("c.mp4", plain, plain)], [("b.mp4", contents[1], best)]):
        table.add_names(names_of([video_row(name, content, sha256) for name, content, sha256 in videos], config))
    table.decide([Decision(plain, group, None), Decision(digest("pair"), group, best)])
    pair = {digest("pair"): [group, "b.mp4"]}
    found = {prefix: table.decided(prefix) for prefix in table.units()}
    assert found["0"].items() >= pair.items()
    assert found["a"].items() >= pair.items()
    assert best not in found["f"]
    assert found[plain[0]][plain] == [group, None]
    everywhere = {sha256: values for unit in found.values() for sha256, values in unit.items()}
    assert everywhere == {plain: [group, None]} | pair == table.decided("")


def test_no_name_is_stored_where_none_is_looked_up(tmp_path):
    row = video_row("a.mp4", digest(1))
    for how, places in (("group", []), ("off", []), ("filter", [digest(1)[:2]])):
        assert list(names_of([row], choices(tmp_path, tmp_path, near_duplicates=how))["names_ends"]) == places
