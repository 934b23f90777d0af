"""The staging folder says what is done."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import replace

import flaky_store
import pytest

from ex4d import storage
from ex4d.config import validate
from ex4d.errors import ConfigError
from pipelines.preprocess.filters import FilterConfig
from pipelines.preprocess.fingerprints import ClipNames, video_fingerprints
from pipelines.preprocess.settings import DecodeLimits, PreprocessConfig
from pipelines.preprocess.tables import HEX
from pipelines.runtime import parts, records
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.ledger import Ledger, superseded

CONFIG = PreprocessConfig(output="unused", num_frames=5, clips_per_shot=10)


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
        assert ledger.load_files({"clips/b.2.json": "b", "videos/d.3.json": "d", "scores/e.3.json": "e"}) == set()
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
    assert ledger.load_files(names) == set(bad)
    assert list(ledger.records) == ["clips/good.1.json", "scores/good.1.json"]
    for again in (ledger, Ledger(str(tmp_path))):
        assert again.names() == {"clips/good.1.json", "scores/good.1.json"}
    for name, blob in bad.items():
        assert (tmp_path / "staging" / "damaged" / name.replace("/", "-")).read_bytes() == blob
        assert name in caplog.text
