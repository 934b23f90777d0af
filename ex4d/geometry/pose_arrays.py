"""Read camera poses from NumPy files, and from text tables of matrices.

| format | poses | axes, unit | intrinsics |
|---|---|---|---|
| `ex4d` | npz: `extrinsics` float32 [T, 4, 4], `intrinsics` [3, 3] | **OpenGL** w2c (x right, y up, z back) | px |
| `llff` | npy: poses_bounds [T, 17] | c2w (x down, y right, z back) | px |
| `da3`, `vggt` | npz of Depth Anything 3 (`extrinsics`), of VGGT (`extrinsic`): [T, 3, 4] | OpenCV w2c | none |
| `pi3`, `vipe` | npz of Pi3X (`camera_poses`), ViPE (`pose/NAME.npz`: `data`, `inds`): [T, 4, 4] | OpenCV c2w | none |
| `w2c`, `c2w` | npy [T, 4, 4] or [T, 3, 4]; npz with that key; text of 12 or 16 columns | OpenCV | none |
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from ex4d import npy, storage
from ex4d.geometry.pose_file import MAX_BYTES, OPENGL, PoseFile, check_poses, looks_like, squared, world_to_camera
from ex4d.geometry.pose_tables import read_matrices

LLFF = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])  # x down, y right, z back
# The arrays that are read from an npz.
KEYS = {
    *("axes", "w2c", "c2w", "cam_w2c", "cam_c2w", "extrinsics", "intrinsics"),
    *("extrinsic", "camera_poses", "data", "inds"),
}


def read_ex4d(path: str | Path) -> PoseFile:
    arrays = arrays_of(path)
    if "extrinsics" not in arrays or "intrinsics" not in arrays:
        raise ValueError(
            f"has the keys {', '.join(sorted(arrays))}; expected extrinsics and intrinsics, or w2c, or c2w"
        )
    extrinsics = arrays["extrinsics"].astype(np.float64)
    check_poses(OPENGL @ extrinsics if extrinsics.ndim == 3 and extrinsics.shape[1:] == (4, 4) else extrinsics)
    intrinsics = arrays["intrinsics"].astype(np.float64)
    if intrinsics.shape not in ((3, 3), (len(extrinsics), 3, 3)):
        raise ValueError(f"intrinsics has the shape {list(intrinsics.shape)}, not [3, 3]")
    return PoseFile(OPENGL @ extrinsics, np.broadcast_to(intrinsics, (len(extrinsics), 3, 3)))


def arrays_of(path: str | Path) -> dict[str, np.ndarray]:
    """Read {name: array} from an npz, or {"": array} from an npy; arrays whose name is not in KEYS are left empty.

    Raises ValueError for pickles, text (except `axes`) and arrays of more than MAX_BYTES.
    """
    with storage.open_read(path) as file:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                arrays = dict.fromkeys((name.removesuffix(".npy") for name in archive.namelist()), np.empty(0))
                for key in KEYS & arrays.keys():
                    with archive.open(f"{key}.npy") as member:
                        arrays[key] = _array(member)
        else:
            file.seek(0)
            arrays = {"": _array(file)}
    if odd := [key for key, array in arrays.items() if key != "axes" and array.dtype.kind not in "iuf"]:
        raise ValueError(f"{odd[0] or 'the array'} is {arrays[odd[0]].dtype}, not an array of numbers")
    return arrays


def _array(file: IO[bytes]) -> np.ndarray:
    """Read the array of an npy stream after checking its header."""
    header = npy.header(file)
    if header.num_bytes > MAX_BYTES:
        raise ValueError(f"it holds {header}: more than {MAX_BYTES} bytes")
    return npy.numbers(file, header)


def read_llff(path: str | Path) -> PoseFile:
    array = arrays_of(path).get("", np.empty(0)).astype(np.float64)
    if array.ndim != 2 or array.shape[1] != 17:
        raise ValueError(f"has the shape {list(array.shape)}, not [T, 17] of poses_bounds")
    bounds = array[:, :15].reshape(-1, 3, 5)
    w2c = world_to_camera(squared(bounds[:, :, :4]) @ LLFF)
    (height, width, focal) = bounds[:, :, 4].T
    K = np.tile(np.eye(3), (len(array), 1, 1))
    K[:, 0, 0] = K[:, 1, 1] = focal
    K[:, 0, 2], K[:, 1, 2] = width / 2, height / 2
    return PoseFile(w2c, K, (int(height[0]), int(width[0])))


def named(path: str | Path, key: str) -> np.ndarray:
    """Read the poses [T, 4, 4] under one key of an npz."""
    arrays = arrays_of(path)
    if key not in arrays or arrays[key].ndim != 3 or arrays[key].shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"has no {key} [T, 3, 4]; its keys are {', '.join(sorted(arrays)) or 'nothing'}")
    return squared(arrays[key].astype(np.float64))


def read_vipe(path: str | Path) -> PoseFile:
    """Read `pose/NAME.npz`, whose frames are numbered by `inds`."""
    arrays = arrays_of(path)
    if "data" not in arrays or "inds" not in arrays or arrays["inds"].shape != arrays["data"].shape[:1]:
        raise ValueError("has no data and inds of the same length")
    if (np.diff(arrays["inds"].astype(np.int64)) != 1).any():
        raise ValueError("inds has a gap: every frame needs a pose")
    return PoseFile(world_to_camera(arrays["data"].astype(np.float64)))


def matrices(path: str | Path, key: str) -> np.ndarray:
    """Read OpenCV matrices [T, 4, 4] from an npy, from a key of an npz, or from a text table."""
    if not looks_like(path, ".npy", ".npz"):
        return read_matrices(path)
    arrays = arrays_of(path)
    matrices = next((arrays[name] for name in (key, f"cam_{key}", "") if name in arrays), None)
    if matrices is None:
        raise ValueError(f"has the keys {', '.join(sorted(arrays))}, but not {key}")
    matrices = matrices.astype(np.float64)
    return squared(matrices) if matrices.ndim == 3 and matrices.shape[1:] == (3, 4) else matrices


def contents(path: str | Path) -> tuple[set[str], tuple[int, ...]]:
    """Return (names of an npz's arrays, shape of an npy). "axes=opencv" is added if `axes` has the value opencv."""
    arrays = arrays_of(path)
    is_opencv = str(arrays.get("axes", "")).lower() == "opencv"
    return set(arrays) - {""} | ({"axes=opencv"} if is_opencv else set()), arrays.get("", np.empty(0)).shape
