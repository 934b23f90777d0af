"""Read tables row by row: CSV, TSV, Parquet, JSON and JSON lines, in any Unicode encoding."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ex4d import remote, storage, text
from ex4d.errors import ConfigError, ContractError
from pipelines.inputs import rows

MAX_FIELD_BYTES = 16 * 2**20
MAX_WHOLE_BYTES = 512 * 2**20  # maximum size of a list that is not read row by row


def without_query(url: str) -> str:
    """Return a web URL without its query and fragment; any other path unchanged."""
    return url.partition("?")[0].partition("#")[0] if storage.is_web(url) else url


def read(path: str) -> Iterator[Any]:
    """Yield a table's column names, then each row as a mapping, or an error message for a malformed row."""
    plain = without_query(path)
    with storage.open_read(path) as file:
        if plain.endswith(".parquet"):
            yield from _parquet_table(file, path)
        elif plain.endswith((".json", ".jsonl")):
            yield from _json_table(file, path)
        else:
            yield from _csv_table(file, path, is_tabs=plain.endswith(".tsv"))


def _csv_table(file: Any, path: str, is_tabs: bool) -> Iterator[Any]:
    encoding = text.encoding_of(file.read(4))
    file.seek(0)
    # File names may hold arbitrary bytes; captions are checked later.
    lines = io.TextIOWrapper(file, encoding, "surrogateescape" if encoding == "utf-8-sig" else "strict", newline="")
    csv.field_size_limit(MAX_FIELD_BYTES)
    first = lines.readline(MAX_FIELD_BYTES)
    lines.seek(0)
    delimiters = "\t" if is_tabs else ",;\t"
    guesses = (
        one for one in delimiters if {"path", "url"} & set(rows.known(next(csv.reader([first], delimiter=one), ())))
    )
    reader = csv.DictReader(_bounded_lines(lines, path), delimiter=next(guesses, delimiters[0]), strict=True)
    yield reader.fieldnames or ()
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "a quote that is not closed" if "end of data" in str(error) else error
            yield f"is malformed ({what})"
            continue
        yield "has more fields than the header has columns" if None in row else row


def _bounded_lines(lines: io.TextIOWrapper, path: str) -> Iterator[str]:
    """Yield lines. Raises ConfigError for a line longer than any valid row, e.g. in a file that is not text."""
    while line := lines.readline(MAX_FIELD_BYTES):
        if len(line) == MAX_FIELD_BYTES and not line.endswith(("\n", "\r")):
            what = f"has a line of more than {MAX_FIELD_BYTES} characters"
            raise ConfigError("preprocess.input", remote.redacted(path), what)
        yield line


def whole(file: Any, path: str) -> bytes:
    """Return the bytes of an open list that is not read row by row. Raises ConfigError beyond MAX_WHOLE_BYTES."""
    data = file.read(MAX_WHOLE_BYTES + 1)
    if len(data) > MAX_WHOLE_BYTES:
        what = f"has more than {MAX_WHOLE_BYTES >> 20} MB: write it as CSV or Parquet, which are read row by row"
        raise ConfigError("preprocess.input", remote.redacted(path), what)
    return data


def _json_table(file: Any, path: str) -> Iterator[Any]:
    """Yield the keys of all objects in a JSON list or in JSON lines, then each object."""
    try:
        data = text.decode(whole(file, path))
        rows = json.loads(data) if without_query(path).endswith(".json") else None
    except (ValueError, RecursionError) as error:
        raise ConfigError("preprocess.input", remote.redacted(path), f"is not a JSON list: {error}"[:200]) from None
    if rows is None:
        rows = [_json_row(line) for line in data.split("\n") if line.strip()]
    if not isinstance(rows, list):
        raise ConfigError("preprocess.input", remote.redacted(path), "is not a JSON list of objects, one per video")
    names = dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row)
    yield list(names)
    empty = dict.fromkeys(names)
    for row in rows:
        yield {**empty, **row} if isinstance(row, Mapping) else row if isinstance(row, str) else "is no object"


def _json_row(line: str) -> Any:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "is no JSON"
    return row if isinstance(row, Mapping) else "is no object"


def _parquet_table(file: Any, path: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ex4d.data.manifest import bounded_batches

    try:
        table, num_bytes = pq.ParquetFile(file), file.seek(0, os.SEEK_END)
        names = table.schema_arrow.names
        yield names
        for batch in bounded_batches(table, num_bytes, "the list", list(rows.known(names).values())):
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        what = f"is not a Parquet file ({type(error).__name__})"
        raise ConfigError("preprocess.input", remote.redacted(path), what) from None
    except ContractError as error:
        raise ConfigError("preprocess.input", remote.redacted(path), str(error)) from None
