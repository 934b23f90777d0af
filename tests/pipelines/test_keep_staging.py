"""Staging may be dropped: the shards are then the ledger of the samples, and nothing is lost or made twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_corpus import inline

from ex4d import storage
from ex4d.data import building, shards
from ex4d.data.manifest import MANIFEST, read_table
from ex4d.data.verify import verify
from pipelines.runtime import packed
from pipelines.runtime.ledger import Ledger


def tree(config):
    report = verify(config.output, full=True)
    assert report.problems == ()
    return report.tree_sha256


def staged(config):
    return list(Path(config.output, "staging", "clips").glob("*.tar"))


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of two samples or so."""
    whole = shards.pack_contents
    monkeypatch.setattr(
        shards,
        "pack_contents",
        lambda contents, output, facts, size, **more: whole(contents, output, facts, 25_000, **more),
    )


def test_the_dataset_is_the_same_whatever_is_kept(config, tmp_path, small_shards):
    found = {}
    for keep in ("all", "current", "none"):
        chosen = replace(config, output=str(tmp_path / keep), keep_staging=keep)
        assert inline(chosen).counts["samples"] == 12
        assert len(list(Path(chosen.output, "shards").iterdir())) > 3
        assert inline(chosen).worked == {"hash": 4, "split": 0, "clip": 0}
        found[keep] = tree(chosen)
        assert len(staged(chosen)) == (0 if keep == "none" else 12)
    assert len(set(found.values())) == 1


def test_samples_are_put_back_where_shards_change(config, corpus, tmp_path, small_shards):
    """A video that is added later moves samples of others into other shards."""
    some = tmp_path / "some"
    shutil.copytree(corpus, some)
    for path in some.glob("synthetic-*-00001.*"):
        path.unlink()
    grown = replace(config, input=str(some), output=str(tmp_path / "grown"), keep_staging="none")
    assert inline(grown).counts["samples"] == 9
    shutil.copytree(corpus, some, dirs_exist_ok=True)
    assert inline(grown).worked == {"hash": 4, "split": 1, "clip": 3}
    inline(config)
    assert tree(grown) == tree(config)
    assert staged(grown) == []
    kept = replace(grown, keep_staging="all")  # dropped artifacts do not come back
    assert inline(kept).worked["clip"] == 0
    assert staged(grown) == []


@pytest.mark.parametrize("when", ["before a shard", "after it", "after its rows"])
def test_a_run_that_ends_while_shards_change_loses_nothing(config, corpus, tmp_path, small_shards, monkeypatch, when):
    config = replace(config, val_fraction=0.0)
    inline(config)
    dropped = replace(config, output=str(tmp_path / "dropped"), keep_staging="none", val_fraction=1.0)
    inline(dropped)
    moved = replace(dropped, val_fraction=0.0)  # the same samples in other shards
    calls = []

    class Killed(BaseException):
        pass

    def dying(name, whole):
        def function(*args):
            calls.append(1)
            if len(calls) == 3 and when == "before a shard":
                raise Killed
            done = whole(*args)
            if len(calls) == 3:
                raise Killed
            return done

        return name, function

    target = ("place", building.place) if when == "after it" else ("build", building.build)
    with monkeypatch.context() as patched:
        patched.setattr(building, *dying(*target))
        with pytest.raises(Killed):
            inline(moved)
    assert inline(moved).worked["clip"] == 0
    assert tree(moved) == tree(config)
    assert staged(moved) == []


def test_a_shard_that_was_changed_costs_its_samples(config, tmp_path, small_shards, caplog):
    dropped = replace(config, keep_staging="none")
    inline(dropped)
    whole = tree(dropped)
    shard = next(Path(config.output, "shards").iterdir())
    blob = bytearray(shard.read_bytes())
    blob[3000] ^= 1
    shard.write_bytes(bytes(blob))
    assert 0 < inline(dropped).worked["clip"] < 12
    assert tree(dropped) == whole


@pytest.mark.parametrize("keep", ["all", "none"])
def test_a_folder_that_was_copied_makes_nothing_again_and_is_read_once(
    config, tmp_path, small_shards, keep, monkeypatch
):
    first = replace(config, output=str(tmp_path / "first"), keep_staging=keep)
    inline(first)
    copy = replace(config, output=str(tmp_path / "copy"), keep_staging=keep)
    shutil.copytree(first.output, copy.output)
    read, built, whole = [], [], storage.sha256
    monkeypatch.setattr(storage, "sha256", lambda url, *more: read.append(Path(url).name) or whole(url, *more))
    monkeypatch.setattr(building, "build", lambda *_: built.append(1))
    assert inline(copy).worked["clip"] == 0
    assert {path.name for path in Path(copy.output, "shards").iterdir()} <= set(read)
    assert tree(copy) == tree(first)
    read.clear()
    assert inline(copy).worked["clip"] == 0
    assert not [name for name in read if name.endswith(".tar")]
    assert built == []


def test_samples_in_shards_are_found_by_the_first_digits_of_their_keys(config, small_shards):
    inline(replace(config, keep_staging="none"))
    ledger = Ledger(config.output)
    rows = read_table(config.output, MANIFEST).select(["key", "shard"]).to_pylist()
    shards_there = {row["shard"] for row in rows}
    keys = {shard: sorted(row["key"] for row in rows if row["shard"] == shard) for shard in shards_there}
    assert len(keys) > 3
    assert set(ledger.unit("")["shards"]) == keys.keys()
    shards_of = ledger.packed.shards_of
    for shard, own in keys.items():
        first, last = own[0], own[-1]
        for key in own:
            assert all(shard in shards_of(key[:digits]) for digits in (1, 2, 16, len(key)))
        assert shard not in shards_of(f"{last}0")  # keys that begin with it come after the last one
        assert shard not in shards_of(first[:-1] + chr(ord(first[-1]) - 1))
    assert shards_of("g") == []


def test_a_sample_is_taken_from_a_shard_only_as_it_was_recorded(config, small_shards):
    inline(replace(config, keep_staging="none"))
    ledger = Ledger(config.output)
    bodies = {name: json.dumps(ledger.get(name)) for name in ledger.records if not name.startswith("packed")}
    samples = {name: ledger.get(name)["size"] for name in bodies if name.endswith(".tar")}
    shards_there = ledger.unit("")["shards"]
    assert len(samples) == 12
    assert packed.sizes_in(config.output, shards_there, bodies) == samples
    changed = min(samples)
    other = bodies | {changed: json.dumps(json.loads(bodies[changed]) | {"sha256": "0" * 64})}
    left = {name: size for name, size in samples.items() if name != changed}
    assert packed.sizes_in(config.output, shards_there, other) == left
    assert packed.sizes_in(config.output, shards_there, {name: other[name] for name in left}) == left
    assert packed.sizes_in(config.output, [], bodies) == {}
    some = [packed.sizes_in(config.output, [shard], bodies) for shard in shards_there]
    assert all(some)
    assert sum(map(len, some)) == 12


def test_the_range_of_keys_of_shards_takes_in_their_edges(tmp_path, monkeypatch):
    ranges = [("one", "0a-0", "1f-9"), ("two", "1f-a", "1f-b"), ("three", "20-0", "ff-9")]
    monkeypatch.setattr(packed, "_shards", lambda _: ranges)
    found = packed.Packed(str(tmp_path), Ledger(str(tmp_path)).database, is_only_copy=True)
    expected = {"": [0, 1, 2], "0": [0], "00": [], "0a": [0], "0b": [0], "1": [0, 1], "1f": [0, 1], "2": [2]}
    expected |= {"1f-9": [0], "1f-a": [1], "1f-b": [1], "1f-b0": [], "20": [2], "1fa": [], "f": [2], "ff": [2]}
    assert {prefix: found.shards_of(prefix) for prefix in expected} == {
        prefix: [ranges[number][0] for number in numbers] for prefix, numbers in expected.items()
    }
    assert packed.Packed(str(tmp_path), Ledger(str(tmp_path)).database, is_only_copy=False).shards_of("") == []
