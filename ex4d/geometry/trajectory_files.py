"""Files of camera poses, in and out. Whatever the file's convention, what leaves `read` is OpenCV w2c.

| format | poses | axes, unit | intrinsics |
|---|---|---|---|
| `re10k` | RealEstate10K text: URL line, then `time fx fy cx cy k1 k2` and 3×4 | OpenCV w2c | fractions of W, H |
| `ex4d` | npz: `extrinsics` float32 [T, 4, 4], `intrinsics` [3, 3] | **OpenGL** w2c (x right, y up, z back) | px |
| `tum` | text: `time tx ty tz qx qy qz qw` | OpenCV c2w | none |
| `recammaster` | JSON: frameN → camNN → `[r r r 0] … [tx ty tz 1]`, row vectors | Unreal c2w, left-handed, cm | none |
| `json` | our camera.json: `axes` "opencv", `K`, `w2c`, `size` | OpenCV w2c | px |

`K` of our JSON is [3, 3], or [T, 3, 3] along a zoom. A JSON file with `key_poses` instead of `w2c` holds poses that a
spline goes through (`read_key_poses`).
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from ex4d import storage
from ex4d.errors import ConfigError, ContractError
from ex4d.geometry.camera import check_rigid, is_rigid, look_at

OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
FLIP_Y = np.diag([1.0, -1.0, 1.0, 1.0])
# Unreal: x forward, y right, z up. OpenCV: x right, y down, z forward. Determinant -1: the hand changes.
UNREAL = np.array([[0.0, 1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
# What the parsers below raise on files that are damaged or of another kind; RuntimeError: JSON nested without end.
UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError),
    *(OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error),
)
SUFFIXES = {".npz": "ex4d", ".json": "json"}


@dataclass(frozen=True)
class PoseFile:
    """What a file of poses holds.

    w2c: float64 [T, 4, 4], OpenCV, in the file's own world and unit (metres for recammaster).
    K: float64 [T, 3, 3], px with pixel centres at +0.5; or, where `size` is None and the format is re10k, in fractions
        of the width and the height; None where the format has none.
    times: float64 [T] as written (re10k: microseconds, tum: seconds), or None.
    size: (H, W) of the pictures that K speaks of, or None.
    source: re10k's first line, a URL; "" elsewhere.
    """

    w2c: np.ndarray
    K: np.ndarray | None = None
    times: np.ndarray | None = None
    size: tuple[int, int] | None = None
    source: str = ""


def read(path: str | Path, format: str | None = None, camera: str = "cam01", flip_y: bool = False) -> PoseFile:
    """Return the poses of a file as OpenCV w2c.

    Args:
        format: a key of READERS; None guesses by suffix and content.
        camera: which of a recammaster file's cameras.
        flip_y: mirror y of cameras and world (ICL-NUIM: its K has fy < 0).

    Raises:
        ConfigError: unknown format or camera, or a missing file.
        ContractError: the content is not of that format, or no rigid motion.
    """
    if not storage.exists(path):
        raise ConfigError("trajectory", str(path), "no such file of poses")
    format = format or _guess(path)
    if format not in READERS:
        raise ConfigError("format", format, f"allowed: {', '.join(READERS)}")
    try:
        poses = _checked(READERS[format](path, camera))
    except UNREADABLE as error:
        raise ContractError(f"{path} is no {format} file of poses: {error}") from error
    if flip_y:
        poses = PoseFile(FLIP_Y @ poses.w2c @ FLIP_Y, poses.K, poses.times, poses.size, poses.source)
    return poses


def parse(data: bytes) -> PoseFile:
    """Return the poses in the bytes of a camera.json. Raises ContractError where they hold none."""
    try:
        return _checked(_of_json(data))
    except UNREADABLE as error:
        raise ContractError(f"is no camera.json: {error}") from error


def _checked(poses: PoseFile) -> PoseFile:
    # 1e-3: text formats round their numbers.
    if not (len(poses.w2c) and np.isfinite(poses.w2c).all() and is_rigid(poses.w2c, 1e-3)):
        raise ValueError("the poses are no rigid motions")
    return poses


def read_key_poses(path: str | Path) -> np.ndarray | None:
    """Return w2c [N, 4, 4] of a JSON file's `key_poses`, or None where it has none.

    Each is a w2c 4×4, or {"eye": [x, y, z], "look_at": [x, y, z]}; OpenCV axes, lengths in multiples of the radius, the
    distance of what is looked at.

    Raises:
        ContractError: what is written there is no list of poses. ConfigError: the file is missing.
    """
    if not storage.exists(path):
        raise ConfigError("trajectory", str(path), "no such file of poses")
    if not str(path).lower().endswith(".json"):
        return None
    try:
        tree = json.loads(storage.read_bytes(path))
        if not isinstance(tree, dict) or "key_poses" not in tree:
            return None
        if tree.get("axes") != "opencv":
            raise ValueError(f"axes {tree.get('axes')!r}; our files say opencv")
        poses = [check_rigid(_key_pose(entry)) for entry in tree["key_poses"]]
        return np.stack(poses)
    except (*UNREADABLE, ConfigError) as error:
        raise ContractError(f"{path} holds no key poses: {error}") from error


def _key_pose(entry: Any) -> np.ndarray:
    if isinstance(entry, dict):
        return look_at(np.array(entry["eye"], np.float64), np.array(entry["look_at"], np.float64))
    return np.array(entry, np.float64)


def write(path: str | Path, poses: PoseFile, format: str) -> None:
    """Write poses in the named format (a key of WRITERS), atomically; ConfigError where it lacks what that holds."""
    if format not in WRITERS:
        raise ConfigError("format", format, f"allowed: {', '.join(WRITERS)}")
    storage.write_bytes(path, WRITERS[format](poses))


def _guess(path: str | Path) -> str:
    suffix = Path(str(path)).suffix.lower()
    if suffix == ".json":
        return "recammaster" if b'"frame0"' in storage.read_bytes(path, 0, 4096) else "json"
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    rows = [line for line in storage.read_bytes(path, 0, 65536).decode("utf-8", "replace").splitlines() if line]
    return "re10k" if len(rows) > 1 and len(rows[1].split()) == 19 else "tum"


def _rows(path: str | Path) -> list[str]:
    lines = storage.read_bytes(path).decode("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _square(matrices: np.ndarray) -> np.ndarray:
    """Return [T, 4, 4] from [T, 3, 4]."""
    full = np.tile(np.eye(4), (len(matrices), 1, 1))
    full[:, :3] = matrices
    return full


def _read_re10k(path: str | Path, camera: str) -> PoseFile:
    lines = _rows(path)
    source, lines = (lines[0], lines[1:]) if len(lines[0].split()) == 1 else ("", lines)
    table = np.array([line.split() for line in lines], np.float64).reshape(-1, 19)
    K = np.tile(np.eye(3), (len(table), 1, 1))
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2] = table[:, 1:5].T
    return PoseFile(_square(table[:, 7:].reshape(-1, 3, 4)), K, table[:, 0], None, source)


def _write_re10k(poses: PoseFile) -> bytes:
    if poses.K is None:
        raise ConfigError("K", None, "re10k holds intrinsics: give K, and the size where K is in px")
    K = np.broadcast_to(poses.K, (len(poses.w2c), 3, 3))
    height, width = poses.size or (1, 1)
    lines = [poses.source or "unknown"]
    for time, k, w2c in zip(_times(poses), K, poses.w2c, strict=True):
        numbers = [k[0, 0] / width, k[1, 1] / height, k[0, 2] / width, k[1, 2] / height, 0, 0, *w2c[:3].ravel()]
        lines.append(" ".join([f"{time:.0f}", *(f"{number:.9f}" for number in numbers)]))
    return ("\n".join(lines) + "\n").encode()


def _read_ex4d(path: str | Path, camera: str) -> PoseFile:
    with storage.open_read(path) as file, np.load(file, allow_pickle=False) as arrays:
        extrinsics = arrays["extrinsics"].astype(np.float64)
        intrinsics = arrays["intrinsics"].astype(np.float64)
    return PoseFile(OPENGL @ extrinsics.reshape(-1, 4, 4), np.broadcast_to(intrinsics, (len(extrinsics), 3, 3)))


def _write_ex4d(poses: PoseFile) -> bytes:
    import io

    if poses.K is None:
        raise ConfigError("K", None, "ex4d holds intrinsics: give K")
    K = poses.K if poses.K.ndim == 2 else poses.K[0]
    buffer = io.BytesIO()
    np.savez(buffer, extrinsics=(OPENGL @ poses.w2c).astype(np.float32), intrinsics=K)
    return buffer.getvalue()


def _read_tum(path: str | Path, camera: str) -> PoseFile:
    table = np.array([line.replace(",", " ").split() for line in _rows(path)], np.float64).reshape(-1, 8)
    c2w = np.tile(np.eye(4), (len(table), 1, 1))
    c2w[:, :3, :3] = Rotation.from_quat(table[:, 4:]).as_matrix()
    c2w[:, :3, 3] = table[:, 1:4]
    return PoseFile(np.linalg.inv(c2w), None, table[:, 0])


def _write_tum(poses: PoseFile) -> bytes:
    c2w = np.linalg.inv(poses.w2c)
    rows = np.concatenate([c2w[:, :3, 3], Rotation.from_matrix(c2w[:, :3, :3]).as_quat()], axis=1)
    lines = [
        " ".join([f"{time:.6f}", *(f"{number:.12g}" for number in row)])
        for time, row in zip(_times(poses), rows, strict=True)
    ]
    return ("\n".join(lines) + "\n").encode()


def _read_recammaster(path: str | Path, camera: str) -> PoseFile:
    tree = json.loads(storage.read_bytes(path))
    frames = sorted((int(name.removeprefix("frame")), cameras) for name, cameras in tree.items())
    if camera not in frames[0][1]:
        raise ConfigError("camera", camera, f"{path} has {', '.join(frames[0][1])}")
    numbers = [re.findall(r"[-+0-9.eE]+", cameras[camera]) for _, cameras in frames]
    rows = np.array(numbers, np.float64).reshape(-1, 4, 4)
    c2w = rows.transpose(0, 2, 1).copy()
    c2w[:, :3, 3] /= 100
    return PoseFile(np.linalg.inv(UNREAL @ c2w @ np.linalg.inv(UNREAL)))


def _write_recammaster(poses: PoseFile) -> bytes:
    c2w = np.linalg.inv(UNREAL) @ np.linalg.inv(poses.w2c) @ UNREAL
    c2w[:, :3, 3] *= 100
    tree = {}
    for index, matrix in enumerate(c2w):
        rows = [" ".join(f"{number:.9g}" for number in row) for row in matrix.T]
        tree[f"frame{index}"] = {"cam01": " ".join(f"[{row}]" for row in rows) + " "}
    return json.dumps(tree, indent=1).encode()


def _read_json(path: str | Path, camera: str) -> PoseFile:
    return _of_json(storage.read_bytes(path))


def _of_json(data: bytes) -> PoseFile:
    tree = json.loads(data)
    if tree["axes"] != "opencv":
        raise ValueError(f"axes {tree['axes']!r}; our files say opencv")
    w2c = np.array(tree["w2c"], np.float64).reshape(-1, 4, 4)
    K = None if tree.get("K") is None else np.broadcast_to(np.array(tree["K"], np.float64), (len(w2c), 3, 3))
    size = tree.get("size")
    if size is not None and not (
        isinstance(size, list) and [type(side) for side in size] == [int, int] and min(size) > 0
    ):
        raise ValueError(f"size {size!r} is not [H, W]")
    return PoseFile(w2c, K, None, None if size is None else (size[0], size[1]))


def _write_json(poses: PoseFile) -> bytes:
    K = poses.K if poses.K is None or poses.K.ndim == 2 or (poses.K[0] != poses.K).any() else poses.K[0]
    tree = {
        "axes": "opencv",
        "size": None if poses.size is None else list(poses.size),
        "K": None if K is None else K.tolist(),
        "w2c": poses.w2c.tolist(),
    }
    return json.dumps(tree, indent=1).encode()


def _times(poses: PoseFile) -> np.ndarray:
    return np.arange(len(poses.w2c), dtype=np.float64) if poses.times is None else poses.times


READERS = {
    "re10k": _read_re10k,
    "ex4d": _read_ex4d,
    "tum": _read_tum,
    "recammaster": _read_recammaster,
    "json": _read_json,
}
WRITERS = {
    "re10k": _write_re10k,
    "ex4d": _write_ex4d,
    "tum": _write_tum,
    "recammaster": _write_recammaster,
    "json": _write_json,
}
