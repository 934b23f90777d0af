"""Writers for pose formats that the project itself only reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from ex4d import storage
from ex4d.geometry.pose_file import OPENGL, PoseFile
from ex4d.geometry.pose_trees import UNREAL, write_json


def write(
    path: str | Path, poses: PoseFile, format: str, times: np.ndarray | None = None, source: str = "unknown"
) -> None:
    """Write poses in a format of WRITERS. times: [T], default 0, 1, …; source: first line of a re10k file."""
    times = np.arange(len(poses.w2c), dtype=np.float64) if times is None else times
    storage.write_bytes(path, WRITERS[format](poses, times, source))


def _ex4d(poses: PoseFile, times: np.ndarray, source: str) -> bytes:
    K = poses.K if poses.K.ndim == 2 else poses.K[0]
    buffer = io.BytesIO()
    np.savez(buffer, extrinsics=(OPENGL @ poses.w2c).astype(np.float32), intrinsics=K)
    return buffer.getvalue()


def _re10k(poses: PoseFile, times: np.ndarray, source: str) -> bytes:
    K = np.broadcast_to(poses.K, (len(poses.w2c), 3, 3))
    height, width = poses.size or (1, 1)
    lines = [source]
    for time, k, w2c in zip(times, K, poses.w2c, strict=True):
        numbers = [k[0, 0] / width, k[1, 1] / height, k[0, 2] / width, k[1, 2] / height, 0, 0, *w2c[:3].ravel()]
        lines.append(" ".join([f"{time:.0f}", *(f"{number:.9f}" for number in numbers)]))
    return ("\n".join(lines) + "\n").encode()


def _tum(poses: PoseFile, times: np.ndarray, source: str) -> bytes:
    c2w = np.linalg.inv(poses.w2c)
    rows = np.concatenate([c2w[:, :3, 3], Rotation.from_matrix(c2w[:, :3, :3]).as_quat()], axis=1)
    lines = [
        " ".join([f"{time:.6f}", *(f"{number:.12g}" for number in row)]) for time, row in zip(times, rows, strict=True)
    ]
    return ("\n".join(lines) + "\n").encode()


def _recammaster(poses: PoseFile, times: np.ndarray, source: str) -> bytes:
    c2w = np.linalg.inv(UNREAL) @ np.linalg.inv(poses.w2c) @ UNREAL
    c2w[:, :3, 3] *= 100
    tree = {}
    for index, matrix in enumerate(c2w):
        rows = [" ".join(f"{number:.9g}" for number in row) for row in matrix.T]
        tree[f"frame{index}"] = {"cam01": " ".join(f"[{row}]" for row in rows) + " "}
    return json.dumps(tree, indent=1).encode()


WRITERS = {
    "ex4d": _ex4d,
    "re10k": _re10k,
    "tum": _tum,
    "recammaster": _recammaster,
    "json": lambda poses, times, source: write_json(poses),
}
