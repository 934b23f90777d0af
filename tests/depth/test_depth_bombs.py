"""Depth files that declare more data than fits in memory are rejected by their headers, before any allocation."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from ex4d.depth import arrays, pictures, sidecar
from ex4d.errors import BadSample

INDEX = np.arange(49)


def refused_in_the_child_and_outside(path: Path, reason: str = "depth_shape") -> None:
    """Read a file in this process, with its memory measured, and as a command does; both must reject it alike."""
    with path.open("rb") as file, pytest.raises(BadSample) as caught:
        arrays.read(file, path.name, arrays.Wanted(INDEX))
    with pytest.raises(BadSample) as isolated:
        sidecar.read(str(path), arrays.Wanted(INDEX))
    assert (caught.value.reason, isolated.value.reason) == (reason, reason)
    assert str(caught.value) == str(isolated.value)


@pytest.fixture(autouse=True)
def little_memory():
    """NumPy tells tracemalloc of its arrays."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, f"{peak >> 20} MB"


@pytest.mark.parametrize("shape", [(49, 8192, 8192), (49, 16384, 16384), (49, 2**20, 2**20)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_huge_maps_in_a_file_full_of_holes(tmp_path, shape, by_columns):
    path = tmp_path / "a.depth.npy"
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": by_columns, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(min(file.tell() + 4 * int(np.prod(shape)), 2**42))
    refused_in_the_child_and_outside(path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize(("side", "extra"), [(16384, 0), (8192, 0), (64, 64 << 20), (2**31 - 1, 0)])
def test_huge_pictures(tmp_path, side, extra):
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0))
    for number in range(49):
        path = tmp_path / f"{number}.png"
        path.write_bytes(head)
        with open(path, "ab") as file:
            file.truncate(len(head) + extra)
    with pytest.raises(BadSample, match="depth_shape"):
        pictures.read(str(tmp_path), INDEX)


def test_an_intrinsic_matrix_of_gigabytes(tmp_path):
    """K of an npz is small, or it is not read."""
    import zipfile

    path = tmp_path / "a.depth.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("z_depth", (49, 4, 4)), ("K", (2**16, 2**14, 3))):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": shape})
                if name == "z_depth":
                    member.write(bytes(8 * int(np.prod(shape))))
    refused_in_the_child_and_outside(path)
