"""Encode tensors as safetensors bytes: equal tensors give equal bytes, and no header is trusted before it is checked.

The safetensors library does not fix the order of its header, and NumPy has no bfloat16: here float32 arrays may be
stored as bfloat16, and decode to their upper 16 bits. Every safetensors reader opens the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping

import numpy as np

from ex4d.errors import ContractError

STORED = ("float32", "bfloat16")
_TYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "U8": np.dtype("u1")}
_NAMES: dict[np.dtype, str] = {np.dtype("float32"): "F32", np.dtype("uint16"): "BF16", np.dtype("uint8"): "U8"}
_MAX_HEADER_BYTES = 2**26


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round finite float32 values of any shape to the nearest bfloat16, ties to even, and return its bits as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float32(stored: np.ndarray) -> np.ndarray:
    """Return an array from `decode_tensors` as float32: bfloat16 bits (uint16) are widened, float32 stays as it is."""
    if stored.dtype != np.uint16:
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)


def encode_tensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return a safetensors file of float32, uint8, and uint16 (bfloat16 bits) arrays, by name.

    Raises:
        ContractError: an array of another type.
    """
    header, parts, end = {}, [], 0
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        if array.dtype not in _NAMES:
            raise ContractError(f"tensor {name}: {array.dtype} cannot be stored")
        kind = _NAMES[array.dtype]
        parts.append(array.astype(_TYPES[kind], copy=False).tobytes())
        header[name] = {"dtype": kind, "shape": [*array.shape], "data_offsets": [end, end + len(parts[-1])]}
        end += len(parts[-1])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def tensor_offsets(data: bytes) -> dict[str, int]:
    """Return {name: offset of its data}, in bytes from the start of a file of `encode_tensors`."""
    start, header = _header(data)
    return {name: start + entry["data_offsets"][0] for name, entry in header.items()}


def decode_tensors(data: bytes, member: str = "safetensors") -> dict[str, np.ndarray]:
    """Return {name: read-only array}, without copying: float32, uint8, or bfloat16's bits as uint16 (`to_float32`).

    Raises:
        ContractError: not a file of `encode_tensors`; the message names `member`.
    """
    try:
        start, header = _header(data)
        tensors, position = {}, 0
        for name, entry in header.items():
            kind, shape, (first, last) = _TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not all(isinstance(side, int) and side >= 0 for side in (*shape, first, last)):
                raise ValueError(f"{name} has the shape {shape}")
            if first != position or last - first != math.prod(shape) * kind.itemsize or start + last > len(data):
                raise ValueError(f"{name} does not lie where its shape says")
            tensors[name] = np.frombuffer(data, kind, math.prod(shape), start + first).reshape(shape)
            position = last
        if start + position != len(data):
            raise ValueError("there is data after the last tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ContractError(f"{member}: does not hold valid tensors ({error})") from error
    return tensors


def _header(data: bytes) -> tuple[int, dict]:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ContractError("safetensors: its header is damaged")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return 8 + length, header


def store_as(kind: str, tensors: Mapping[str, np.ndarray], exact: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Return the tensors as they will be stored: float32 ones as bfloat16 bits if `kind` is "bfloat16".

    Args:
        kind: one of STORED.
        exact: names that stay float32.
    """
    if kind == "float32":
        return dict(tensors)
    return {
        name: to_bfloat16(array) if array.dtype == np.float32 and name not in exact else array
        for name, array in tensors.items()
    }
