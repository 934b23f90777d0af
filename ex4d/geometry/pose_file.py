"""The contents of a file of camera poses, and the checks that all formats share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import storage
from ex4d.geometry.camera import is_rigid

OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
# Text formats round their numbers; a quaternion of three decimals has a length within 2e-3 of 1.
ROTATION_TOLERANCE, QUATERNION_TOLERANCE = 1e-3, 5e-3
MAX_FOCAL_SHARE = 100.0  # focal length / side of the picture; no lens has more
MAX_BYTES = 64 * 2**20  # of a text file, a JSON file or an array of poses: 160,000 poses in our own JSON
MAX_LENGTH = 1e12  # largest translation, in any unit; products of larger ones overflow


@dataclass(frozen=True)
class PoseFile:
    """The contents of a file of poses.

    w2c: float64 [T, 4, 4], OpenCV, in the file's own world and unit (metres for recammaster).
    K: float64 [T, 3, 3], px with pixel centres at +0.5; for re10k, whose `size` is None, in fractions of the width and
        the height; None if the format or the file has no intrinsics.
    size: (H, W) of the pictures that K belongs to, or None.
    """

    w2c: np.ndarray
    K: np.ndarray | None = None
    size: tuple[int, int] | None = None


def bytes_of(path: str | Path) -> bytes:
    """Read the bytes of a file. Raises ValueError if it has more than MAX_BYTES, OSError if it cannot be read."""
    data = storage.read_bytes(path, 0, MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return data


def checked(poses: PoseFile) -> PoseFile:
    """Return `poses`. Raises ValueError unless each is a rigid motion and each K is valid."""
    check_poses(poses.w2c)
    if poses.K is not None:
        _check_intrinsics(poses.K)
    return poses


def check_poses(matrices: np.ndarray) -> None:
    """Raise ValueError, which names the first invalid pose, unless matrices [T, 4, 4] are rigid motions."""
    if matrices.ndim != 3 or matrices.shape[1:] != (4, 4) or len(matrices) == 0:
        raise ValueError(f"the poses have the shape {list(matrices.shape)}, not [T, 4, 4]")
    for index, pose in enumerate(matrices):
        if not np.isfinite(pose).all() or np.abs(pose).max() > MAX_LENGTH:
            raise ValueError(f"pose {index} has a value that is not finite, or above {MAX_LENGTH:g}")
        if not is_rigid(pose, ROTATION_TOLERANCE):
            raise ValueError(f"pose {index} is not a rigid motion: {_what_is_wrong(pose)}")


def _what_is_wrong(pose: np.ndarray) -> str:
    rotation = pose[:3, :3]
    if np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-3 * ROTATION_TOLERANCE:
        return "its last row is not 0 0 0 1 (is the matrix transposed?)"
    if np.linalg.det(rotation) < 0:
        return "its rotation mirrors (determinant -1): convert its axes first"
    scale = np.cbrt(np.linalg.det(rotation))
    if scale > 0 and is_rigid(np.block([[rotation / scale, pose[:3, 3:]], [pose[3:]]]), ROTATION_TOLERANCE):
        return f"its rotation is scaled by {scale:.4g}"
    return "its rotation is not orthonormal"


def _check_intrinsics(K: np.ndarray) -> None:
    if K.ndim != 3 or K.shape[1:] != (3, 3):
        raise ValueError(f"K has the shape {list(K.shape)}, not [3, 3] or [T, 3, 3]")
    if not np.isfinite(K).all() or (K[:, [0, 1], [0, 1]] <= 0).any():
        raise ValueError("K has a value that is not finite, or a focal length that is not above 0")
    others = K - np.eye(3) * K
    others[:, :2, 2] = 0
    if np.abs(others).max() > 1e-6 or np.abs(K[:, 2, 2] - 1).max() > 1e-6:
        raise ValueError("K is not [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]")


def world_to_camera(c2w: np.ndarray) -> np.ndarray:
    """Invert c2w [T, 4, 4] to w2c. Raises ValueError as `check_poses` does, unless they are rigid motions."""
    check_poses(c2w)
    return np.linalg.inv(c2w)


def squared(matrices: np.ndarray) -> np.ndarray:
    """Append the last row to matrices [T, 3, 4]; return [T, 4, 4] unchanged."""
    if matrices.shape[1:] == (4, 4):
        return matrices
    full = np.tile(np.eye(4), (len(matrices), 1, 1))
    full[:, :3] = matrices
    return full


def numbers(value: Any, what: str) -> np.ndarray:
    """Convert nested lists of plain numbers to float64. Raises ValueError for ragged lists, text or booleans."""
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(None)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{what} is not an array of numbers")
    return array.astype(np.float64)


def tree_of(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError if the data is anything else, RecursionError for deep nesting."""
    tree = json.loads(data)
    if not isinstance(tree, dict):
        raise ValueError("the file holds no JSON object")
    return tree


def looks_like(path: str | Path, *suffixes: str) -> bool:
    """Return whether a path ends with one of the suffixes, in any case."""
    return str(path).lower().endswith(suffixes)
