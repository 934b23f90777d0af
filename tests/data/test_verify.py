"""`verify` reports no problem in a good dataset, and names the damage in a damaged one."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from make_data import REJECTS, facts, make_sample

from ex4d.data import manifest
from ex4d.data.sample import MEMBERS, encode
from ex4d.data.shards import Staged, pack
from ex4d.data.tar import sample_tar
from ex4d.data.verify import verify
from ex4d.errors import ContractError


@pytest.fixture
def copy(dataset16, tmp_path):
    shutil.copytree(dataset16, tmp_path / "copy")
    return tmp_path / "copy"


def rows_of(folder):
    return pq.read_table(folder / "manifest.parquet").to_pylist()


def flip(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("full", [False, True])
def test_a_good_dataset_passes_with_its_counts(dataset16, full):
    report = verify(str(dataset16), full=full)
    assert report.ok, str(report)
    assert report.counts["samples"] == 16
    assert report.counts["samples_train"] == 12
    text = str(report)
    assert f"tree sha256 {report.tree_sha256}" in text
    assert "videos in 9 = split 8 + rejected 1" in text
    assert ("every sample decoded" in text) == full


def test_tree_hash_is_what_sha256sum_says(dataset16):
    command = "LC_ALL=C find . -type f -printf '%P\\n' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    printed = subprocess.run(["bash", "-c", command], cwd=dataset16, capture_output=True, text=True, check=True).stdout
    assert printed.split()[0] == verify(str(dataset16)).tree_sha256


def test_verify_reads_an_object_store(staged16, dataset16):
    pack(staged16, "memory://verified", facts(16), REJECTS, shard_size_bytes=100_000)
    report = verify("memory://verified")
    assert report.ok
    assert report.tree_sha256 == verify(str(dataset16)).tree_sha256


@pytest.mark.parametrize("member", range(5))
@pytest.mark.parametrize("place", ["header", "first", "last"])
def test_one_flipped_byte_names_shard_key_and_member(copy, member, place):
    row = next(row for row in rows_of(copy) if row["members"][4]["length"])
    part = row["members"][member]
    offset = {"header": -300, "first": 0, "last": part["length"] - 1}[place]
    flip(copy / row["shard"], part["offset"] + offset)
    report = verify(str(copy))
    assert not report.ok
    wanted = f"{row['shard']}: sample {row['key']}: member {MEMBERS[member]}:"
    assert [problem for problem in report.problems if problem.startswith(wanted)], str(report)
    assert not any("sample" in problem and row["key"] not in problem for problem in report.problems)


def test_any_flipped_byte_anywhere_is_found(copy, dataset16):
    rng, clean = random.Random(0), verify(str(dataset16)).tree_sha256
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        for position in {0, path.stat().st_size - 1, *(rng.randrange(path.stat().st_size) for _ in range(3))}:
            flip(path, position)
            report = verify(str(copy))
            # dataset.json holds the hashes of the others; only the tree hash covers dataset.json itself
            assert not report.ok or (path.name == "dataset.json" and report.tree_sha256 != clean), (path, position)
            flip(path, position)
    assert verify(str(copy)).tree_sha256 == clean


def test_missing_and_foreign_files_are_named(copy):
    (copy / "shards" / "train-000001.tar").unlink()
    (copy / "shards" / "train-000099.tar").write_bytes(b"")
    report = verify(str(copy))
    assert any(p.startswith("shards/train-000001.tar: is missing") for p in report.problems)
    assert any(p.startswith("shards/train-000099.tar: is not in index.json") for p in report.problems)
    assert report.tree_sha256 == ""
    (copy / "dataset.json").unlink()
    assert "not a finished dataset" in str(verify(str(copy)))


@pytest.mark.parametrize("name", ["../../etc/passwd", "shards/../../x.tar", "/etc/passwd", "s3://elsewhere/x.tar"])
def test_names_that_lead_out_of_the_folder_are_refused(copy, name):
    index = json.loads((copy / "index.json").read_text())
    index["shardlist"][0]["url"] = name
    (copy / "index.json").write_text(json.dumps(index))
    assert "is not shards/SPLIT-NNNNNN.tar" in verify(str(copy)).problems[0]
    table = pq.read_table(copy / "manifest.parquet")
    column = table.column_names.index("shard")
    evil = table.set_column(column, "shard", pa.array([name] * table.num_rows))
    pq.write_table(evil, copy / "manifest.parquet")
    with pytest.raises(manifest.ContractError, match="not a name of ours"):
        manifest.read_manifest(str(copy))


def test_a_gap_in_the_numbers_is_refused(copy):
    index = json.loads((copy / "index.json").read_text())
    index["shardlist"] = [shard for shard in index["shardlist"] if shard["url"] != "shards/train-000000.tar"]
    (copy / "index.json").write_text(json.dumps(index))
    assert "numbers of the train shards" in verify(str(copy)).problems[0]


def test_lost_rejects_break_an_identity(copy):
    table = pq.read_table(copy / "rejects.parquet")
    pq.write_table(table.slice(0, 1), copy / "rejects.parquet")
    problems = "\n".join(verify(str(copy)).problems)
    assert "rejects.parquet: sha256" in problems
    assert "clips_planned = 18 is not" in problems


def test_a_source_in_both_splits_is_found(copy):
    table = pq.read_table(copy / "manifest.parquet")
    column = table.column_names.index("source_group")
    pq.write_table(
        table.set_column(column, "source_group", pa.array(["x"] * table.num_rows)), copy / "manifest.parquet"
    )
    assert "in both train and val" in "\n".join(verify(str(copy)).problems)


def test_full_finds_a_sample_that_breaks_the_contract(tmp_path):
    """The hashes match, since the sample was packed this way; only decoding reveals that its mask is inconsistent."""
    sample = make_sample(0)
    members = encode(sample)
    members["masks.npz"] = encode(dataclasses.replace(make_sample(1), key=sample.key))["masks.npz"][:-40]
    (tmp_path / "staged.tar").write_bytes(sample_tar(sample.key, members))
    pack([Staged(sample.key, "train", str(tmp_path / "staged.tar"))], str(tmp_path / "out"), facts(1), REJECTS)
    assert verify(str(tmp_path / "out")).ok
    report = verify(str(tmp_path / "out"), full=True)
    assert [p for p in report.problems if f"sample {sample.key}: member masks.npz" in p]


@pytest.mark.parametrize("name", [manifest.DATASET, manifest.INDEX])
def test_json_nested_without_end_is_damage(tmp_path, name):
    (tmp_path / name).write_bytes(b"[" * 200_000)
    with pytest.raises(ContractError, match="is not JSON"):
        manifest.read_json(str(tmp_path), name)


@pytest.mark.parametrize(
    "change",
    [
        {"counts": 5},
        {"sha256": 5},
        {"sha256": {}},
        {"counts": {"samples": "x"}},
        {"sample": {"num_frames": 9, "size": "abc"}},
        {"sample": {"num_frames": 9, "size": [16]}},
    ],
    ids=str,
)
def test_a_dataset_without_its_seals_is_damaged(copy, change):
    dataset = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(dataset | change))
    assert next(iter(change)) in verify(str(copy)).problems[0]
    del dataset[next(iter(change))]
    (copy / "dataset.json").write_text(json.dumps(dataset))
    assert next(iter(change)) in verify(str(copy)).problems[0]


def test_a_shard_without_an_end_is_damage(copy):
    shard = next((copy / "shards").iterdir())
    shard.unlink()
    shard.symlink_to("/dev/zero")
    assert not verify(str(copy)).ok
