"""The staging folder says what is done; and the plan of clips, which decides what is to do."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import replace
from fractions import Fraction

import flaky_store
import numpy as np
import pytest

from ex4d import storage
from ex4d.config import validate
from ex4d.errors import ConfigError, Filtered
from pipelines.preprocess import clips
from pipelines.preprocess.filters import FilterConfig
from pipelines.preprocess.fingerprints import ClipNames, video_fingerprints
from pipelines.preprocess.settings import DecodeLimits, PreprocessConfig
from pipelines.preprocess.stages.shots import pack_pts, unpack_pts
from pipelines.preprocess.tables import HEX
from pipelines.runtime import parts, records
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.ledger import Ledger, superseded

CONFIG = PreprocessConfig(output="unused", num_frames=5, clips_per_shot=10)


def record(num_frames=40, cuts=(), step=512, time_base=(1, 12288), pts=None):
    pts = [step * index for index in range(num_frames)] if pts is None else pts
    info = {"time_base": list(time_base), "size": [48, 64]}
    shots = [{"box": [0, 0, 48, 64], "bars": 0.0, "logo": 0.0}] * (len(cuts) + 1)
    return {"info": info, "pts_runs": pack_pts(pts), "cuts": list(cuts), "shots": shots}


REFUSAL = {"fate": "bad", "stage": "decode", "reason": "decode_timeout", "message": "took long"}


def old_file(folder, name, body):
    """Write a record as before the introduction of parts: in its own file."""
    (folder / "staging" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "staging" / name).write_text(json.dumps(body))


@pytest.mark.parametrize("where", ["folder", "store"])
def test_what_was_written_down_is_known_to_the_next_run(tmp_path, where):
    output = str(tmp_path) if where == "folder" else f"memory://{tmp_path.name}"
    ledger = Ledger(output)
    assert ledger.names() == set()
    ledger.finished("clips/a.1.tar", ledger.write_sample("clips/a.1.tar", b"blocks") | {"scores": {"motion": 0.5}})
    ledger.records.add("clips/b.2.json", REFUSAL)
    ledger.records.add("clips/c.2.json", REFUSAL)
    ledger.records.add("videos/d.3.json", {"refusal": REFUSAL})
    ledger.records.flush()
    storage.write_bytes(storage.join(output, "staging/clips/.tmp-0123-f.1.tar"), b"a write that was killed")
    ledger = Ledger(output)
    names = {"clips/a.1.tar", "clips/b.2.json", "clips/c.2.json", "videos/d.3.json"}
    assert ledger.names() == names
    assert all(name in ledger for name in names)
    assert ledger.records.get("clips/b.2.json") == REFUSAL
    digest = hashlib.sha256(b"blocks").hexdigest()
    assert ledger.records.get("clips/a.1.tar") == {"scores": {"motion": 0.5}, "sha256": digest, "size": 6}
    ledger.remove("clips/b.2.json")
    ledger.remove("videos/d.3.json")
    ledger.remove("clips/a.1.tar")
    ledger.records.flush()
    ledger = Ledger(output)
    assert ledger.names() == {"clips/c.2.json"}
    assert not storage.exists(ledger.url("clips/a.1.tar"))
    ledger.records.add("clips/b.2.json", REFUSAL)
    ledger.records.flush()
    assert Ledger(output).names() == {"clips/b.2.json", "clips/c.2.json"}


def test_a_sample_is_where_its_file_is_and_not_where_a_record_says_so(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.finished("clips/a.1.tar", ledger.write_sample("clips/a.1.tar", b"blocks"))
    (tmp_path / "staging/clips/a.1.tar").unlink()
    ledger = Ledger(str(tmp_path))
    assert "clips/a.1.tar" not in ledger
    assert ledger.names() == set()


def test_records_that_are_files_of_their_own_are_still_read(tmp_path):
    old_file(tmp_path, "clips/b.2.json", REFUSAL)
    old_file(tmp_path, "videos/d.3.json", {"refusal": REFUSAL})
    old_file(tmp_path, "scores/e.3.json", {"motion": 0.5})
    for number in range(2):
        ledger = Ledger(str(tmp_path))
        assert ledger.names() == {"clips/b.2.json", "videos/d.3.json", "scores/e.3.json"}
        assert len(list(ledger.records)) == 3 * number
        assert ledger.take({"clips/b.2.json": "b", "videos/d.3.json": "d", "scores/e.3.json": "e"}) == set()
        assert ledger.records.get("scores/e.3.json") == {"motion": 0.5}
    ledger.remove("clips/b.2.json")
    assert "clips/b.2.json" not in Ledger(str(tmp_path))


def test_a_run_that_was_killed_has_written_down_what_it_knew(tmp_path):
    """Records are written to a disk line by line; the line that a kill cuts off costs one row."""
    ledger = Ledger(str(tmp_path))
    for number in range(3):
        ledger.records.add(f"clips/{number}.1.json", REFUSAL)
    (part,) = (tmp_path / "staging/records").iterdir()
    part.write_bytes(part.read_bytes()[:-20])
    assert Ledger(str(tmp_path)).names() == {"clips/0.1.json", "clips/1.1.json"}


def test_a_store_gets_a_part_every_few_seconds_and_not_a_file_a_record(tmp_path, monkeypatch):
    ledger = Ledger(f"memory://{tmp_path.name}")
    for number in range(records.PART_RECORDS + 10):
        ledger.records.add(f"clips/{number}.1.json", REFUSAL)
    folder = f"memory://{tmp_path.name}/staging/records"
    assert len(storage.list_files(folder)) == 1
    monkeypatch.setattr(records, "PART_EVERY_S", 0.0)
    ledger.records.add("clips/last.1.json", REFUSAL)
    assert len(storage.list_files(folder)) == 2
    assert len(Ledger(f"memory://{tmp_path.name}").names()) == records.PART_RECORDS + 11


def test_a_long_listing_of_a_bucket_is_asked_for_by_first_letters_and_is_whole(monkeypatch):
    with flaky_store.object_store(share=0.0) as (address, store):
        flaky_store.use(monkeypatch, address)
        import boto3

        boto3.client("s3").create_bucket(Bucket="bucket")
        ledger = Ledger("s3://bucket/out")
        names = {f"clips/{letter}b.1.tar" for letter in "09azk"}
        for name in names:
            ledger.finished(name, ledger.write_sample(name, b"blocks"))
        ledger.records.flush()
        store.asked.clear()
        assert Ledger("s3://bucket/out").names() == names
        few = store.asked["list"]
        monkeypatch.setattr("pipelines.runtime.ledger.MANY", (2, 100))
        assert Ledger("s3://bucket/out").names() == names
        assert store.asked["list"] - few > few


@pytest.mark.parametrize("damage", ["a flipped bit", "a cut", "another program's line"])
def test_a_damaged_part_costs_the_records_that_are_damaged(tmp_path, damage, caplog):
    ledger = Ledger(str(tmp_path))
    for number in range(5):
        ledger.records.add(f"clips/{number}.1.json", REFUSAL)
    ledger.records.flush()
    (part,) = (tmp_path / "staging/records").iterdir()
    whole = part.read_bytes()
    at = whole.index(b"clips/4")
    broken = {
        "a flipped bit": whole[: at + 30] + bytes([whole[at + 30] ^ 1]) + whole[at + 31 :],
        "a cut": whole[: at + 30],
        "another program's line": whole[: at - 9] + b'{"a":1}\n',
    }[damage]
    part.write_bytes(broken)
    assert Ledger(str(tmp_path)).names() == {f"clips/{number}.1.json" for number in range(4)}
    assert (tmp_path / "staging/damaged" / part.name).read_bytes() == broken
    assert str(part) in caplog.text
    assert "lines [5]" in caplog.text
    caplog.clear()
    assert len(Ledger(str(tmp_path)).names()) == 4
    assert caplog.text == ""


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of three records, each read by a call of its own."""
    monkeypatch.setattr(records, "PART_RECORDS", 3)
    monkeypatch.setattr(records, "PARTS_AT_ONCE", 1)


NAMES = [
    f"{folder}/{hashlib.sha256(bytes([number])).hexdigest()[:8]}.1.json"
    for folder in ("videos", "clips", "scores", "sources")
    for number in range(8)
]


def change(ledger, expected, seed):
    """Add, replace and delete records at random; `expected` is changed likewise."""
    rng = random.Random(seed)
    for number in range(60):
        name = rng.choice(NAMES)
        if name in expected and rng.random() < 0.5:
            del expected[name]
            ledger.records.forget(name)
        else:
            expected[name] = {"number": number, "seed": seed}
            ledger.records.add(name, expected[name])


def check(ledger, expected):
    """Check all ways to look up a record, each before and after the records are settled."""
    for _ in range(2):
        assert {name: ledger.get(name) for name in NAMES} == {name: expected.get(name) for name in NAMES}
        artifacts = [name for name in NAMES if not name.startswith("sources")]
        assert [name for name in artifacts if ledger.records.may_have(name)] == [
            name for name in artifacts if name in expected
        ]
        for prefix in HEX if ledger.digits else [""]:
            prefix = prefix.ljust(ledger.digits, "0")
            wanted = {name: body for name, body in expected.items() if name.partition("/")[2].startswith(prefix)}
            found = records.merged(ledger.records.unit(prefix))
            assert {name: json.loads(body) for name, body in found.items()} == {
                name: body for name, body in wanted.items() if name in artifacts
            }
        assert list(ledger.records) == sorted(expected)
        assert ledger.names() == {name for name in expected if name in artifacts}


def backwards(rows, number):
    """Read the parts as Ray may: what was read last comes first."""
    done = [row | parts.read_parts(row, None) for row in rows]
    assert len(done) == number
    return reversed(done)


@pytest.mark.parametrize("digits", [0, 1, 2])
@pytest.mark.parametrize("read", [None, backwards])
def test_groups_of_parts_say_what_was_written_last_in_whatever_order_they_are_read(
    tmp_path, small_parts, digits, read, monkeypatch
):
    expected = {}
    for seed in range(2):
        change(ledger := Ledger(str(tmp_path), digits), expected, seed)
        ledger.records.flush()
    assert len(list((tmp_path / "staging/records").iterdir())) == 40
    check(Ledger(str(tmp_path), digits, read), expected)
    monkeypatch.setattr(records, "PARTS_AT_ONCE", 100)
    check(Ledger(str(tmp_path), digits, read), expected)


@pytest.mark.parametrize("digits", [0, 2])
def test_what_this_run_writes_replaces_what_earlier_runs_wrote(tmp_path, small_parts, digits):
    expected = {}
    change(ledger := Ledger(str(tmp_path), digits), expected, 0)
    ledger.records.flush()
    ledger = Ledger(str(tmp_path), digits, backwards)
    for seed in range(1, 4):
        change(ledger, expected, seed)
        check(ledger, expected)


def test_what_earlier_runs_recorded_of_sources_is_found_by_the_first_digits(tmp_path, small_parts):
    expected = {}
    change(ledger := Ledger(str(tmp_path)), expected, 0)
    ledger.records.flush()
    assert not ledger.records.has_sources
    ledger = Ledger(str(tmp_path), 2, backwards)
    assert ledger.records.has_sources
    for prefix in ("", *HEX):
        found = records.merged(ledger.records.sources(prefix))
        wanted = {name: body for name, body in expected.items() if name.startswith(f"sources/{prefix}")}
        assert {name: json.loads(body) for name, body in found.items()} == wanted


def test_a_rewrite_keeps_exactly_the_records_that_were_not_deleted(tmp_path, small_parts):
    expected = {}
    change(ledger := Ledger(str(tmp_path), 1), expected, 0)
    ledger.records.flush()
    change(ledger := Ledger(str(tmp_path), 1), expected, 1)
    for seed in range(2, 5):
        ledger.records.rewrite()
        parts = list((tmp_path / "staging/records").iterdir())
        assert len(parts) == -(-len(expected) // 3)
        lines = [line for part in parts for line in part.read_text().splitlines()]
        assert sorted(line.split(" ", 2)[1] for line in lines) == sorted(expected)
        check(Ledger(str(tmp_path), 1, backwards), expected)
        check(ledger, expected)
        change(ledger, expected, seed)
        check(ledger, expected)


def test_damage_in_one_of_several_groups_costs_only_its_lines(tmp_path, small_parts, caplog):
    ledger = Ledger(str(tmp_path))
    for number in range(12):
        ledger.records.add(f"clips/{number:02d}.1.json", REFUSAL)
    part = sorted((tmp_path / "staging/records").iterdir())[2]
    whole = part.read_bytes()
    part.write_bytes(whole.replace(b"decode_timeout", b"decode_timeouT", 1))
    kept = {f"clips/{number:02d}.1.json" for number in range(12) if number != 6}
    ledger = Ledger(str(tmp_path), read=backwards)
    assert ledger.names() == kept
    assert not ledger.records.may_have("clips/06.1.json")
    assert "lines [1]" in caplog.text
    assert [path.name for path in (tmp_path / "staging/damaged").iterdir()] == [part.name]
    caplog.clear()
    assert Ledger(str(tmp_path)).names() == kept
    assert caplog.text == ""


def test_a_sweep_takes_what_killed_runs_left_and_nothing_else(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.write_sample("clips/a.1.tar", b"blocks")
    half = tmp_path / "staging" / "clips" / ".tmp-0123-b.1.tar"
    half.write_bytes(b"half")
    Attempts(str(tmp_path), 3).begin("decode", ["clip"])
    account = tmp_path / "staging" / "attempts.json"
    assert account.exists()
    ledger.sweep()
    assert not half.exists()
    assert not account.exists()
    assert Ledger(str(tmp_path)).names() == {"clips/a.1.tar"}


def test_only_what_was_superseded_is_pruned(tmp_path):
    ledger = Ledger(str(tmp_path))
    ledger.records.add("videos/x.1.json", {"refusal": REFUSAL})
    here, gone = "a" * 16, "b" * 16
    for key in (f"{here}-000000-000008-9", f"{here}-000000-000016-17", f"{gone}-000000-000008-9"):
        for made in ("1", "2"):
            ledger.finished(f"clips/{key}.{made}.tar", ledger.write_sample(f"clips/{key}.{made}.tar", b"blocks"))
            ledger.records.add(f"scores/{key}.{made}.json", {"motion": 0.5})
    used = {f"clips/{here}-000000-000008-9.2.tar", f"clips/{here}-000000-000008-9.3.json"}
    old = superseded(ledger.names(), used)
    ledger.prune(old)
    assert len(old) == 3 + 4
    kept = {f"clips/{here}-000000-000008-9.2.tar"} | {f"clips/{gone}-000000-000008-9.{made}.tar" for made in "12"}
    kept |= {f"scores/{gone}-000000-000008-9.{made}.json" for made in "12"} | {"videos/x.1.json"}
    for again in (ledger, Ledger(str(tmp_path))):
        assert again.names() == kept
    assert len(list((tmp_path / "staging/records").iterdir())) == 1


def test_a_row_is_given_up_after_so_many_deaths_in_a_run(tmp_path):
    attempts = Attempts(str(tmp_path), 3)
    for _ in range(3):
        assert attempts.may("decode", "clip")
        attempts.begin("decode", ["clip", "other"])
        attempts.died("decode", ["clip"])
    assert not attempts.may("decode", "clip")
    assert attempts.may("decode", "other")
    assert attempts.may("depth", "clip")


def test_a_row_that_ended_well_starts_anew(tmp_path):
    attempts = Attempts(str(tmp_path), 2)
    for _ in range(5):
        attempts.begin("decode", ["clip"])
        attempts.died("decode", ["clip"])
        assert attempts.may("decode", "clip")
        attempts.end("decode", ["clip"])
    attempts.begin("decode", ["next"])
    assert Attempts(str(tmp_path), 2).earlier == {"decode next": 1}


@pytest.mark.parametrize("where", ["folder", "store"])
def test_deaths_with_whole_runs_count_less_but_not_for_ever(tmp_path, where):
    """A killed run also counts deaths of innocent rows; a row that kills every run is found nevertheless."""
    output = str(tmp_path) if where == "folder" else f"memory://{tmp_path.name}"
    tried = []
    for _ in range(12):
        run = Attempts(output, 3)
        tried.append(run.may("decode", "clip"))
        run.begin("decode", ["clip"])
    assert tried == [True] * 9 + [False] * 3


def test_an_account_of_attempts_that_is_damaged_starts_anew(tmp_path, caplog):
    Attempts(str(tmp_path), 3).begin("decode", ["clip"])
    (tmp_path / "staging" / "attempts.json").write_text('["no account"]')
    assert Attempts(str(tmp_path), 3).earlier == {}
    assert "replaced by an empty one" in caplog.text


def test_a_run_keeps_its_choices_but_no_secret(tmp_path):
    ledger = Ledger(str(tmp_path))
    with pytest.raises(ConfigError, match="has written to"):
        ledger.read_config()
    ledger.write_config({"preprocess": replace(CONFIG, input=["s3://bucket/a?.mp4", "b.mp4"]), "ray": None})
    folder, sections = ledger.read_config()
    assert folder == os.getcwd()
    assert validate(PreprocessConfig, sections["preprocess"], "preprocess").input == ["s3://bucket/a?.mp4", "b.mp4"]
    for secret in ("https://me:hunter2@example.org/a.mp4", "https://example.org/a.mp4?X-Signature=hunter2"):
        ledger.write_config({"preprocess": replace(CONFIG, input=secret)})
        assert "hunter2" not in (tmp_path / "staging" / "config.json").read_text()
        with pytest.raises(ConfigError, match="--config"):
            ledger.read_config()


def test_fingerprints_cover_what_an_artifact_depends_on_and_nothing_else():
    facts = {"sha256": "0" * 64, "caption": "", "pts": [0], "fps": 25.0, "box": [0, 0, 9, 9], "shot_scores": {}}

    def clip_fingerprints(config, facts):
        return ClipNames(config).of(facts)[:2]

    sample, refusal = clip_fingerprints(CONFIG, facts)
    for change in ({"num_workers": 7}, {"output": "x"}, {"max_bad_fraction": 1.0}, {"val_fraction": 0.5}):
        assert clip_fingerprints(replace(CONFIG, **change), facts) == (sample, refusal)
    for change in ({"limits": DecodeLimits(timeout_s=1)}, {"filters": FilterConfig(min_motion=0.1)}):
        other = clip_fingerprints(replace(CONFIG, **change), facts)
        assert other[0] == sample
        assert other[1] != refusal
    for change in ({"seed": 1}, {"size": (64, 64)}, {"fov_deg": 60.0}, {"depth": "parallax"}, {"fit": "pad"}):
        assert clip_fingerprints(replace(CONFIG, **change), facts)[0] != sample
    assert clip_fingerprints(CONFIG, facts | {"caption": "a dog"})[0] != sample
    assert video_fingerprints(replace(CONFIG, size=(64, 64))) == video_fingerprints(CONFIG)


@pytest.mark.parametrize("pts", [[0], [-512, 0, 512, 1024], [3, 4, 6, 9, 10, 11, 20], list(range(0, 9000, 512))])
def test_pts_survive_packing(pts):
    assert unpack_pts(pack_pts(pts)) == pts


def test_a_constant_rate_packs_small():
    assert pack_pts(range(0, 108_000 * 512, 512)) == [0, [512, 107_999]]


def test_clips_are_disjoint_inside_their_shots_and_keyed_by_span():
    plan = clips.plan("ab" * 32, record(40, cuts=[12, 30]), CONFIG)
    shots = [range(0, 12), range(12, 30), range(30, 40)]
    assert [sum(clip.frame_index[0] in shot for clip in plan) for shot in shots] == [2, 3, 2]
    taken = [index for clip in plan for index in clip.frame_index]
    assert len(taken) == len(set(taken))
    for clip in plan:
        assert any(set(clip.frame_index) <= set(shot) for shot in shots)
        assert clip.pts == [512 * index for index in clip.frame_index]
        assert clip.fps == pytest.approx(24)
    assert len({clip.key for clip in plan}) == len(plan)
    assert plan[0].key.startswith("abababababababab-0000")


def test_caps_spread_over_the_video():
    config = replace(CONFIG, clips_per_shot=1, clips_per_video=2)
    plan = clips.plan("ab" * 32, record(80, cuts=[20, 40, 60]), config)
    assert [clip.frame_index[0] // 20 for clip in plan] == [1, 3]


def test_stride_and_rate_choose_frames():
    (clip,) = clips.plan("ab" * 32, record(13), replace(CONFIG, stride=3))
    assert clip.frame_index == [0, 3, 6, 9, 12]
    assert clip.fps == pytest.approx(8)
    (clip,) = clips.plan("ab" * 32, record(9), replace(CONFIG, fps=12.0))
    assert clip.frame_index == [0, 2, 4, 6, 8]
    assert clip.fps == 12.0


def test_times_in_the_source_are_those_of_exact_fractions():
    rng = np.random.default_rng(0)
    pts = (-7 + np.cumsum(rng.integers(990, 1013, 300))).tolist()
    facts = record(pts=pts, time_base=(1001, 30_000_007))
    tick_s = Fraction(1001, 30_000_007)
    for clip in clips.plan("ab" * 32, facts, replace(CONFIG, clips_per_shot=9)):
        found = clips.in_source(clip, facts)
        assert found["frame_s"] == [float((tick - pts[0]) * tick_s) for tick in clip.pts]
        assert found["source_s"] == float((pts[-1] - pts[0]) * tick_s)
        assert found["source_frames"] == len(pts)


def test_a_wanted_rate_takes_the_nearest_frame_of_a_variable_one():
    rng = np.random.default_rng(0)
    pts = np.cumsum(rng.integers(20, 60, 200)).tolist()
    config = replace(CONFIG, fps=5.0, clips_per_shot=3)
    for clip in clips.plan("ab" * 32, record(pts=pts, time_base=(1, 1000)), config):
        seconds = (np.array(clip.pts) - pts[0]) / 1000
        assert np.abs(seconds * 5 - np.round(seconds * 5)).max() <= 0.5 * 0.06 * 5


def test_why_a_video_gives_no_clip():
    with pytest.raises(Filtered, match="shot_length"):
        clips.plan("ab" * 32, record(40, cuts=range(4, 40, 4)), CONFIG)
    with pytest.raises(Filtered, match="frame_rate") as caught:
        clips.plan("ab" * 32, record(40), replace(CONFIG, fps=60.0))
    assert caught.value.score == pytest.approx(24)
    with pytest.raises(Filtered, match="shot_length"):
        clips.plan("ab" * 32, record(40), replace(CONFIG, min_shot_s=3.0))


def test_attempts_that_cannot_be_written_down_stop_nothing(tmp_path, caplog):
    (tmp_path / "staging").write_text("a file where the folder should be")
    attempts = Attempts(str(tmp_path), 3)
    attempts.begin("decode", ["key"])
    attempts.end("decode", ["key"])
    assert "cannot be recorded" in caplog.text


def test_damaged_files_are_set_aside_and_named(tmp_path, caplog):
    old_file(tmp_path, "clips/good.1.json", REFUSAL)
    old_file(tmp_path, "scores/good.1.json", {"motion": 0.5})
    bad = {
        "clips/a.1.json": b'{"a":1}',
        "clips/b.1.json": b"{no json",
        "clips/c.1.tar": b"no sample",
        "videos/d.1.json": b'{"refusal": null}',
        "videos/e.1.json": b"[1]",
        "scores/f.1.json": b'{"motion": "fast"}',
    }
    for name, blob in bad.items():
        storage.write_bytes(tmp_path / "staging" / name, blob)
    ledger = Ledger(str(tmp_path))
    names = {name: name.partition("/")[2].partition(".")[0] for name in ledger.names()}
    assert ledger.take(names) == set(bad)
    assert list(ledger.records) == ["clips/good.1.json", "scores/good.1.json"]
    for again in (ledger, Ledger(str(tmp_path))):
        assert again.names() == {"clips/good.1.json", "scores/good.1.json"}
    for name, blob in bad.items():
        assert (tmp_path / "staging" / "damaged" / name.replace("/", "-")).read_bytes() == blob
        assert name in caplog.text
