"""Read and write the tables of a dataset folder: manifest.parquet, rejects.parquet, index.json, dataset.json."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ex4d import storage
from ex4d.data.members import MAX_MASKS, decode_json
from ex4d.errors import ContractError

DATASET, INDEX, MANIFEST, REJECTS = "dataset.json", "index.json", "manifest.parquet", "rejects.parquet"
TABLES = (INDEX, MANIFEST, REJECTS)
FORMAT, FORMAT_VERSION = "ex4d-dataset", 1
SPLITS = ("train", "val")
SHARD = re.compile(
    r"shards/(train|val)-(\d{6})\.tar"
)  # only such names are ever opened, so that no path can leave the folder
MORE = re.compile(r"text\.parquet|text/\d{6}\.safetensors")  # further files of a latent dataset: data/texts.py
UNITS, FATES = ("video", "clip"), ("filtered", "bad")
REJECT_COLUMNS = ("key", "unit", "fate", "stage", "reason", "message")
PROVENANCE_COLUMNS = ("source_sha256", "source_group", "source_path", "start_s", "end_s")
ROWS_PER_GROUP = 4096
MAX_TABLE_BYTES, MAX_JSON_BYTES = 4 * 2**30, 64 * 2**20  # limits for untrusted files
UNPACKED_BYTES, UNPACKED_FACTOR = 64 * 2**20, 100  # a table may unpack to UNPACKED_BYTES + UNPACKED_FACTOR × its size
MAX_CLIP_BYTES, MAX_SIDE_PX = 4 * 2**30, 8192  # of one sample's frames and masks

_MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("length", pa.int64()), ("sha256", pa.string())])
_COLUMNS = [
    ("key", pa.string()),
    ("split", pa.string()),
    ("shard", pa.string()),  # relative URL, as in index.json
    ("offset", pa.int64()),  # of the sample's first tar header, bytes from the start of the shard
    ("length", pa.int64()),  # headers and padding included
    ("sha256", pa.string()),  # of these bytes
    ("members", pa.list_(_MEMBER)),  # offset: of the content, bytes from the start of the shard
    ("source_sha256", pa.string()),
    ("source_group", pa.string()),
    ("source_path", pa.string()),
    ("start_s", pa.float64()),
    ("end_s", pa.float64()),
]


def shard_name(split: str, number: int) -> str:
    """Return the relative URL of a shard."""
    return f"shards/{split}-{number:06d}.tar"


def list_contents(folder: str) -> list[str]:
    """Return the relative URLs of all files whose names match SHARD or MORE, whether or not the dataset names them."""
    names = [f"shards/{name}" for name in storage.list_files(storage.join(folder, "shards"))]
    names += [f"text/{name}" for name in storage.list_files(storage.join(folder, "text"))]
    names += [name for name in ("text.parquet",) if storage.exists(storage.join(folder, name))]
    return [name for name in names if SHARD.fullmatch(name) or MORE.fullmatch(name)]


def table(rows: Iterable[Mapping[str, Any]], scores: Iterable[str]) -> pa.Table:
    """Return rows of a manifest as an Arrow table.

    Args:
        rows: mappings of the columns above; each of their `scores` becomes a float64 column `score_NAME`.
        scores: the names of all scores.
    """
    names, schema = sorted(scores), schema_of(scores)
    flat = ({**row, **{f"score_{name}": row["scores"][name] for name in names}} for row in rows)
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in flat], schema=schema)


def schema_of(scores: Iterable[str]) -> pa.Schema:
    """Return the schema of a manifest with these scores."""
    return pa.schema([*_COLUMNS, *((f"score_{name}", pa.float64()) for name in sorted(scores))])


def write_manifest(path: Path, tables: Iterable[pa.Table]) -> int:
    """Write manifest.parquet to a local path, a group of rows at a time, and return the number of rows.

    Args:
        tables: from `table`, in row order; at least one, which may be empty.
    """
    rest = iter(tables)
    waiting = next(rest)
    count = 0
    with _writer(path, waiting.schema) as writer:
        for following in rest:
            waiting = pa.concat_tables([waiting, following])
            while len(waiting) >= ROWS_PER_GROUP:
                writer.write_table(waiting.slice(0, ROWS_PER_GROUP).combine_chunks())
                waiting, count = waiting.slice(ROWS_PER_GROUP), count + ROWS_PER_GROUP
        while len(waiting):
            writer.write_table(waiting.slice(0, ROWS_PER_GROUP).combine_chunks())
            count, waiting = count + min(len(waiting), ROWS_PER_GROUP), waiting.slice(ROWS_PER_GROUP)
    return count


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Every setting that affects the bytes is explicit: defaults may change between versions of the library.
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=3, version="2.6")


def write_rejects(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rejects.parquet to a local path; rows need exactly REJECT_COLUMNS, and are sorted by these."""
    write_table(path, rows, pa.schema([(name, pa.string()) for name in REJECT_COLUMNS]))


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> int:
    """Write rows as Parquet to a local path, a group at a time; return their number. Equal rows give equal bytes."""
    count, rest = 0, iter(rows)
    with _writer(path, schema) as writer:
        while batch := [{name: row[name] for name in schema.names} for row in islice(rest, ROWS_PER_GROUP)]:
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def read_table(folder: str, name: str, columns: list[str] | None = None, sha256: str | None = None) -> pa.Table:
    """Return manifest.parquet or rejects.parquet as an Arrow table.

    Args:
        columns: None: all.
        sha256: of the file according to dataset.json; None: do not compare.

    Raises:
        ContractError: the file is missing, is not such a table, or differs from its sha256 in dataset.json.
    """
    try:
        data = storage.read_bytes(storage.join(folder, name), 0, MAX_TABLE_BYTES + 1)
        if len(data) > MAX_TABLE_BYTES:
            raise ContractError(f"{name}: has more than {MAX_TABLE_BYTES} bytes")
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise ContractError(f"{folder}: {name} is not the one that {DATASET} names")
        return _unpacked(data, name, columns)
    except (OSError, pa.ArrowException) as error:
        raise ContractError(f"{name}: cannot be read ({error})"[:400]) from error


def _unpacked(data: bytes, name: str, columns: list[str] | None) -> pa.Table:
    """Return the table in a Parquet file's bytes. Raises ContractError if it unpacks to far more than its size."""
    file = pq.ParquetFile(io.BytesIO(data))
    batches = list(bounded_batches(file, len(data), name, columns))
    schema = file.schema_arrow
    if columns is not None:
        if missing := set(columns) - set(schema.names):
            raise ContractError(f"{name}: has no columns {sorted(missing)}")
        schema = pa.schema([schema.field(column) for column in columns])
    return pa.Table.from_batches([batch.select(schema.names) for batch in batches], schema=schema)


def bounded_batches(
    file: pq.ParquetFile, num_bytes: int, name: str, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a Parquet file of `num_bytes`. Raises ContractError once they take far more than that.

    A dictionary with one text of megabytes can expand to gigabytes, so few rows are read at a time and counted.
    """
    allowed = UNPACKED_BYTES + UNPACKED_FACTOR * num_bytes
    columns_of = range(file.metadata.num_columns)
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    sizes = [[group.column(number).total_uncompressed_size for number in columns_of] for group in groups]
    if max(map(sum, sizes), default=0) > allowed:  # even a single row may have all of it
        raise ContractError(f"{name}: {num_bytes} bytes unpack to more than {allowed}")
    widest = max((max(row, default=1) for row in sizes), default=1)
    rows, total = max(1, min(ROWS_PER_GROUP, UNPACKED_BYTES // max(1, widest))), 0
    for batch in file.iter_batches(batch_size=rows, columns=columns):
        total += batch.nbytes
        if total > allowed:
            raise ContractError(f"{name}: {num_bytes} bytes unpack to more than {allowed}")
        yield batch


def read_manifest(folder: str, sha256: str | None = None) -> pa.Table:
    """Return manifest.parquet, with the columns of `table`.

    Args:
        sha256: as for `read_table`.

    Raises:
        ContractError: a column is missing, of another type or holds nulls; a shard's name could lead out of the folder.
    """
    table = read_table(folder, MANIFEST, sha256=sha256)
    for name, kind in _COLUMNS:
        if name not in table.column_names or table.schema.field(name).type != kind or table[name].null_count:
            raise ContractError(f"{MANIFEST}: column {name} of type {kind}, without nulls, is not there")
    check_shard_names(table)
    members = table["members"].combine_chunks().flatten()
    if any(members.field(index).null_count for index in range(members.type.num_fields)) or members.null_count:
        raise ContractError(f"{MANIFEST}: column members holds nulls")
    return table


def check_shard_names(table: pa.Table) -> None:
    """Raise ContractError if a manifest's `shard` is not a name of `shard_name`."""
    if foreign := [name for name in table["shard"].unique().to_pylist() if not SHARD.fullmatch(name or "")]:
        raise ContractError(f"{MANIFEST}: shard {foreign[0]!r} is not a name of ours")


def rows_by_shard(table: pa.Table) -> dict[str, pa.Table]:
    """Return the rows of each shard, ordered by offset, as slices: as Python objects they might not fit in memory."""
    ordered = table.sort_by([("shard", "ascending"), ("offset", "ascending")]).combine_chunks()
    counts = ordered["shard"].value_counts().to_pylist()  # in order of appearance
    starts = accumulate((count["counts"] for count in counts), initial=0)
    return {count["values"]: ordered.slice(at, count["counts"]) for count, at in zip(counts, starts, strict=False)}


def write_index(path: Path, shards: Iterable[Mapping[str, Any]]) -> None:
    """Write index.json: the shard list of `wids`, with relative url, nsamples, filesize and sha256."""
    body = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": list(shards)}
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(folder: str, name: str) -> dict[str, Any]:
    """Return dataset.json or index.json. Raises ContractError if it is missing or not a JSON mapping."""
    try:
        data = storage.read_bytes(storage.join(folder, name), 0, MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ContractError(f"{name}: cannot be read ({error})") from error
    if len(data) > MAX_JSON_BYTES:
        raise ContractError(f"{name}: has more than {MAX_JSON_BYTES} bytes")
    return decode_json(data, name)


def read_dataset(folder: str) -> dict[str, Any]:
    """Return dataset.json of a finished dataset. Raises ContractError if it is missing or of another version."""
    if not storage.exists(storage.join(folder, DATASET)):
        raise ContractError(f"{folder}: has no {DATASET}, so it is not a finished dataset; run preprocess on it again")
    dataset = read_json(folder, DATASET)
    if dataset.get("format") != FORMAT or dataset.get("format_version") != FORMAT_VERSION:
        raise ContractError(
            f"{DATASET}: format {dataset.get('format')!r} version {dataset.get('format_version')!r}; "
            f"this program reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    for name, kind in {"counts": int, "sha256": str, "sample": object}.items():
        facts = dataset.get(name)
        if not isinstance(facts, dict) or not facts or not all(isinstance(value, kind) for value in facts.values()):
            raise ContractError(f"{DATASET}: {name} is not the mapping that a finished dataset has")
    _check_sample_facts(dataset["sample"])
    return dataset


def _check_sample_facts(facts: Mapping[str, Any]) -> None:
    num_frames, size, num_masks, kinds = (facts.get(n) for n in ("num_frames", "size", "num_masks", "mask_kinds"))
    sides = size if isinstance(size, list) and len(size) == 2 else [None]
    if not all(type(number) is int and number > 0 for number in (num_frames, *sides)):
        raise ContractError(f"{DATASET}: sample has num_frames {num_frames!r} and size {size!r}, not T and [H, W]")
    if "num_masks" in facts and not (type(num_masks) is int and 0 < num_masks <= MAX_MASKS):
        raise ContractError(f"{DATASET}: sample has num_masks {num_masks!r}, not 1 to {MAX_MASKS}")
    if "mask_kinds" in facts and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ContractError(f"{DATASET}: sample has mask_kinds {kinds!r}, not a list of names")
    num_bytes = math.prod([num_frames or 0, *sides]) * (3 + (num_masks or 1))
    if max(sides) > MAX_SIDE_PX or num_bytes > MAX_CLIP_BYTES:
        raise ContractError(
            f"{DATASET}: a sample of {num_frames} frames of {size} is larger than {MAX_CLIP_BYTES} bytes"
        )


def read_index(folder: str) -> list[dict[str, Any]]:
    """Return the shards of index.json. Raises ContractError for an invalid name or a gap in the numbers."""
    shards = read_json(folder, INDEX).get("shardlist")
    kinds = {"url": str, "nsamples": int, "filesize": int, "sha256": str}
    if not isinstance(shards, list) or not all(
        isinstance(shard, dict) and all(isinstance(shard.get(name), kind) for name, kind in kinds.items())
        for shard in shards
    ):
        raise ContractError(f"{INDEX}: shardlist is not a list of {sorted(kinds)}")
    numbers_of: dict[str, list[int]] = {split: [] for split in SPLITS}
    for shard in shards:
        match = SHARD.fullmatch(shard["url"])
        if match is None:
            raise ContractError(f"{INDEX}: url {shard['url']!r} is not shards/SPLIT-NNNNNN.tar")
        numbers_of[match[1]].append(int(match[2]))
    for split, numbers in numbers_of.items():
        if sorted(numbers) != list(range(len(numbers))):
            raise ContractError(f"{INDEX}: the numbers of the {split} shards are not 0 to {len(numbers) - 1}")
    return shards
