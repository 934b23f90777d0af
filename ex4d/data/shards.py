"""Staged samples become a dataset folder: shards, index, manifest, rejects, and last dataset.json, the commit.

Packing is concatenation in the order of the keys, so the same staged samples give the same bytes whatever the order
in which they were made. A folder has a dataset.json only while everything that it names is in place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ex4d import storage
from ex4d.data import manifest
from ex4d.data.members import decode_json, type_tree
from ex4d.data.tar import END, entries, sample_tar
from ex4d.errors import ContractError

__all__ = ["Staged", "pack", "sample_tar", "split_of"]

SHARD_SIZE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Staged:
    """A finished sample that waits to be packed.

    Args:
        key: the sample's key.
        split: "train" or "val".
        url: a file holding exactly what `sample_tar` returned.
    """

    key: str
    split: str
    url: str


def split_of(source_group: str, val_fraction: float) -> str:
    """Return "train" or "val" for everything cut from one source, or from sources that are nearly the same.

    Args:
        source_group: see sample.PROVENANCE.
        val_fraction: expected share of groups in "val", in [0, 1].
    """
    draw = int.from_bytes(hashlib.sha256(f"split:{source_group}".encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_fraction else "train"


def pack(
    staged: Iterable[Staged],
    output: str,
    facts: Mapping[str, Any],
    rejects: Iterable[Mapping[str, str]],
    shard_size_bytes: int = SHARD_SIZE_BYTES,
    write_more: Callable[[Path], Sequence[str]] | None = None,
    record: str | None = None,
) -> dict[str, Any]:
    """Write a dataset folder and return the contents of its dataset.json.

    Args:
        staged: every sample of the dataset, in any order.
        output: folder, local or in an object store. What an earlier pack left there is replaced; shards that are no
            longer part of the dataset are deleted after all new ones are in place.
        facts: JSON-able, the same on every run. Must hold `sample` (a SampleSpec as a mapping) and `counts` with
            videos_in, videos_split and clips_planned; the other counts are added here.
        rejects: mappings of manifest.REJECT_COLUMNS.
        shard_size_bytes: a shard is closed before it would grow over this; one sample alone may.
        write_more: writes further files of the dataset under the local folder that it is given and returns their names,
            of manifest.MORE; dataset.json seals them like the tables.
        record: file that says of what the last pack was made: where that is the same, and nothing in the folder was
            written since, no sample is read. Not with `write_more`. None: everything is compared.

    Raises:
        ContractError: a staged file is not a sample, keys repeat, samples differ in members or in the types of their
            provenance, a source is in both splits, or the counts do not add up. Nothing is committed then.
    """
    items = sorted(staged, key=lambda item: (item.split, item.key))
    rejected = [dict(row) for row in rejects]
    counts = {**facts["counts"], **manifest.reject_counts(rejected), **_sample_counts(items)}
    _check_keys(items, rejected)
    if wrong := manifest.identities(counts):
        raise ContractError("the counts do not add up: " + "; ".join(wrong))
    plan = _plan(items, facts, rejected, shard_size_bytes) if record else None
    if record and plan and _is_packed(output, record, plan):
        return manifest.read_json(output, manifest.DATASET)
    with _work_folder(output) as work:
        folder = _Folder(output, work)
        shards: list[dict[str, Any]] = []
        rows = _write_shards(items, folder, shards, shard_size_bytes)
        first = next(rows, None)
        scores = sorted(first["scores"]) if first else []
        manifest.write_manifest(work / manifest.MANIFEST, _check_rows(first, rows), scores)
        manifest.write_rejects(work / manifest.REJECTS, rejected)
        manifest.write_index(work / manifest.INDEX, shards)
        more = [*write_more(work)] if write_more else []
        dataset = {
            **facts,
            "format": manifest.FORMAT,
            "format_version": manifest.FORMAT_VERSION,
            "counts": counts,
            "members": [member["name"] for member in first["members"]] if first else [],
            "sha256": {name: folder.put(name) for name in (*manifest.TABLES, *more)},
        }
        folder.remove_stale({*(shard["url"] for shard in shards), *more})
        (work / manifest.DATASET).write_text(json.dumps(dataset, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        folder.put(manifest.DATASET)
    if record and plan:
        names = [*(shard["url"] for shard in shards), *manifest.TABLES, manifest.DATASET]
        stamps = {name: _stamp(storage.join(output, name)) for name in names}
        storage.write_bytes(record, json.dumps({"plan": plan, "stamps": stamps}).encode())
    return dataset


def _plan(
    items: list[Staged], facts: Mapping[str, Any], rejected: list[dict[str, str]], shard_size_bytes: int
) -> str | None:
    """Return the hash of all that a dataset follows from, None where a staged file is not known without reading it.

    A file on this machine is known by its size and time, one in a store by a fingerprint in its name.
    """
    names = []
    for item in items:
        name = item.url.rpartition("/")[2]
        has_fingerprint = "." in name.removeprefix(f"{item.key}.")
        stamp = _stamp(item.url) if storage.is_local(item.url) else ""
        if not stamp and not has_fingerprint:
            return None
        names.append((item.key, item.split, name, stamp))
    plan = (manifest.FORMAT_VERSION, names, facts, sorted(rejected, key=json.dumps), shard_size_bytes)
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _is_packed(output: str, record: str, plan: str) -> bool:
    """Return True where the folder holds what a pack of that plan left, by the sizes, times or tags of its files."""
    if not storage.exists(record):
        return False
    try:
        known = json.loads(storage.read_bytes(record))
        stamps = known["stamps"] if known["plan"] == plan else {}
        return bool(stamps) and all(
            stamp and _stamp(storage.join(output, name)) == stamp for name, stamp in stamps.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # damaged: everything is compared


def _stamp(url: str) -> str:
    """Return what changes whenever a file is written, "" where there is none or its store does not tell."""
    if not storage.is_local(url):
        return storage.tag(url)
    path = storage.local_path(url)
    if not path.is_file():
        return ""
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"


class _Folder:
    """The dataset folder while it is written: takes finished files in, and is uncommitted before it first changes."""

    def __init__(self, output: str, work: Path):
        self.output, self.work = output, work

    def put(self, name: str) -> str:
        """Move the finished file `name` from the work folder to its place; return its sha256."""
        source, target = self.work / name, storage.join(self.output, name)
        digest = storage.sha256(source)
        if not (storage.exists(target) and storage.sha256(target) == digest):
            self._uncommit()
            storage.move_file(source, target)
        return digest

    def remove_stale(self, names: set[str]) -> None:
        """Delete the shards, and the files of manifest.MORE, of an earlier pack that are not among `names`."""
        for url in manifest.list_contents(self.output):
            if url not in names:
                self._uncommit()
                storage.remove(storage.join(self.output, url))

    def _uncommit(self) -> None:
        storage.remove(storage.join(self.output, manifest.DATASET))


@contextmanager
def _work_folder(output: str) -> Iterator[Path]:
    """Yield a local folder for unfinished files, on the disk of a local `output` so that moving is a rename."""
    if storage.is_local(output):
        work = storage.local_path(output) / ".tmp-pack"
        shutil.rmtree(work, ignore_errors=True)  # left by a pack that was killed
    else:
        work = Path(tempfile.mkdtemp(prefix="ex4d-pack-"))
    try:
        (work / "shards").mkdir(parents=True, exist_ok=True)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_shards(
    items: list[Staged], folder: _Folder, shards: list[dict[str, Any]], shard_size_bytes: int
) -> Iterator[dict[str, Any]]:
    """Yield a manifest row a sample while the shards are written; a finished shard is appended to `shards`."""
    for split in manifest.SPLITS:
        source = _read_ahead([item for item in items if item.split == split])
        number, next_one = 0, next(source, None)
        while next_one is not None:
            name = manifest.shard_name(split, number)
            size = count = 0
            with open(folder.work / name, "wb") as file:
                while next_one and (not count or size + len(next_one[1]) + len(END) <= shard_size_bytes):
                    item, blob = next_one
                    file.write(blob)
                    yield _row(item, blob, name, size)
                    size, count, next_one = size + len(blob), count + 1, next(source, None)
                file.write(END)
            digest = folder.put(name)
            shards.append({"url": name, "nsamples": count, "filesize": size + len(END), "sha256": digest})
            number += 1


def _read_ahead(items: list[Staged], num_threads: int = 8) -> Iterator[tuple[Staged, bytes]]:
    """Yield (item, its bytes) in order; an object store is asked for the next few meanwhile."""
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[tuple[Staged, Future[bytes]]] = deque()
        for item in items:
            ahead.append((item, pool.submit(storage.read_bytes, item.url)))
            if len(ahead) > num_threads:
                first, future = ahead.popleft()
                yield first, future.result()
        for item, future in ahead:
            yield item, future.result()


def _row(item: Staged, blob: bytes, shard: str, offset: int) -> dict[str, Any]:
    members, contents = [], {}
    for entry in entries(blob, item.key):
        contents[entry.name] = content = blob[entry.offset : entry.offset + entry.length]
        digest = hashlib.sha256(content).hexdigest()
        members.append({"name": entry.name, "offset": offset + entry.offset, "length": entry.length, "sha256": digest})
    if "json" not in contents:
        raise ContractError(f"sample {item.key}: has no json member")
    facts = decode_json(contents["json"], f"sample {item.key}, json")
    missing = [name for name in (*manifest.PROVENANCE_COLUMNS, "scores") if name not in facts]
    if missing or facts.get("key") != item.key:
        raise ContractError(f"sample {item.key}: json lacks {missing} or holds another key ({facts.get('key')!r})")
    return {
        "key": item.key,
        "split": item.split,
        "shard": shard,
        "offset": offset,
        "length": len(blob),
        "sha256": hashlib.sha256(blob).hexdigest(),
        "members": members,
        "scores": facts["scores"],
        "types": type_tree(facts),
        **{name: facts[name] for name in manifest.PROVENANCE_COLUMNS},
    }


def _check_rows(first: dict[str, Any] | None, rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield all rows after checking that samples have equal members and types, and that no source is in both splits."""
    if first is None:
        return
    names = [member["name"] for member in first["members"]]
    split_by_source: dict[str, str] = {}
    for row in chain([first], rest):
        if [member["name"] for member in row["members"]] != names:
            raise ContractError(f"sample {row['key']}: members differ from sample {first['key']}, which has {names}")
        if row["types"] != first["types"]:
            raise ContractError(
                f"sample {row['key']}: json has keys or types {row['types']}, unlike {first['key']}: {first['types']}"
            )
        for source in (row["source_sha256"], row["source_group"]):
            if split_by_source.setdefault(source, row["split"]) != row["split"]:
                raise ContractError(f"sample {row['key']}: source {source} is in both train and val")
        yield row


def _sample_counts(items: list[Staged]) -> dict[str, int]:
    by_split = {split: sum(item.split == split for item in items) for split in manifest.SPLITS}
    return {"samples": len(items), **{f"samples_{split}": count for split, count in by_split.items()}}


def _check_keys(items: list[Staged], rejected: list[dict[str, str]]) -> None:
    keys = [item.key for item in items] + [row["key"] for row in rejected if row["unit"] == "clip"]
    if len(set(keys)) != len(keys):
        twice = sorted(key for key, count in Counter(keys).items() if count > 1)
        raise ContractError(f"clips counted more than once, as samples or rejects: {twice[:5]}")
    if unknown := {item.split for item in items} - set(manifest.SPLITS):
        raise ContractError(f"splits {sorted(unknown)} are not known; allowed: {manifest.SPLITS}")
