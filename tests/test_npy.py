"""npy files of NumPy are read without Python's parser, and anything else is rejected."""

from __future__ import annotations

import ast
import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ex4d import npy


def written(array: np.ndarray) -> io.BytesIO:
    """Return the array as an npy file written by NumPy."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0))
    file.seek(0)
    return file


def with_header(text: str) -> io.BytesIO:
    """Return an npy file of version 1.0 with this header and 64 zero bytes."""
    return io.BytesIO(npy.MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(64))


@given(
    hnp.arrays(
        st.one_of(
            hnp.floating_dtypes(),
            hnp.integer_dtypes(),
            hnp.boolean_dtypes(),
            hnp.datetime64_dtypes(),
            hnp.unicode_string_dtypes(),
        ),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    ),
    st.booleans(),
)
def test_an_array_is_read_as_numpy_reads_it(array, by_columns):
    array = np.asfortranarray(array) if by_columns and array.ndim else array
    file = written(array)
    header = npy.header(file)
    assert header.by_columns == (array.ndim > 1 and not array.flags.c_contiguous)
    read = npy.numbers(file, header)
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    assert read.tobytes() == array.tobytes()


def test_no_header_reaches_pythons_parser(monkeypatch):
    """In Python 3.11 it fails now and then if two threads parse at once."""
    out = io.BytesIO()
    np.savez(out, a=np.arange(6).reshape(2, 3), name=np.array("z_depth"))

    def parser(*_args, **_kwargs):
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr(ast, "parse", parser)
    arrays = npy.archive(out.getvalue())
    assert arrays["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert str(arrays["name"]) == "z_depth"


@pytest.mark.parametrize(
    "text",
    [
        "{'shape': (2, 3), 'fortran_order': False, 'descr': '<f4'}",  # another order, no comma at the end
        '{"descr": "<f4", "fortran_order": False, "shape": (2, 3, ), }\n',
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }",  # Python 2
        "{'descr': u'float32', 'fortran_order': False, 'shape': (2, 3), }",
    ],
)
def test_headers_of_other_writers_are_read(text):
    assert npy.header(with_header(text)) == npy.Header((2, 3), np.dtype("<f4"), False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'shape': (3,)}",
        "{'descr': '<q9', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '|S0', 'fortran_order': False, 'shape': (1000000000000000,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000, 1000000000000000)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os'),)}",
    ],
)
def test_what_is_not_one_array_of_numbers_is_refused(text):
    with pytest.raises(ValueError, match="npy"):
        npy.header(with_header(text))


def test_objects_pages_later_versions_and_cut_files_are_refused():
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    pickled.seek(0)
    with pytest.raises(ValueError, match="allow_pickle"):
        npy.header(pickled)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        npy.header(io.BytesIO(b"<html>404</html>"))
    with pytest.raises(ValueError, match=r"version 2\.0"):
        npy.header(io.BytesIO(npy.MAGIC + b"\x02\x00" + struct.pack("<I", 2**30)))
    cut = io.BytesIO(written(np.zeros((4, 4))).getvalue()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        npy.numbers(cut, npy.header(cut))
    with pytest.raises(zipfile.BadZipFile):
        npy.archive(b"none")
