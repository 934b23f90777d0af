"""Packing: equal bytes in any order, no sample lost, no commit of an incomplete dataset."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile

import pyarrow.parquet as pq
import pytest
from make_data import REJECTS, facts, make_sample, stage

from ex4d import storage
from ex4d.data import building
from ex4d.data.sample import MEMBERS, encode
from ex4d.data.shards import DamagedSamples, Staged, pack, split_of
from ex4d.data.tar import END, read_sample, sample_tar
from ex4d.errors import ContractError


def tree(folder):
    return {name: storage.sha256(f"{folder}/{name}") for name in storage.list_files(str(folder))}


def test_sample_tar_is_plain_ustar_and_reads_back():
    members = encode(make_sample(0))
    blob = sample_tar("abc-0", members)
    with tarfile.open(fileobj=io.BytesIO(blob + END)) as archive:
        infos = archive.getmembers()
        assert [info.name for info in infos] == [f"abc-0.{name}" for name in MEMBERS]
        assert {(i.mtime, i.uid, i.gid, i.mode, i.uname, i.pax_headers.get("mtime")) for i in infos} == {
            (0, 0, 0, 0o644, "", None)
        }
        assert archive.extractfile("abc-0.mp4").read() == members["mp4"]
    assert read_sample(blob, "abc-0") == members
    # one header and at most one block of padding a member: no PAX records
    assert len(blob) < sum(len(data) + 1024 for data in members.values())


@pytest.mark.parametrize("position", [0, 3, 100, 124, 136, 148, 156, 257, 345, 511])
def test_no_byte_of_a_header_can_change(position):
    blob = bytearray(sample_tar("abc-0", {"json": b"{}", "txt": b"hello"}))
    blob[position] ^= 1
    with pytest.raises(ContractError, match="abc-0"):
        read_sample(bytes(blob), "abc-0")


@pytest.mark.parametrize(("key", "name"), [("../a", "txt"), ("a.b", "txt"), ("A", "txt"), ("a", "../txt"), ("a", "")])
def test_names_that_lead_elsewhere_are_refused(key, name):
    with pytest.raises(ContractError):
        sample_tar(key, {name: b""})


def test_the_folder_holds_what_the_format_says(dataset16):
    names = storage.list_files(str(dataset16))
    shards = [name for name in names if name.startswith("shards/")]
    assert sorted(set(names) - set(shards)) == ["dataset.json", "index.json", "manifest.parquet", "rejects.parquet"]
    assert "shards/train-000001.tar" in shards
    assert "shards/val-000000.tar" in shards
    index = json.loads((dataset16 / "index.json").read_text())["shardlist"]
    assert [shard["url"] for shard in index] == shards
    assert all((dataset16 / s["url"]).stat().st_size == s["filesize"] <= 100_000 for s in index)
    rows = pq.read_table(dataset16 / "manifest.parquet").to_pylist()
    assert sum(shard["nsamples"] for shard in index) == len(rows) == 16
    assert {row["score_sharpness"] for row in rows} == {1.0}
    for row in rows:
        data = storage.read_bytes(dataset16 / row["shard"], row["offset"], row["length"])
        assert tuple(read_sample(data, row["key"])) == MEMBERS
        member = row["members"][3]
        assert storage.read_bytes(dataset16 / row["shard"], member["offset"], member["length"])[4:8] == b"ftyp"
    counts = json.loads((dataset16 / "dataset.json").read_text())["counts"]
    assert counts["clips_planned"] == counts["samples"] + counts["clips_filtered"] + counts["clips_bad"] == 18
    assert counts["videos_in"] == counts["videos_split"] + counts["videos_rejected"] == 9


def test_any_order_and_any_rerun_give_the_same_bytes(staged16, dataset16, tmp_path):
    shuffled = random.Random(1).sample(staged16, len(staged16))
    for _ in range(2):
        pack(shuffled, str(tmp_path), facts(16), REJECTS[::-1], shard_size_bytes=100_000)
        assert tree(tmp_path) == tree(dataset16)


def test_an_object_store_gets_the_same_bytes(staged16, dataset16):
    pack(staged16, "memory://packed", facts(16), REJECTS, shard_size_bytes=100_000)
    assert tree("memory://packed") == tree(dataset16)


def test_a_smaller_dataset_takes_the_place_of_a_larger_one(staged16, tmp_path):
    pack(staged16, str(tmp_path), facts(16), REJECTS, shard_size_bytes=100_000)
    (tmp_path / "shards" / "notes.txt").write_text("not ours")
    pack(staged16[:2], str(tmp_path), facts(2), REJECTS, shard_size_bytes=100_000)
    assert storage.list_files(str(tmp_path), (".tar", ".txt")) == ["shards/notes.txt", "shards/train-000000.tar"]


def test_a_killed_pack_leaves_no_commit_that_lies(staged16, tmp_path, monkeypatch):
    """Killed before any of its moves, the folder is either the complete old dataset or has no dataset.json."""
    pack(staged16[:8], str(tmp_path / "new"), facts(8), REJECTS, shard_size_bytes=100_000)
    pack(staged16, str(tmp_path / "old"), facts(16), REJECTS, shard_size_bytes=100_000)
    old, new, move = tree(tmp_path / "old"), tree(tmp_path / "new"), storage.move_file
    survived = 0
    for allowed in range(40):
        folder, moves = tmp_path / f"killed{allowed}", iter(range(allowed))
        pack(staged16, str(folder), facts(16), REJECTS, shard_size_bytes=100_000)

        def dying_move(source, url, moves=moves):
            if next(moves, None) is None:
                raise KeyboardInterrupt
            move(source, url)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "move_file", dying_move)
            try:
                pack(staged16[:8], str(folder), facts(8), REJECTS, shard_size_bytes=100_000)
                survived += 1
            except KeyboardInterrupt:
                now = tree(folder)
                assert "dataset.json" not in now or now == old
        if not survived:
            pack(staged16[:8], str(folder), facts(8), REJECTS, shard_size_bytes=100_000)
        assert tree(folder) == new
        if survived:
            break
    assert survived


def test_an_empty_dataset_is_a_dataset(tmp_path):
    empty = {"videos_in": 1, "videos_split": 0, "clips_planned": 0}
    dataset = pack([], str(tmp_path), {**facts(0), "counts": empty}, REJECTS[:1])
    assert dataset["counts"]["samples"] == 0
    assert pq.read_table(tmp_path / "manifest.parquet").num_rows == 0


def test_what_does_not_add_up_is_not_committed(staged16, tmp_path):
    with pytest.raises(ContractError, match="clips_planned = 19"):
        pack(staged16, str(tmp_path), facts(17), REJECTS)
    with pytest.raises(ContractError, match="more than once"):
        pack([*staged16, staged16[0]], str(tmp_path), facts(17), REJECTS)
    with pytest.raises(ContractError, match="unit"):
        pack(staged16, str(tmp_path), facts(16), [{**REJECTS[0], "unit": "frame"}])
    assert storage.list_files(str(tmp_path)) == []


def test_a_source_in_both_splits_is_refused(staged16, tmp_path):
    mixed = [staged16[0]._replace(split="val"), *staged16[1:]]
    with pytest.raises(ContractError, match="both train and val"):
        pack(mixed, str(tmp_path), facts(16), REJECTS)
    assert not (tmp_path / "dataset.json").exists()


def test_samples_of_different_types_are_refused(tmp_path):
    staged = stage(tmp_path / "staging", 2)
    members = encode(make_sample(1))
    changed = json.loads(members["json"])
    changed["scores"]["motion"] = 1
    (tmp_path / "staging" / f"{staged[1].key}.tar").write_bytes(
        sample_tar(staged[1].key, {**members, "json": json.dumps(changed).encode()})
    )
    with pytest.raises(ContractError, match=staged[1].key):
        pack(staged, str(tmp_path / "out"), facts(2), REJECTS)


def test_a_staged_file_of_another_key_is_refused(staged16, tmp_path):
    with pytest.raises(ContractError, match="other-key"):
        pack([Staged("other-key", "train", staged16[0].url)], str(tmp_path), facts(1), REJECTS)


def test_split_is_by_source_and_near_its_share():
    splits = [split_of(f"source {index}", 0.1) for index in range(2000)]
    assert 0.07 < splits.count("val") / len(splits) < 0.13
    assert splits == [split_of(f"source {index}", 0.1) for index in range(2000)]
    assert {split_of(f"source {index}", 0.0) for index in range(100)} == {"train"}


def test_a_pack_with_nothing_to_do_reads_no_sample_and_any_change_is_seen(tmp_path, monkeypatch):
    staged, output = stage(tmp_path / "staged", 8), str(tmp_path / "out")
    tables, read = str(tmp_path / "tables"), []
    plain = storage.read_bytes

    def watched(url, *where):
        read.append(str(url))
        return plain(url, *where)

    def again(items=staged, rejects=REJECTS, size=100_000):
        read.clear()
        dataset = pack(items, output, facts(8), rejects, size, tables=tables)
        return dataset, sum(name.startswith(str(tmp_path / "staged")) for name in read)

    monkeypatch.setattr(storage, "read_bytes", watched)
    first, count = again()
    assert count == 8
    whole = tree(output)
    assert again() == (first, 0)
    assert again(list(reversed(staged)))[1] == 0
    shard = tmp_path / "out" / "shards" / "train-000000.tar"
    inside = pq.read_table(tmp_path / "out" / "manifest.parquet")["shard"].to_pylist().count("shards/train-000000.tar")
    assert 0 < inside < 8
    for damage in (lambda: shard.unlink(), lambda: shard.write_bytes(bytes(shard.stat().st_size))):
        damage()
        assert again() == (first, inside)
        assert tree(output) == whole
        assert again()[1] == 0
    os.utime(staged[0].url)  # rewritten, perhaps with other bytes
    assert 0 < again()[1] < 8
    assert again(size=50_000)[1] >= inside
    assert again()[1] >= inside
    for name in ("tables/packed.json", "tables/train-000000.parquet", "out/dataset.json", "out/manifest.parquet"):
        (tmp_path / name).write_text("[]")
        (tmp_path / "tables/packed.json").write_text("[]")
        assert again()[1] == (inside if "train" in name else 0)
        assert tree(output) == whole


def known(staged):
    """The same samples with the sizes and hashes that a ledger records."""
    return [item._replace(size=os.path.getsize(item.url), sha256=storage.sha256(item.url)) for item in staged]


def test_one_sample_more_builds_only_the_shards_that_it_changes(tmp_path, dataset16, staged16):
    built, tables = [], str(tmp_path / "tables")

    def build(plans, *where):
        plans = list(plans)
        built.append([plan["name"] for plan in plans])
        return building.here(reversed(plans), *where)  # in any order

    items = sorted(known(staged16), key=lambda item: (item.split, item.key))
    last = next(item for item in reversed(items) if item.split == "val")  # its source has another clip in the dataset
    few = [item for item in items if item is not last]
    for some, count in ((few, 15), (items, 16), (items, 16)):
        pack(some, str(tmp_path / "out"), facts(count), REJECTS, 100_000, tables=tables, build=build)
    assert len(built) == 2  # the third had nothing to do
    assert len(built[0]) > len(built[1]) == 1
    assert tree(tmp_path / "out") == tree(dataset16)


def test_a_pack_that_died_between_two_shards_goes_on_with_the_second(tmp_path, dataset16, staged16):
    built = []

    def build(plans, *where):
        for plan in plans:
            if len(built) == 2:
                raise KeyboardInterrupt
            built.append(plan["name"])
            yield building.build(plan, *where)

    choices = (known(staged16), str(tmp_path / "out"), facts(16), REJECTS, 100_000)
    with pytest.raises(KeyboardInterrupt):
        pack(*choices, tables=str(tmp_path / "tables"), build=build)
    assert not (tmp_path / "out" / "dataset.json").exists()
    first = built.copy()
    built[:] = ["begun anew"] * 3
    pack(*choices, tables=str(tmp_path / "tables"), build=build)
    assert not set(first) & set(built)
    assert tree(tmp_path / "out") == tree(dataset16)


def test_samples_that_are_not_what_was_written_are_named(tmp_path):
    items = known(stage(tmp_path / "staged", 8))
    os.unlink(items[2].url)
    with open(items[5].url, "r+b") as file:
        file.seek(700)
        file.write(b"?")
    with pytest.raises(DamagedSamples) as caught:
        pack(items, str(tmp_path / "out"), facts(8), REJECTS, 100_000)
    assert caught.value.keys == sorted([items[2].key, items[5].key])
    assert not (tmp_path / "out" / "dataset.json").exists()
