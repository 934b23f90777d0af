"""Pack staged samples into a dataset folder: shards, index, manifest, rejects and, last, dataset.json, the commit.

Packing concatenates samples in key order, so the same staged samples give the same bytes, in whatever order they were
made and whichever worker builds which shard. Keys and sizes determine which sample goes into which shard before any is
read, so many workers can build shards at once (`building`), and only those whose samples have changed are built.
A folder has a dataset.json only while everything that it names is in place.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ex4d import storage
from ex4d.data import building, manifest
from ex4d.data.counts import count
from ex4d.data.staged import Contents, Listed, Staged, digest, digest_of, plans, split_of
from ex4d.data.tar import sample_tar
from ex4d.errors import ContractError

__all__ = ["Build", "Contents", "DamagedSamples", "Staged", "pack", "pack_contents", "sample_tar", "split_of"]

SHARD_SIZE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Missing:
    """The plans of all shards that are not in `built`, regenerated at each iteration: a list could take gigabytes.

    Args:
        count: the number of these shards.
    """

    contents: Contents
    shard_size_bytes: int
    built: frozenset[str]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        every = plans(self.contents.staged(), self.shard_size_bytes)
        return (plan for plan in every if plan["name"] not in self.built)


# (plans, output, tables, work) -> facts of each shard, in any order; `building.here`, or the same on many machines. The
# plans may be iterated more than once.
Build = Callable[[Missing, str, str, str | None], Iterator[dict[str, Any]]]


class DamagedSamples(ContractError):
    """Raised when staged samples are missing or damaged; `keys` lists them."""

    def __init__(self, keys: Sequence[str]):
        self.keys = sorted(keys)
        super().__init__(f"{len(keys)} staged samples are missing or damaged: {', '.join(self.keys[:5])}")


def pack(
    staged: Iterable[Staged],
    output: str,
    facts: Mapping[str, Any],
    rejects: Iterable[Mapping[str, str]],
    shard_size_bytes: int = SHARD_SIZE_BYTES,
    write_more: Callable[[Path], Sequence[str]] | None = None,
    tables: str | None = None,
    build: Build = building.here,
) -> dict[str, Any]:
    """Call `pack_contents` for samples and rejects in any order."""
    return pack_contents(Listed(staged, rejects), output, facts, shard_size_bytes, write_more, tables, build)


def pack_contents(
    contents: Contents,
    output: str,
    facts: Mapping[str, Any],
    shard_size_bytes: int = SHARD_SIZE_BYTES,
    write_more: Callable[[Path], Sequence[str]] | None = None,
    tables: str | None = None,
    build: Build = building.here,
) -> dict[str, Any]:
    """Write a dataset folder and return the contents of its dataset.json.

    Args:
        contents: every sample of the dataset, and the rejects.
        output: folder, local or in an object store. The result of an earlier pack is replaced; shards that are no
            longer part of the dataset are deleted after all new ones are in place.
        facts: JSON-serialisable, the same on every run. Must hold `sample` (a SampleSpec as a mapping) and `counts`
            with videos_in, videos_split and clips_planned; the other counts are added here.
        shard_size_bytes: maximum size of a shard; only a single sample may exceed it.
        write_more: (local folder) -> names of further files that it has written there, which match manifest.MORE;
            dataset.json records their hashes like those of the tables.
        tables: folder that keeps the manifest rows of each shard: a shard is not rebuilt if its samples are the same
            and the file was not written to since; if nothing has changed, nothing is read. Not with `write_more`.
            None: every shard is built and compared.
        build: builds shards.

    Raises:
        DamagedSamples: staged files are missing or damaged.
        ContractError: a staged file is not a sample, keys repeat, samples differ in members or in the types of their
            provenance, a source is in both splits, or the counts do not add up. Nothing is committed then.
    """
    counts = count(contents, facts["counts"])
    digests = {plan["name"]: plan["digest"] for plan in plans(contents.staged(), shard_size_bytes)}
    whole = digest(list(digests.values()), facts, digest_of(contents.rejects()))
    record = storage.join(tables, "packed.json") if tables else None
    if record and all(digests.values()) and _is_packed(output, record, whole):
        return manifest.read_json(output, manifest.DATASET)
    with _work_folder(output) as work:
        rows = tables or str(work / "tables")
        built = _in_place(digests, output, rows)
        missing = Missing(contents, shard_size_bytes, frozenset(built), len(digests) - len(built))
        built |= _built(missing, output, rows, work, build if tables else building.here)
        shards = [built[name] for name in digests]
        _write_tables(work, shards, rows, contents.rejects())
        more = [*write_more(work)] if write_more else []
        dataset = _commit(work, output, {**facts, "counts": counts}, shards, more)
    if record and tables:
        _remember(output, tables, record, whole, list(built))
    return dataset


def _commit(
    work: Path, output: str, facts: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], more: Sequence[str]
) -> dict[str, Any]:
    """Move the tables into place, delete leftovers of an earlier pack, and write and return dataset.json."""
    dataset = {
        **facts,
        "format": manifest.FORMAT,
        "format_version": manifest.FORMAT_VERSION,
        "members": shards[0]["members"] if shards else [],
        "sha256": {name: building.place(work / name, output, name) for name in (*manifest.TABLES, *more)},
    }
    current = {*(shard["url"] for shard in shards), *more}
    for url in manifest.list_contents(output):
        if url not in current:
            storage.remove(storage.join(output, manifest.DATASET))
            storage.remove(storage.join(output, url))
    (work / manifest.DATASET).write_text(json.dumps(dataset, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    building.place(work / manifest.DATASET, output, manifest.DATASET)
    return dataset


def _write_tables(
    work: Path, shards: Sequence[Mapping[str, Any]], tables: str, rejected: Iterable[Mapping[str, str]]
) -> None:
    """Write manifest, rejects and index into `work`.

    Raises:
        ContractError: samples of two shards differ in members or in the types of their provenance.
    """
    for shard in shards[1:]:
        for what in ("members", "types"):
            if shard[what] != shards[0][what]:
                first = shards[0]
                raise ContractError(f"{shard['url']}: {what} are {shard[what]}, unlike {first['url']}: {first[what]}")

    def rows() -> Iterator[pa.Table]:
        return (building.read_rows(tables, shard["url"]) for shard in shards)

    manifest.write_manifest(work / manifest.MANIFEST, _checked(rows) if shards else [manifest.table([], [])])
    manifest.write_rejects(work / manifest.REJECTS, rejected)
    names = ("url", "nsamples", "filesize", "sha256")
    manifest.write_index(work / manifest.INDEX, [{name: shard[name] for name in names} for shard in shards])


def _in_place(digests: Mapping[str, str], output: str, tables: str) -> dict[str, dict[str, Any]]:
    """Return {name: facts} of the shards that are in place as planned; `digests` is {name: digest of its plan}."""

    def in_place(name: str) -> dict[str, Any] | None:
        facts = building.read_facts(tables, name) if digests[name] else None
        if not facts or facts["digest"] != digests[name]:
            return None
        return facts if building.is_as_built(facts, output, tables) else None

    with ThreadPoolExecutor(4 * building.NUM_READERS) as pool:
        known = zip(digests, pool.map(in_place, digests), strict=True)
        return {name: facts for name, facts in known if facts}


def _built(missing: Missing, output: str, tables: str, work: Path, build: Build) -> dict[str, dict[str, Any]]:
    """Build the missing shards and return {name: facts} of them. Raises DamagedSamples."""
    built: dict[str, dict[str, Any]] = {}
    damaged: list[str] = []
    for facts in build(missing, output, tables, str(work) if storage.is_local(output) else None):
        damaged += facts.get("damaged", [])
        if "url" in facts:
            built[facts["url"]] = facts
    if damaged:
        raise DamagedSamples(damaged)
    return built


def _is_packed(output: str, record: str, whole: str) -> bool:
    """Return True if the folder is the unchanged result of a pack with this digest, by the stamps of its files."""
    if not storage.exists(record):
        return False
    try:
        known = json.loads(storage.read_bytes(record))
        stamps = known["stamps"] if known["plan"] == whole else {}
        with ThreadPoolExecutor(4 * building.NUM_READERS) as pool:
            now = pool.map(lambda name: building.stamp(storage.join(output, name)), stamps)
            return bool(stamps) and all(was and was == now for was, now in zip(stamps.values(), now, strict=True))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # damaged: everything is compared


def _remember(output: str, tables: str, record: str, whole: str, names: Sequence[str]) -> None:
    """Record what the dataset was packed from; delete the rows of shards that are no longer part of it."""
    files = [*names, *manifest.TABLES, manifest.DATASET]
    with ThreadPoolExecutor(4 * building.NUM_READERS) as pool:
        stamps = pool.map(lambda name: building.stamp(storage.join(output, name)), files)
        known = {"plan": whole, "stamps": dict(zip(files, stamps, strict=True))}
    storage.write_bytes(record, json.dumps(known).encode())
    used = {building.table_url(tables, name) for name in names}
    for name in storage.list_files(tables, (".parquet",)):
        if storage.join(tables, name) not in used:
            storage.remove(storage.join(tables, name))


@contextmanager
def _work_folder(output: str) -> Iterator[Path]:
    """Yield a local folder for unfinished files, on the disk of a local `output` so that moving is a rename."""
    if storage.is_local(output):
        work = storage.local_path(output) / ".tmp-pack"
        shutil.rmtree(work, ignore_errors=True)  # left over from a killed pack
        work.mkdir(parents=True)
    else:
        work = Path(tempfile.mkdtemp(prefix="ex4d-pack-"))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _checked(read: Callable[[], Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Yield the tables, each of one split, and check that no source is in both splits.

    To save memory, 8-byte hashes are compared instead of the 64-byte names, and names only where hashes are equal.
    """
    found: dict[str, list[np.ndarray]] = {split: [np.zeros(0, np.int64)] for split in manifest.SPLITS}
    for table in read():
        names = _sources(table)
        found[table["split"][0].as_py()].append(np.fromiter(map(hash, names), np.int64, len(names)))
        yield table
    train, val = (np.concatenate(found[split]) for split in manifest.SPLITS)
    suspects = np.intersect1d(train, val)
    if not len(suspects):
        return
    split_of_source: dict[str, str] = {}
    for table in read():
        split = table["split"][0].as_py()
        for name, is_suspect in zip(names := _sources(table), np.isin([*map(hash, names)], suspects), strict=True):
            if is_suspect and split_of_source.setdefault(name, split) != split:
                raise ContractError(f"source {name} is in both train and val")


def _sources(table: pa.Table) -> list[str]:
    return pa.concat_arrays([pc.unique(table[name]) for name in ("source_sha256", "source_group")]).to_pylist()
