"""Read untrusted npy and npz files, from many threads at once.

NumPy's own reader passes the header to Python's parser, which in Python 3.11 occasionally fails ("AST constructor
recursion depth mismatch") while another thread parses. It also reads headers of gigabytes, and pickles on request.
Here a header has version 1.0 (64 kB at most), holds numbers, booleans, times or text, and is matched by a pattern.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from dataclasses import dataclass
from typing import IO

import numpy as np

MAGIC = b"\x93NUMPY"
_TYPE = re.compile(
    r"""["']descr["']\s*:\s*u?["']([<>|=]?[a-zA-Z?][a-z0-9]{0,11}(?:\[\w{1,8}\])?)["']\s*(?=[,}])""", re.ASCII
)
_ORDER = re.compile(r"""["']fortran_order["']\s*:\s*(True|False)\s*(?=[,}])""", re.ASCII)
_SHAPE = re.compile(r"""["']shape["']\s*:\s*\(((?:\s*\d{1,18}L?\s*,)*(?:\s*\d{1,18}L?)?)\s*\)\s*(?=[,}])""", re.ASCII)


@dataclass(frozen=True)
class Header:
    """The shape, dtype and order that an npy declares.

    Args:
        by_columns: the numbers are in Fortran order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    by_columns: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {[*self.shape]}"


def header(file: IO[bytes]) -> Header:
    """Read the header of an npy stream, and leave the stream at its numbers.

    Raises:
        ValueError: not an npy of version 1.0, or its values are not numbers, booleans, times or text; the message has
            "allow_pickle" if they are pickled objects.
    """
    start = file.read(10)
    if start[:6] != MAGIC or len(start) < 10:
        raise ValueError("is not an npy or npz file; if it is a Git LFS pointer or a web page, download the real file")
    if start[6:8] != b"\x01\x00":  # a later version may announce a header of gigabytes
        raise ValueError(f"npy of version {start[6]}.{start[7]}, not 1.0")
    length = int.from_bytes(start[8:], "little")
    text = file.read(length).decode("latin-1")
    parts = [pattern.findall(text) for pattern in (_TYPE, _ORDER, _SHAPE)]
    if len(text) < length or [len(part) for part in parts] != [1, 1, 1]:
        raise ValueError(f"npy with the header {text[:80]!r}, which is not one array of numbers")
    (descr,), (order,), (shape,) = parts
    try:
        dtype = np.dtype(descr)
    except (TypeError, ValueError) as error:
        raise ValueError(f"npy of the type {descr!r}: {error}") from None
    if dtype.hasobject:
        raise ValueError("holds objects, which need allow_pickle")
    sides = tuple(int(side.strip(" L")) for side in shape.split(",") if side.strip())
    found = Header(sides, dtype, order == "True")
    if not dtype.itemsize or found.num_bytes >= 2**63:  # zero-size items could be any number
        raise ValueError(f"npy with the header {text[:80]!r}, which does not fit into memory")
    return found


def numbers(file: IO[bytes], of: Header) -> np.ndarray:
    """Read the array whose header has just been read; it is read-only.

    Raises:
        ValueError: the file has fewer bytes than the header declares.
    """
    data = file.read(of.num_bytes)
    if len(data) < of.num_bytes:
        raise ValueError(f"is cut short: {of} needs {of.num_bytes} bytes, {len(data)} are there")
    return np.frombuffer(data, of.dtype).reshape(of.shape, order="F" if of.by_columns else "C")


def archive(data: bytes) -> dict[str, np.ndarray]:
    """Read {name: array} of an npz that this project wrote. Raises ValueError for unsupported arrays."""
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        arrays = {}
        for name in members.namelist():
            with members.open(name) as member:
                arrays[name.removesuffix(".npy")] = numbers(member, header(member)).copy()
    return arrays
