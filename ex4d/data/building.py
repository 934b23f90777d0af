"""Build one shard from its staged samples; runs on a worker, which returns the shard's facts to the packing driver.

A shard's contents follow from its plan alone, so any worker can build any shard, and the plan's digest recognises a
shard that was built from the same samples before.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ex4d import storage
from ex4d.data import manifest
from ex4d.data.members import decode_json, type_tree
from ex4d.data.tar import END, entries
from ex4d.errors import ContractError
from ex4d.threads import in_order

NUM_READERS = 8
FACTS = b"ex4d"  # of a shard, in the metadata of its table


def build(plan: Mapping[str, Any], output: str, tables: str, work: str | None) -> dict[str, Any]:
    """Write a shard to `output` and its manifest rows to `tables`; return the shard's facts.

    Args:
        plan: `name`, `split`, `digest`, and `items`: [key, url, bytes, sha256 or ""] of each sample, in order.
        output: the dataset folder. tables: folder of the rows; see `read_facts` and `read_rows`.
        work: folder for unfinished files on the disk of a local output; None: a temporary folder of this machine.

    Returns:
        `url`, `nsamples`, `filesize`, `sha256`, `digest`, `stamp`, and `members` and `types`, which all samples share;
        or only `damaged`: the keys of staged files that are missing or do not match their hash.

    Raises:
        ContractError: a staged file is not a sample, or samples differ in members or in the types of their provenance.
    """
    prefix = "shard-" if work else "ex4d-shard-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=work, ignore_cleanup_errors=True) as folder:
        path, rows = Path(folder) / plan["name"].rpartition("/")[2], []
        damaged, position, whole = [], 0, hashlib.sha256()
        with open(path, "wb") as file:
            for (key, _, _, sha256), blob in in_order(_read, plan["items"], NUM_READERS):
                digest = "" if blob is None else hashlib.sha256(blob).hexdigest()
                if blob is None or (sha256 and digest != sha256):
                    damaged.append(key)
                    continue
                file.write(blob)
                whole.update(blob)
                rows.append(_row(key, plan["split"], blob, digest, plan["name"], position))
                _check_alike(rows[0], rows[-1])
                position += len(blob)
            file.write(END)
            whole.update(END)
        if damaged:
            return {"damaged": damaged}
        facts = {"url": plan["name"], "nsamples": len(rows), "filesize": path.stat().st_size}
        facts |= {"sha256": place(path, output, plan["name"], whole.hexdigest()), "digest": plan["digest"]}
        facts |= {"stamp": stamp(storage.join(output, plan["name"])), "types": rows[0]["types"]}
        facts |= {"members": [member["name"] for member in rows[0]["members"]]}
        _write_rows(manifest.table(rows, rows[0]["scores"]), facts, tables)
    return json.loads(json.dumps(facts))  # as `read_facts` will return them


def table_url(tables: str, name: str) -> str:
    """Return the URL of the manifest rows of a shard."""
    return storage.join(tables, name.rpartition("/")[2].removesuffix(".tar") + ".parquet")


def read_facts(tables: str, name: str) -> dict[str, Any] | None:
    """Return the facts of a shard, as stored with its rows; None if they are missing or damaged."""
    try:
        with storage.open_read(table_url(tables, name)) as file:
            return json.loads(pq.read_schema(file).metadata[FACTS])
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError):
        return None


def first_and_last_key(tables: str, name: str) -> tuple[str, str]:
    """Return the smallest and the largest key of a shard's samples. Raises OSError, ArrowException."""
    with storage.open_read(table_url(tables, name)) as file:
        facts = pq.read_metadata(file)
        groups = [facts.row_group(number).column(0).statistics for number in range(facts.num_row_groups)]
        if not all(group and group.has_min_max for group in groups):
            return "", "\x7f"
    return min(group.min for group in groups), max(group.max for group in groups)


def read_rows(tables: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the manifest rows of a shard, or only some columns. Raises OSError, ArrowException."""
    with storage.open_read(table_url(tables, name)) as file:
        table = pq.read_table(file, columns=columns and list(columns)).replace_schema_metadata(None)
    if columns is not None:
        return table
    # Parquet names the elements of lists differently.
    return table.cast(manifest.schema_of(name[6:] for name in table.column_names if name.startswith("score_")))


def _write_rows(table: pa.Table, facts: Mapping[str, Any], tables: str) -> None:
    blob = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({FACTS: json.dumps(facts)}), blob, compression="zstd")
    storage.write_bytes(table_url(tables, facts["url"]), blob.getvalue().to_pybytes())


def is_as_built(facts: Mapping[str, Any], output: str, tables: str) -> bool:
    """Return True if a shard is unchanged since it was built: by its stamp, else (a copied folder) by its content."""
    url = storage.join(output, facts["url"])
    now = stamp(url)
    if now and now == facts["stamp"]:
        return True
    if not storage.is_file(url) or storage.size(url) != facts["filesize"] or storage.sha256(url) != facts["sha256"]:
        return False
    if now:  # remember the stamp, so that the content is not read again
        _write_rows(read_rows(tables, facts["url"]), {**facts, "stamp": now}, tables)
    return True


def place(source: Path, output: str, name: str, digest: str = "") -> str:
    """Move a finished local file to its place in the dataset folder; return its sha256, which is `digest` if given.

    Unless the same file is already there, the dataset is uncommitted (dataset.json removed) first.
    """
    target = storage.join(output, name)
    digest = digest or storage.sha256(source)
    if not (storage.exists(target) and storage.sha256(target) == digest):
        storage.remove(storage.join(output, manifest.DATASET))
        storage.move_file(source, target)
    return digest


def stamp(url: str) -> str:
    """Return a value that changes whenever a file is written; "" if it is missing or its store has no such tag."""
    if not storage.is_local(url):
        return storage.tag(url)
    path = storage.local_path(url)
    if not path.is_file():
        return ""
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"


def _read(item: Sequence[Any]) -> tuple[Sequence[Any], bytes | None]:
    """Return an item of a plan and its bytes, None if the file is missing."""
    try:
        return item, storage.read_bytes(item[1])
    except FileNotFoundError:
        return item, None


def _row(key: str, split: str, blob: bytes, sha256: str, shard: str, offset: int) -> dict[str, Any]:
    members, contents = [], {}
    for entry in entries(blob, key):
        contents[entry.name] = content = blob[entry.offset : entry.offset + entry.length]
        digest = hashlib.sha256(content).hexdigest()
        members.append({"name": entry.name, "offset": offset + entry.offset, "length": entry.length, "sha256": digest})
    if "json" not in contents:
        raise ContractError(f"sample {key}: has no json member")
    facts = decode_json(contents["json"], f"sample {key}, json")
    missing = [name for name in (*manifest.PROVENANCE_COLUMNS, "scores") if name not in facts]
    if missing or facts.get("key") != key:
        raise ContractError(f"sample {key}: json lacks {missing} or holds another key ({facts.get('key')!r})")
    return {
        "key": key,
        "split": split,
        "shard": shard,
        "offset": offset,
        "length": len(blob),
        "sha256": sha256,
        "members": members,
        "scores": facts["scores"],
        "types": type_tree(facts),
        **{name: facts[name] for name in manifest.PROVENANCE_COLUMNS},
    }


def _check_alike(first: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Raise ContractError if two samples differ in members or in the types of their provenance."""
    names, others = ([member["name"] for member in one["members"]] for one in (row, first))
    if names != others:
        raise ContractError(f"sample {row['key']}: members differ from sample {first['key']}, which has {others}")
    if row["types"] != first["types"]:
        raise ContractError(
            f"sample {row['key']}: json has keys or types {row['types']}, unlike {first['key']}: {first['types']}"
        )


def here(plans: Iterable[Mapping[str, Any]], output: str, tables: str, work: str | None) -> Iterator[dict[str, Any]]:
    """Build shards one after another in this process; yield the facts of each."""
    return (build(plan, output, tables, work) for plan in plans)
