"""Verify a dataset folder: every byte is covered by a hash, and every count is recomputed from the rows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute

from ex4d import storage
from ex4d.data import foreign, manifest, texts
from ex4d.data.counts import identities, reject_counts
from ex4d.data.members import decode_json
from ex4d.data.tar import BLOCK, END, header, read_sample
from ex4d.errors import BadSample, ContractError

Row = dict[str, Any]
Check = Callable[[Mapping[str, bytes], str], object]


@dataclass(frozen=True)
class Report:
    """The result of `verify`.

    Args:
        folder: the dataset folder.
        problems: a sentence each, naming file, sample and member; empty if there are none.
        counts: as in dataset.json, recomputed from the rows.
        num_shards, num_bytes: number and total size of the shards.
        tree_sha256: of the whole folder, see `tree_hash`; "" if a file is missing.
        full: whether every sample was decoded as well.
    """

    folder: str
    problems: tuple[str, ...]
    counts: dict[str, int]
    num_shards: int
    num_bytes: int
    tree_sha256: str
    full: bool

    @property
    def ok(self) -> bool:
        """True if there are no problems."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.folder}: {'ok' if self.ok else 'DAMAGED'}"]
        if self.counts:
            text = (
                "  {samples} samples (train {samples_train}, val {samples_val}) in {num_shards} shards, {size:.1f} MB\n"
                "  videos in {videos_in} = split {videos_split} + rejected {videos_rejected}\n"
                "  clips planned {clips_planned} = samples {samples} + filtered {clips_filtered} + bad {clips_bad}"
            )
            lines.append(text.format(**self.counts, num_shards=self.num_shards, size=self.num_bytes / 1e6))
        lines.append("  checked: every hash" + (", every sample decoded" if self.full else ""))
        lines += [f"  PROBLEM {problem}" for problem in self.problems]
        return "\n".join([*lines, f"  tree sha256 {self.tree_sha256 or '(incomplete)'}"])


def tree_hash(digests: Mapping[str, str]) -> str:
    """Return the sha256 that identifies a folder: that of the lines `SHA256  PATH` of sha256sum, sorted by path.

    Args:
        digests: {relative path: hex sha256}.
    """
    lines = "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


def dataset_fingerprint(dataset: str) -> str:
    """Return the tree hash of a finished dataset, as `ex4d verify` prints it, from the hashes that it records.

    Raises:
        ContractError: there is no finished dataset.
    """
    digests = dict(manifest.read_dataset(dataset)["sha256"])
    digests[manifest.DATASET] = storage.sha256(storage.join(dataset, manifest.DATASET))
    digests |= {shard["url"]: shard["sha256"] for shard in manifest.read_index(dataset)}
    return tree_hash(digests)


def verify(
    folder: str, full: bool = False, num_threads: int = 2, check: Check | None = None, trust: str = "auto"
) -> Report:
    """Verify a dataset folder and return a Report; damage is reported, not raised.

    Args:
        folder: local, or in an object store.
        full: also decode every sample and check it against the contract.
        num_threads: number of shards that are read at the same time.
        check: called with ({member: bytes}, key) of every sample if `full`; raises ContractError for a bad one.
            None: the contract of data/sample.py or data/latents.py.
        trust: "auto", "own" or "foreign"; foreign samples are decoded in a sandbox (`ex4d.data.foreign`).
    """
    try:
        dataset = manifest.read_dataset(folder)
        shards = manifest.read_index(folder)
        table = manifest.read_manifest(folder)
        rejects = manifest.read_table(folder, manifest.REJECTS).to_pylist()
        rejected = reject_counts(rejects)
        check = check or foreign.checker(dataset, foreign.is_foreign(folder, trust))
    except ContractError as error:
        return Report(folder, (str(error), *_table_problems(folder, {})[1]), {}, 0, 0, "", full)
    digests, problems = _table_problems(folder, dataset["sha256"])
    problems += _row_problems(table, rejects)
    counts, wrong = _count(dataset.get("counts", {}), table, rejected)
    problems += wrong
    by_shard = manifest.rows_by_shard(table)
    more = set(dataset["sha256"]) - set(manifest.TABLES)
    problems += _folder_problems(folder, {*(shard["url"] for shard in shards), *more}, set(by_shard))
    if full and "latents" in dataset and not problems:
        members = table["members"].combine_chunks().flatten()
        captions = members.filter(pa.compute.equal(members.field("name"), "txt")).field("sha256").to_pylist()
        problems += texts.problems(folder, dataset, set(captions) if dataset["latents"].get("captions") else ())
    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [
            pool.submit(_check_shard, folder, shard, by_shard.get(shard["url"]), check if full else None)
            for shard in shards
        ]
        for shard, job in zip(shards, jobs, strict=True):
            digests[shard["url"]], shard_problems = job.result()
            problems += shard_problems
    tree = "" if "" in digests.values() else tree_hash(digests)
    size = sum(shard["filesize"] for shard in shards)
    return Report(folder, tuple(problems), counts, len(shards), size, tree, full)


def _table_problems(folder: str, sealed: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the sha256 of each file that is not a shard ("" if missing), and the problems with these files."""
    digests, problems = {}, []
    for name in (manifest.DATASET, *sorted({*manifest.TABLES, *sealed})):
        if name not in (manifest.DATASET, *manifest.TABLES) and not manifest.MORE.fullmatch(name):
            problems.append(f"{manifest.DATASET}: names {name!r}, which is no file of a dataset")
            continue
        url = storage.join(folder, name)
        try:
            digests[name] = storage.sha256(url) if storage.exists(url) else ""
        except OSError as error:
            digests[name] = ""
            problems.append(f"{name}: cannot be read ({error.strerror})")
            continue
        if not digests[name]:
            problems.append(f"{name}: is missing")
        elif sealed and name != manifest.DATASET and sealed.get(name) != digests[name]:
            problems.append(f"{name}: sha256 is not the one in {manifest.DATASET}")
    return digests, problems


def _folder_problems(folder: str, indexed: set[str], named: set[str]) -> list[str]:
    there = {f"shards/{name}" for name in storage.list_files(storage.join(folder, "shards"))}
    there |= {name for name in manifest.list_contents(folder) if manifest.MORE.fullmatch(name)}
    wrong = [(there - indexed, f"is not in {manifest.INDEX}"), (indexed - there, "is missing")]
    wrong.append((named - indexed, f"is in {manifest.MANIFEST} and not in {manifest.INDEX}"))
    return [f"{name}: {what}" for names, what in wrong for name in sorted(names)]


def _row_problems(table: pa.Table, rejects: list[Row]) -> list[str]:
    """Return inconsistencies between rows: repeated keys, samples in another split's shard, sources in both splits."""
    keys = Counter(table["key"].to_pylist() + [row["key"] for row in rejects if row["unit"] == "clip"])
    problems = [f"sample {key}: is there {count} times" for key, count in keys.items() if count > 1]
    split_by_source: dict[str, str] = {}
    columns = (table[name].to_pylist() for name in ("key", "split", "shard", "source_sha256", "source_group"))
    for key, split, shard, *sources in zip(*columns, strict=True):
        if split != manifest.SHARD.fullmatch(shard)[1]:  # type: ignore[index]
            problems.append(f"sample {key}: split {split} lies in {shard}")
        for source in set(sources):
            if split_by_source.setdefault(source, split) != split:
                problems.append(f"sample {key}: source {source} is in both train and val")
    return problems


def _count(
    claimed: Mapping[str, int], table: pa.Table, rejected: Mapping[str, int]
) -> tuple[dict[str, int], list[str]]:
    """Return the counts recomputed from the rows, and where dataset.json or the identities disagree with them."""
    by_split = Counter(table["split"].to_pylist())
    own_counts = {
        "samples": len(table),
        **{f"samples_{split}": by_split[split] for split in manifest.SPLITS},
        **rejected,
    }
    wanted = ("videos_in", "videos_split", "clips_planned")
    if not all(isinstance(claimed.get(name), int) for name in wanted):
        return {}, [f"{manifest.DATASET}: counts must hold {wanted} as whole numbers"]
    problems = [
        f"{manifest.DATASET}: counts.{name} is {claimed.get(name)}, the rows say {value}"
        for name, value in own_counts.items()
        if claimed.get(name) != value
    ]
    counts = {**claimed, **own_counts}
    return counts, problems + identities(counts)


def _check_shard(
    folder: str, shard: Mapping[str, Any], table: pa.Table | None, check: Check | None
) -> tuple[str, list[str]]:
    """Return (sha256, problems) of one shard, read once from end to end."""
    name, problems, digest, position = shard["url"], [], hashlib.sha256(), 0
    rows = [] if table is None else table.to_pylist()
    if len(rows) != shard["nsamples"]:
        problems.append(f"{name}: {len(rows)} samples in {manifest.MANIFEST}, {shard['nsamples']} in {manifest.INDEX}")
    try:
        with storage.open_read(storage.join(folder, name)) as file:
            there = file.seek(0, 2)
            file.seek(0)
            for row in rows:
                if row["offset"] != position or not 0 < row["length"] <= there - position:
                    problems.append(f"{name}: sample {row['key']}: offset or length in {manifest.MANIFEST} is wrong")
                    break
                blob = file.read(row["length"])
                digest.update(blob)
                position += len(blob)
                problems += [f"{name}: sample {row['key']}: {what}" for what in _check_sample(row, blob, check)]
            marker, more = file.read(len(END)), 0
            digest.update(marker)
            # Read at most one block past the stated end: a hostile file may be endless.
            while position + more <= min(there, shard["filesize"]) and (block := file.read(1 << 20)):
                digest.update(block)
                more += len(block)
            position += len(marker) + more
            if marker != END or more:
                problems.append(f"{name}: the end marker is damaged, or more follows it")
    except OSError as error:
        return "", [*problems, f"{name}: cannot be read ({error})"]
    if position != shard["filesize"]:
        problems.append(f"{name}: has {position} bytes, {manifest.INDEX} says {shard['filesize']}")
    if digest.hexdigest() != shard["sha256"]:
        problems.append(f"{name}: sha256 is not the one in {manifest.INDEX}")
    return digest.hexdigest(), problems


def _check_sample(row: Row, blob: bytes, check: Check | None) -> list[str]:
    """Return the problems of one sample, by member. The layout comes from the manifest, never from tar headers."""
    problems, position = [], 0
    try:
        for member in row["members"]:
            name, length = member["name"], member["length"]
            if not 0 <= length <= len(blob):
                problems.append(f"member {name}: length {length} in {manifest.MANIFEST} is wrong")
                return problems
            start = position + BLOCK
            stop = start + length
            position = stop + -length % BLOCK
            if member["offset"] != row["offset"] + start:
                problems.append(f"member {name}: offset in {manifest.MANIFEST} is wrong")
            if blob[start - BLOCK : start] != header(row["key"], name, length):
                problems.append(f"member {name}: its tar header is damaged")
            if hashlib.sha256(blob[start:stop]).hexdigest() != member["sha256"]:
                problems.append(f"member {name}: sha256 is not the one in {manifest.MANIFEST}")
            if any(blob[stop:position]):
                problems.append(f"member {name}: the padding after it is damaged")
        if position != len(blob):
            problems.append(f"is {len(blob)} bytes long, its members need {position}")
        if hashlib.sha256(blob).hexdigest() != row["sha256"] and not problems:
            problems.append(f"sha256 of the sample is not the one in {manifest.MANIFEST}")
        if not problems:
            problems += _check_contents(row, read_sample(blob, row["key"]), check)
    except (ContractError, BadSample) as error:
        problems.append(f"member {error}")
    except MemoryError:
        problems.append("member: one of them unpacks to more than there is memory")
    return problems


def _check_contents(row: Row, members: Mapping[str, bytes], check: Check | None) -> list[str]:
    facts = decode_json(members.get("json", b""), "json")
    differ = [name for name in manifest.PROVENANCE_COLUMNS if facts.get(name) != row[name]]
    if check is not None:
        check(members, row["key"])
    return [f"member json: {differ} differ from {manifest.MANIFEST}"] if differ else []
