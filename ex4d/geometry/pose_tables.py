"""Read camera poses from text tables: one pose per row, a fixed number of columns, checked row by row.

| format | columns | pose |
|---|---|---|
| `re10k` | URL line, then `time fx fy cx cy k1 k2` and 3×4: 19 | OpenCV w2c, K in fractions of W and H |
| `tum` | `time tx ty tz qx qy qz qw`: 8, in any order if a header names them | OpenCV c2w |
| `kitti` | 3×4: 12 | OpenCV c2w |
| `euroc` | csv `ns,px,py,pz,qw,qx,qy,qz`: 8, or 17 with velocity and biases | c2w of the sensor |
| `colmap` | `images.txt`: `id qw qx qy qz tx ty tz camera name`, then points; `images.bin` | OpenCV w2c, by name |
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from ex4d import storage, text
from ex4d.geometry.camera import invert
from ex4d.geometry.pose_file import (
    MAX_FOCAL_SHARE,
    QUATERNION_TOLERANCE,
    PoseFile,
    bytes_of,
    looks_like,
    squared,
)

TUM_COLUMNS = ("time", "tx", "ty", "tz", "qx", "qy", "qz", "qw")
_NAMES = {"timestamp": "time", "t": "time", "x": "tx", "y": "ty", "z": "tz", "px": "tx", "py": "ty", "pz": "tz"}
EPOCH_NS = 1e15  # larger times are nanoseconds since 1970 as in EuRoC, whose quaternions start with w


def lines_of(path: str | Path, num_bytes: int | None = None) -> list[str]:
    """Read the stripped lines of a text file, or of its first `num_bytes`, including empty lines and comments."""
    data = bytes_of(path) if num_bytes is None else storage.read_bytes(path, 0, num_bytes)
    if num_bytes is not None and len(data) == num_bytes:
        data = data[: data.rfind(b"\n") + 1]  # the data is truncated, so its last line may be incomplete
    return [line.strip() for line in text.decode(data).splitlines()]


def rows_of(lines: list[str]) -> list[list[str]]:
    """Split the lines that are neither empty nor comments into cells."""
    return [line.replace(",", " ").split() for line in lines if line and not line.startswith("#")]


def table(rows: list[list[str]], columns: tuple[int, ...]) -> np.ndarray:
    """Parse rows of cells to float64 [T, C], with C one of `columns`. Raises ValueError, which names the row."""
    if not rows:
        raise ValueError("holds no rows of numbers")
    width = len(rows[0])
    if width not in columns:
        raise ValueError(f"row 1 has {width} columns, expected {' or '.join(map(str, columns))}")
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise ValueError(f"row {number} has {len(row)} columns, but the rows before it have {width}")
        for cell in row:
            if not _is_number(cell):
                raise ValueError(f"row {number} has {cell[:40]!r} where a finite number is expected")
    return np.array(rows, np.float64)


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell))) and "_" not in cell
    except ValueError:
        return False


def _rotations(quaternions: np.ndarray) -> np.ndarray:
    """Convert unit quaternions x y z w [T, 4] to rotations [T, 3, 3]. Raises ValueError, which names the row."""
    lengths = np.linalg.norm(quaternions, axis=1)
    off = np.abs(lengths - 1) > QUATERNION_TOLERANCE
    if off.any():
        row = int(np.argmax(off))
        raise ValueError(f"row {row + 1} has a quaternion of length {lengths[row]:.4g}; a rotation's is 1")
    return Rotation.from_quat(quaternions).as_matrix()


def _in_time_order(times: np.ndarray) -> np.ndarray:
    order = np.argsort(times, kind="stable")
    twice = np.diff(times[order]) <= 0
    if twice.any():
        raise ValueError(f"two poses have the time {times[order][int(np.argmax(twice))]:.9g}")
    return order


def read_re10k(path: str | Path) -> PoseFile:
    lines = [line for line in lines_of(path) if line]
    has_source = bool(lines) and len(lines[0].split()) == 1  # the video's URL
    cells = table(rows_of(lines[has_source:]), (19,))
    cells = cells[_in_time_order(cells[:, 0])]
    if not ((cells[:, 1:3] > 0) & (cells[:, 1:3] <= MAX_FOCAL_SHARE)).all():
        raise ValueError(f"fx and fy are fractions of the picture's sides, above 0 and at most {MAX_FOCAL_SHARE:g}")
    K = np.tile(np.eye(3), (len(cells), 1, 1))
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2] = cells[:, 1:5].T
    return PoseFile(squared(cells[:, 7:].reshape(-1, 3, 4)), K)


def read_tum(path: str | Path) -> PoseFile:
    lines = lines_of(path)
    rows = rows_of(lines)
    if not rows:
        raise ValueError("holds no rows of numbers")
    named = _column_names(lines, rows)
    if not _is_number(rows[0][0]):
        rows = rows[1:]
    cells = table(rows, (8,))
    if named:
        cells = cells[:, [named.index(name) for name in TUM_COLUMNS]]
    elif cells[:, 0].max() > EPOCH_NS:
        raise ValueError("times are in nanoseconds and no line names the columns: set format=euroc if qw comes first")
    return _from_centres(cells[:, 0], cells[:, 1:4], cells[:, 4:])


def _column_names(lines: list[str], rows: list[list[str]]) -> list[str]:
    """Return the column names if a header, a comment or not, names exactly TUM_COLUMNS; else []."""
    header = [line for line in lines[:3] if line.startswith("#")] or [" ".join(rows[0])]
    for line in header:
        words = re.sub(r"\[[^\]]*\]", " ", line.lstrip("#")).lower().replace(",", " ").split()
        names = [re.sub(r"^(p|q)_(?:rs_(?:r_)?)?", r"\1", word) for word in words]
        names = [_NAMES.get(name, name) for name in names]
        if sorted(names) == sorted(TUM_COLUMNS):
            return names
    return []


def read_euroc(path: str | Path) -> PoseFile:
    rows = [row for row in rows_of(lines_of(path)) if _is_number(row[0])]
    cells = table(rows, (8, 17))
    return _from_centres(cells[:, 0] / 1e9, cells[:, 1:4], cells[:, [5, 6, 7, 4]])


def _from_centres(times: np.ndarray, centres: np.ndarray, quaternions: np.ndarray) -> PoseFile:
    c2w = np.tile(np.eye(4), (len(times), 1, 1))
    c2w[:, :3, :3], c2w[:, :3, 3] = _rotations(quaternions), centres
    return PoseFile(invert(c2w[_in_time_order(times)]))


def read_matrices(path: str | Path) -> np.ndarray:
    """Read [T, 4, 4] from rows of 12 or 16 numbers."""
    cells = table(rows_of(lines_of(path)), (12, 16))
    return squared(cells.reshape(len(cells), -1, 4))


def read_colmap(path: str | Path) -> PoseFile:
    cells, names = _binary_images(bytes_of(path)) if looks_like(path, ".bin") else _text_images(path)
    order = text.in_natural_order(names)
    w2c = np.tile(np.eye(4), (len(cells), 1, 1))
    w2c[:, :3, :3], w2c[:, :3, 3] = _rotations(cells[:, [2, 3, 4, 1]]), cells[:, 5:8]
    return PoseFile(w2c[order])


def _text_images(path: str | Path) -> tuple[np.ndarray, list[str]]:
    """Read (id qw qx qy qz tx ty tz camera [T, 9], names) from an images.txt."""
    lines = [line for line in lines_of(path) if not line.startswith("#")]
    while lines and not lines[-1]:
        lines.pop()
    # The second line of an image lists its points; it is empty if there are none.
    images = [line.split(maxsplit=9) for line in lines[::2]]
    if any(len(image) != 10 for image in images):
        number = next(index for index, image in enumerate(images, 1) if len(image) != 10)
        raise ValueError(f"image {number} is not `id qw qx qy qz tx ty tz camera name` with a line of points after it")
    return table([image[:9] for image in images], (9,)), [image[9] for image in images]


def _binary_images(data: bytes) -> tuple[np.ndarray, list[str]]:
    """Parse an images.bin (little-endian, 24 bytes per point) to the same result as `_text_images`."""
    cells, names, place = [], [], 8
    try:
        (count,) = struct.unpack_from("<Q", data)
        for _ in range(min(count, len(data))):
            cells.append(struct.unpack_from("<I7dI", data, place))
            end = data.index(b"\0", place + 64)
            names.append(data[place + 64 : end].decode())
            place = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]
    except struct.error:
        raise ValueError("it is damaged or cut short, or not an images.bin of COLMAP") from None
    if place != len(data) or len(cells) != count or not cells:
        raise ValueError("it is damaged or cut short, or not an images.bin of COLMAP with a pose")
    return np.array(cells, np.float64), names
