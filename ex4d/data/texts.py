"""Store the prompt embeddings of a latent dataset: one per distinct text, beside the shards, for ranged reads.

    text.parquet              a row per text: text_sha256, text, file, offset, num_tokens, sha256
    text/000000.safetensors … the embeddings [num_tokens, text_dim] under the sha256 of their text

Rows after the last token are zero and are not stored. The empty text is always present.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ex4d import storage
from ex4d.data import manifest
from ex4d.data.tensors import decode_tensors, encode_tensors, tensor_offsets, to_float32
from ex4d.errors import ContractError

TABLE = "text.parquet"
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
MAX_DIM, MAX_LENGTH = 2**14, 2**12  # of an embedding; Wan's has 4,096 numbers for each of 512 tokens
KEPT = 1024  # embeddings that one process caches

_SCHEMA = pa.schema(
    [
        ("text_sha256", pa.string()),
        ("text", pa.string()),
        ("file", pa.string()),
        ("offset", pa.int64()),  # of the numbers, bytes from the start of the file
        ("num_tokens", pa.int64()),
        ("sha256", pa.string()),  # of these bytes
    ]
)


def text_key(text: str) -> str:
    """Return the hex sha256 of a text's UTF-8 bytes: its name in the store."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def trimmed(embeds: np.ndarray) -> np.ndarray:
    """Return float32 [512, d] without the zero rows at its end, at least one row."""
    used = np.flatnonzero(embeds.any(axis=1))
    return embeds[: int(used[-1]) + 1 if len(used) else 1]


def write(work: Path, staged: Mapping[str, str], file_size_bytes: int) -> list[str]:
    """Write text.parquet and text/*.safetensors under `work`; return their names. Equal texts give equal bytes.

    Args:
        staged: {text_sha256: URL of a file of tensors} with `embeds` [n, d] and `text` uint8 (UTF-8).
        file_size_bytes: maximum size of a file; only a single embedding may exceed it.
    """
    rows: list[dict[str, Any]] = []
    names = [TABLE]
    (work / "text").mkdir(parents=True, exist_ok=True)
    for number, group in enumerate(_groups(staged, file_size_bytes)):
        names.append(f"text/{number:06d}.safetensors")
        data = encode_tensors({key: embeds for key, (embeds, _) in group.items()})
        (work / names[-1]).write_bytes(data)
        places = tensor_offsets(data)
        for key, (embeds, text) in group.items():
            digest = hashlib.sha256(embeds.tobytes()).hexdigest()
            values = (key, text, names[-1], places[key], len(embeds), digest)
            rows.append(dict(zip(_SCHEMA.names, values, strict=True)))
    manifest.write_table(work / TABLE, rows, _SCHEMA)
    return names


def _groups(staged: Mapping[str, str], file_size_bytes: int) -> Iterator[dict[str, tuple[np.ndarray, str]]]:
    group: dict[str, tuple[np.ndarray, str]] = {}
    size = 0
    for key in sorted(staged):
        tensors = decode_tensors(storage.read_bytes(staged[key]), staged[key])
        text = tensors["text"].tobytes().decode("utf-8")
        if text_key(text) != key:
            raise ContractError(f"{staged[key]}: holds another text")
        if group and size + tensors["embeds"].nbytes > file_size_bytes:
            yield group
            group, size = {}, 0
        group[key] = (tensors["embeds"], text)
        size += tensors["embeds"].nbytes
    if group:
        yield group


class TextStore:
    """The embeddings of a latent dataset, read on demand. Thread-safe.

    Raises:
        ContractError: the table is not the one that dataset.json names.
    """

    def __init__(self, folder: str, dataset: Mapping[str, Any]):
        facts = dataset["latents"]
        self.folder, self.dtype = folder, facts["dtype"]
        self.dim, self.length = facts["text_dim"], facts["text_length"]
        for name, most in (("text_dim", MAX_DIM), ("text_length", MAX_LENGTH)):
            if not isinstance(facts[name], int) or not 0 < facts[name] <= most:
                raise ContractError(f"dataset.json: latents.{name} is {facts[name]!r}, not an integer from 1 to {most}")
        table = manifest.read_table(folder, TABLE, sha256=dataset["sha256"].get(TABLE))
        self._rows = {row["text_sha256"]: row for row in table.drop_columns(["text"]).to_pylist()}
        if foreign := [row["file"] for row in self._rows.values() if not manifest.MORE.fullmatch(row["file"])]:
            raise ContractError(f"{TABLE}: file {foreign[0]!r} is not a name of ours")
        self._read = lru_cache(KEPT)(self._read_one)

    def __contains__(self, text: str) -> bool:
        return text_key(text) in self._rows

    def embeds(self, text: str) -> np.ndarray:
        """Return float32 [text_length, text_dim], zero after the last token.

        Raises:
            ContractError: the text is not in the store, or its bytes are damaged.
        """
        stored = to_float32(self._read(text_key(text)))
        whole = np.zeros((self.length, self.dim), np.float32)
        whole[: len(stored)] = stored
        return whole

    def _read_one(self, key: str) -> np.ndarray:
        row = self._rows.get(key)
        if row is None:
            raise ContractError(f"{TABLE}: has no text with the sha256 {key}")
        size = row["num_tokens"] * self.dim * ITEM_BYTES[self.dtype]
        data = storage.read_bytes(storage.join(self.folder, row["file"]), row["offset"], size)
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise ContractError(f"{row['file']}: sha256 of the text {key} is wrong")
        kind = "<u2" if self.dtype == "bfloat16" else "<f4"
        return np.frombuffer(data, kind).reshape(row["num_tokens"], self.dim)


def problems(folder: str, dataset: Mapping[str, Any], captions: Iterable[str]) -> list[str]:
    """Return a sentence for each embedding that is damaged, and for each caption (a sha256) that has none."""
    store = TextStore(folder, dataset)
    wrong = []
    for key in sorted({*captions, text_key(""), *store._rows}):
        try:
            store._read_one(key)
        except (ContractError, OSError) as error:
            wrong.append(str(error))
    return wrong
