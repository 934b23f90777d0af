"""Read files of camera poses. Whatever the file's convention, `read` returns OpenCV w2c.

Text formats are in `pose_tables` (re10k, tum, kitti, euroc, colmap), JSON formats in `pose_trees` (json, recammaster,
nerfstudio), NumPy formats in `pose_arrays` (ex4d, llff, networks' cameras, w2c, c2w). Each row, matrix, quaternion and
K is checked: an invalid one is rejected with an error that names it, never reshaped.

`K` of our JSON is [3, 3], or [T, 3, 3] along a zoom. A JSON file with `key_poses` instead of `w2c` holds poses that a
spline goes through (`read_key_poses`).
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import storage
from ex4d.errors import ConfigError, ContractError
from ex4d.geometry import pose_arrays, pose_tables, pose_trees
from ex4d.geometry.camera import check_rigid, look_at
from ex4d.geometry.pose_file import PoseFile, bytes_of, checked, looks_like, numbers, world_to_camera

__all__ = ["READERS", "PoseFile", "parse", "read", "read_key_poses"]

FLIP_Y = np.diag([1.0, -1.0, 1.0, 1.0])
# What the parsers raise on files that are damaged or of another format; RuntimeError: JSON nested too deeply.
UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError),
    *(OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, np.linalg.LinAlgError),
)
READERS: dict[str, Callable[[str | Path, str], PoseFile]] = {
    "re10k": lambda path, camera: pose_tables.read_re10k(path),
    "tum": lambda path, camera: pose_tables.read_tum(path),
    "kitti": lambda path, camera: PoseFile(world_to_camera(pose_tables.read_matrices(path))),
    "euroc": lambda path, camera: pose_tables.read_euroc(path),
    "colmap": lambda path, camera: pose_tables.read_colmap(path),
    "json": lambda path, camera: pose_trees.of_json(bytes_of(path)),
    "recammaster": pose_trees.read_recammaster,
    "nerfstudio": lambda path, camera: pose_trees.read_nerfstudio(path),
    "ex4d": lambda path, camera: pose_arrays.read_ex4d(path),
    "llff": lambda path, camera: pose_arrays.read_llff(path),
    "da3": lambda path, camera: PoseFile(pose_arrays.named(path, "extrinsics")),
    "vggt": lambda path, camera: PoseFile(pose_arrays.named(path, "extrinsic")),
    "pi3": lambda path, camera: PoseFile(world_to_camera(pose_arrays.named(path, "camera_poses"))),
    "vipe": lambda path, camera: pose_arrays.read_vipe(path),
    "w2c": lambda path, camera: PoseFile(pose_arrays.matrices(path, "w2c")),
    "c2w": lambda path, camera: PoseFile(world_to_camera(pose_arrays.matrices(path, "c2w"))),
}
COLUMNS = {19: "re10k", 8: "tum", 12: "kitti", 17: "euroc"}
READ = (
    "read are RealEstate10K (19 columns), TUM (8), KITTI (12), EuRoC csv, COLMAP images.txt and images.bin, "
    "nerfstudio and Blender transforms.json, nerfstudio camera_path.json, ReCamMaster json, LLFF poses_bounds.npy, "
    "and our json and npz"
)


def read(path: str | Path, format: str | None = None, camera: str = "cam01", flip_y: bool = False) -> PoseFile:
    """Read the poses of a file as OpenCV w2c.

    Args:
        format: a key of READERS; None guesses it from suffix and content.
        camera: which of a recammaster file's cameras.
        flip_y: mirror y of cameras and world (for ICL-NUIM, whose K has fy < 0).

    Raises:
        ConfigError: unknown format or camera, or a missing file.
        ContractError: the content does not have that format, or a pose is not a rigid motion.
    """
    if not storage.is_file(path):
        raise ConfigError("trajectory", str(path), "no such pose file")
    if format is not None and format not in READERS:
        raise ConfigError("format", format, f"allowed: {', '.join(READERS)}")
    name = Path(str(path)).name
    try:
        format = format or _guess(path)
        poses = checked(READERS[format](path, camera))
    except UNREADABLE as error:
        kind = f"not a {format} pose file" if format else "not a pose file of a supported format"
        raise ContractError(f"{name} is {kind}: {_reason(error)}") from error
    if flip_y:
        poses = PoseFile(FLIP_Y @ poses.w2c @ FLIP_Y, poses.K, poses.size)
    return poses


def _reason(error: BaseException) -> str:
    """Describe what is wrong with the file, in our own words where we have them."""
    if isinstance(error, RuntimeError):
        return "it is nested too deeply"
    if isinstance(error, zipfile.BadZipFile | zlib.error | EOFError):
        return f"it is damaged or cut short ({error})"
    return str(error)


def parse(data: bytes) -> PoseFile:
    """Parse the poses in the bytes of a camera.json. Raises ContractError if they are not one."""
    try:
        return checked(pose_trees.of_json(data))
    except UNREADABLE as error:
        raise ContractError(f"is not a camera.json: {_reason(error)}") from error


def read_key_poses(path: str | Path) -> np.ndarray | None:
    """Read `key_poses` of a JSON file as w2c [N, 4, 4]; None if the file has none.

    Each is a w2c 4×4, or {"eye": [x, y, z], "look_at": [x, y, z]}; OpenCV axes, lengths in multiples of the radius (the
    distance of the point looked at).

    Raises:
        ContractError: `key_poses` is not a list of poses. ConfigError: the file is missing.
    """
    if not storage.exists(path):
        raise ConfigError("trajectory", str(path), "no such pose file")
    if not looks_like(path, ".json"):
        return None
    try:
        tree = json.loads(bytes_of(path))
        if not isinstance(tree, dict) or "key_poses" not in tree:
            return None
        pose_trees.check_axes(tree)
        if not isinstance(tree["key_poses"], list) or not tree["key_poses"]:
            raise ValueError("key_poses is not a list of poses")
        return np.stack([check_rigid(_key_pose(entry)) for entry in tree["key_poses"]])
    except (*UNREADABLE, ConfigError) as error:
        raise ContractError(f"{Path(str(path)).name} holds no key poses: {_reason(error)}") from error


def _key_pose(entry: Any) -> np.ndarray:
    if not isinstance(entry, dict):
        return numbers(entry, "a key pose")
    if missing := {"eye", "look_at"} - set(entry):
        raise ValueError(f"a key pose has no {' and no '.join(sorted(missing))}")
    return look_at(_point(entry["eye"]), _point(entry["look_at"]))


def _point(value: Any) -> np.ndarray:
    point = numbers(value, "a point")
    if point.shape != (3,) or not np.isfinite(point).all():
        raise ValueError("a point is not three finite numbers")
    return point


def _guess(path: str | Path) -> str:
    if looks_like(path, ".json"):
        return _guess_json(path)
    if looks_like(path, ".npy", ".npz"):
        return _guess_arrays(path)
    if looks_like(path, ".bin"):
        return "colmap"
    lines = pose_tables.lines_of(path, 65536)
    rows = pose_tables.rows_of(lines)
    rows = rows[1:] if len(rows) > 1 and len(rows[0]) == 1 else rows
    if not rows:
        raise ValueError(f"holds no rows of numbers; {READ}")
    if len(rows[0]) >= 10 and rows[0][0].isdigit() and any(character.isalpha() for character in rows[0][-1]):
        return "colmap"
    if len(rows[0]) == 16:
        raise ValueError("16 columns may be w2c or c2w: set format=w2c or format=c2w (OpenCV axes)")
    if len(rows[0]) not in COLUMNS:
        raise ValueError(f"its rows have {len(rows[0])} columns; {READ}")
    return COLUMNS[len(rows[0])]


def _guess_json(path: str | Path) -> str:
    tree = json.loads(bytes_of(path))
    if not isinstance(tree, dict):
        raise ValueError(f"the file holds no JSON object; {READ}")
    if "frame0" in tree:
        return "recammaster"
    if "w2c" in tree or "axes" in tree:
        return "json"
    if "frames" in tree or "camera_path" in tree:
        return "nerfstudio"
    raise ValueError(f"its keys are {', '.join(map(str, list(tree)[:8]))}; {READ}")


def _guess_arrays(path: str | Path) -> str:
    keys, shape = pose_arrays.contents(path)
    of_networks = {
        "da3": {"extrinsics", "depth"},
        "vggt": {"extrinsic"},
        "pi3": {"camera_poses"},
        "vipe": {"data", "inds"},
    }
    if network := next((name for name, arrays in of_networks.items() if arrays <= keys), None):
        return network
    if "extrinsics" in keys:
        return "ex4d"
    if "cam_c2w" in keys:  # MegaSaM's, in OpenCV axes
        return "c2w"
    names = keys & {"w2c", "c2w"}
    if len(names) == 1 and "axes=opencv" in keys:
        return names.pop()
    if names:
        way = sorted(names)[0]
        raise ValueError(f"{way} does not state its axes: set format={way} if they are OpenCV's (x right, y down)")
    if keys:
        raise ValueError(f"its keys are {', '.join(sorted(keys)[:8])}; {READ}")
    if len(shape) == 2 and shape[1] == 17:
        return "llff"
    if len(shape) == 3 and shape[1:] in ((4, 4), (3, 4)):
        raise ValueError("an npy may hold w2c or c2w: set format=w2c or format=c2w (OpenCV axes)")
    raise ValueError(f"its shape is {list(shape)}; {READ}")
