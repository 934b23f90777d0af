"""Poses in JSON and in arrays of NumPy.

| format | poses | axes, unit | intrinsics |
|---|---|---|---|
| `json` | our camera.json: `axes` "opencv", `K`, `w2c`, `size` | OpenCV w2c | px |
| `recammaster` | JSON: frameN → camNN → `[r r r 0] … [tx ty tz 1]`, row vectors | Unreal c2w, left-handed, cm | none |
| `nerfstudio` | transforms.json (of Blender's NeRF scenes too) or the viewer's camera_path.json | OpenGL c2w | px |
| `ex4d` | npz: `extrinsics` float32 [T, 4, 4], `intrinsics` [3, 3] | **OpenGL** w2c (x right, y up, z back) | px |
| `llff` | npy: poses_bounds [T, 17] | c2w (x down, y right, z back) | px |
| `da3`, `vggt` | npz of Depth Anything 3 (`extrinsics`), of VGGT (`extrinsic`): [T, 3, 4] | OpenCV w2c | none |
| `pi3`, `vipe` | npz of Pi3X (`camera_poses`), ViPE (`pose/NAME.npz`: `data`, `inds`): [T, 4, 4] | OpenCV c2w | none |
| `w2c`, `c2w` | npy [T, 4, 4] or [T, 3, 4]; npz with that key; text of 12 or 16 columns | OpenCV | none |
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from ex4d import storage, text
from ex4d.errors import ConfigError
from ex4d.geometry.pose_file import (
    MAX_BYTES,
    OPENGL,
    PoseFile,
    bytes_of,
    check_poses,
    looks_like,
    numbers,
    squared,
    tree_of,
    world_to_camera,
)
from ex4d.geometry.pose_tables import read_matrices

# Unreal: x forward, y right, z up. OpenCV: x right, y down, z forward. Determinant -1: the hand changes.
UNREAL = np.array([[0.0, 1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
LLFF = np.array([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])  # x down, y right, z back
# The arrays of an npz that are read.
KEYS = {
    "axes",
    "w2c",
    "c2w",
    "cam_w2c",
    "cam_c2w",
    "extrinsics",
    "intrinsics",
    "extrinsic",
    "camera_poses",
    "data",
    "inds",
}
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def read_json(path: str | Path) -> PoseFile:
    return of_json(bytes_of(path))


def of_json(data: bytes) -> PoseFile:
    """Return what the bytes of a camera.json hold. Raises ValueError, or LookupError where a key is missing."""
    tree = tree_of(data)
    check_axes(tree)
    if "w2c" not in tree:
        raise ValueError(f"has no 'w2c', but {', '.join(sorted(tree)[:8])}")
    w2c = numbers(tree["w2c"], "w2c")
    check_poses(w2c)
    K = None if tree.get("K") is None else numbers(tree["K"], "K")
    if K is not None and K.shape not in ((3, 3), (len(w2c), 3, 3)):
        raise ValueError(f"K has the shape {list(K.shape)}, not [3, 3] or [{len(w2c)}, 3, 3]")
    size = tree.get("size")
    if size is not None and not (
        isinstance(size, list) and [type(side) for side in size] == [int, int] and min(size) > 0
    ):
        raise ValueError(f"size {size!r} is not [H, W]")
    K = None if K is None else np.broadcast_to(K, (len(w2c), 3, 3))
    return PoseFile(w2c, K, None, None if size is None else (size[0], size[1]))


def check_axes(tree: dict[str, Any]) -> None:
    """Raise ValueError unless the file says that its axes are OpenCV's."""
    if str(tree.get("axes")).lower() != "opencv":
        raise ValueError(f"says the axes {tree.get('axes')!r}; a file of ours says opencv")


def write_json(poses: PoseFile) -> bytes:
    K = poses.K if poses.K is None or poses.K.ndim == 2 or (poses.K[0] != poses.K).any() else poses.K[0]
    tree = {
        "axes": "opencv",
        "size": None if poses.size is None else list(poses.size),
        "K": None if K is None else K.tolist(),
        "w2c": poses.w2c.tolist(),
    }
    return json.dumps(tree, indent=1).encode()


def read_recammaster(path: str | Path, camera: str) -> PoseFile:
    tree = tree_of(bytes_of(path))
    names = [name for name in tree if re.fullmatch(r"frame\d+", name)]
    if len(names) != len(tree) or {int(name[5:]) for name in names} != set(range(len(names))):
        raise ValueError("its frames must be frame0, frame1, … without a gap")
    frames = [tree[name] for name in sorted(names, key=lambda name: int(name[5:]))]
    if not all(isinstance(cameras, dict) for cameras in frames):
        raise ValueError("a frame has no cameras")
    if camera not in frames[0]:
        raise ConfigError("camera", camera, f"{Path(str(path)).name} has {', '.join(map(str, frames[0]))}")
    rows = []
    for index, cameras in enumerate(frames):
        text = str(cameras.get(camera))
        numbers = re.findall(NUMBER, text)
        if len(numbers) != 16 or re.sub(NUMBER, "", text).strip("[] \n\t").replace("[", "").replace("]", "").strip():
            raise ValueError(f"frame{index} has no 16 numbers for {camera}")
        rows.append(numbers)
    c2w = np.array(rows, np.float64).reshape(-1, 4, 4).transpose(0, 2, 1).copy()
    c2w[:, :3, 3] /= 100
    return PoseFile(world_to_camera(UNREAL @ c2w @ np.linalg.inv(UNREAL)))


def write_recammaster(poses: PoseFile) -> bytes:
    c2w = np.linalg.inv(UNREAL) @ np.linalg.inv(poses.w2c) @ UNREAL
    c2w[:, :3, 3] *= 100
    tree = {}
    for index, matrix in enumerate(c2w):
        rows = [" ".join(f"{number:.9g}" for number in row) for row in matrix.T]
        tree[f"frame{index}"] = {"cam01": " ".join(f"[{row}]" for row in rows) + " "}
    return json.dumps(tree, indent=1).encode()


def read_nerfstudio(path: str | Path) -> PoseFile:
    tree = tree_of(bytes_of(path))
    if "camera_path" in tree:
        return _camera_path(tree)
    frames = _objects(tree.get("frames"), "frames", "transform_matrix")
    names = [str(frame.get("file_path", "")) for frame in frames]
    if len(set(names)) == len(names):  # reconstructions list pictures in the order of their registration
        frames = [frames[index] for index in text.in_natural_order(names)]
    c2w = squared(numbers([frame["transform_matrix"] for frame in frames], "transform_matrix"))
    return PoseFile(world_to_camera(c2w @ OPENGL), *_lens(tree, frames))


def _objects(value: Any, name: str, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) and key in one for one in value):
        raise ValueError(f"{name!r} must be a list of objects that each have {key!r}")
    return value


def _lens(tree: dict[str, Any], frames: list[dict[str, Any]]) -> tuple[np.ndarray | None, None, tuple[int, int] | None]:
    """Return (K, times, size) of a transforms.json: per frame where given, else of the whole file."""
    lens = [{**tree, **frame} for frame in frames]
    if not all({"fl_x", "cx", "cy"} <= set(one) for one in lens):
        return None, None, None
    rows = [[one["fl_x"], one.get("fl_y", one["fl_x"]), one["cx"], one["cy"]] for one in lens]
    K = np.tile(np.eye(3), (len(rows), 1, 1))
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2] = numbers(rows, "fl_x").T
    sides = tree.get("h"), tree.get("w")
    return K, None, (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None


def _camera_path(tree: dict[str, Any]) -> PoseFile:
    cameras = _objects(tree["camera_path"], "camera_path", "camera_to_world")
    flat = numbers([camera["camera_to_world"] for camera in cameras], "camera_to_world")
    if flat.ndim == 2 and flat.shape[1] == 16:
        flat = flat.reshape(-1, 4, 4)
    w2c = world_to_camera(flat @ OPENGL)
    size = (int(tree.get("render_height", 0)), int(tree.get("render_width", 0)))
    if not all("fov" in camera for camera in cameras) or min(size) < 1:
        return PoseFile(w2c)
    fov = numbers([camera["fov"] for camera in cameras], "fov")
    if not ((fov > 0) & (fov < 180)).all():
        raise ValueError("a field of view is not between 0 and 180 degrees")
    focal = 0.5 * size[0] / np.tan(fov * math.pi / 360)
    K = np.tile(np.array([[1.0, 0, size[1] / 2], [0, 1, size[0] / 2], [0, 0, 1]]), (len(fov), 1, 1))
    K[:, 0, 0] = K[:, 1, 1] = focal
    return PoseFile(w2c, K, None, size)


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


def write_ex4d(poses: PoseFile) -> bytes:
    if poses.K is None:
        raise ConfigError("K", None, "ex4d holds intrinsics: give K")
    K = poses.K if poses.K.ndim == 2 else poses.K[0]
    buffer = io.BytesIO()
    np.savez(buffer, extrinsics=(OPENGL @ poses.w2c).astype(np.float32), intrinsics=K)
    return buffer.getvalue()


def arrays_of(path: str | Path) -> dict[str, np.ndarray]:
    """Return the numeric arrays of an npz, or {"": array} of an npy; others that hold no poses are empty.

    Raises ValueError on pickles, text and arrays of more than MAX_BYTES.
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
    """Return the array of an npy stream whose header is checked first."""
    if np.lib.format.read_magic(file) != (1, 0):  # numpy reads the header of a later version whatever its length
        raise ValueError("it is no npy of version 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    num_bytes = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or num_bytes > MAX_BYTES:
        raise ValueError(f"it holds {dtype} {list(shape)}: pickled objects, or more than {MAX_BYTES} bytes")
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise ValueError(f"it is cut short: {dtype} {list(shape)} needs {num_bytes} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")


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
    return PoseFile(w2c, K, None, (int(height[0]), int(width[0])))


def read_w2c(path: str | Path) -> PoseFile:
    return PoseFile(_matrices(path, "w2c"))


def read_c2w(path: str | Path) -> PoseFile:
    return PoseFile(world_to_camera(_matrices(path, "c2w")))


def read_da3(path: str | Path) -> PoseFile:
    return PoseFile(_named(path, "extrinsics"))


def read_vggt(path: str | Path) -> PoseFile:
    return PoseFile(_named(path, "extrinsic"))


def read_pi3(path: str | Path) -> PoseFile:
    return PoseFile(world_to_camera(_named(path, "camera_poses")))


def _named(path: str | Path, key: str) -> np.ndarray:
    """Return the poses [T, 4, 4] under one key of an npz."""
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


def _matrices(path: str | Path, key: str) -> np.ndarray:
    """Return OpenCV matrices [T, 4, 4] of an npy, of a key of an npz, or of a text table."""
    if not looks_like(path, ".npy", ".npz"):
        return read_matrices(path)
    arrays = arrays_of(path)
    matrices = next((arrays[name] for name in (key, f"cam_{key}", "") if name in arrays), None)
    if matrices is None:
        raise ValueError(f"has the keys {', '.join(sorted(arrays))}, but not {key}")
    matrices = matrices.astype(np.float64)
    return squared(matrices) if matrices.ndim == 3 and matrices.shape[1:] == (3, 4) else matrices


def contents(path: str | Path) -> tuple[set[str], tuple[int, ...]]:
    """Return (names of an npz's arrays, shape of an npy). The name "axes=opencv" is an array `axes` of that value."""
    arrays = arrays_of(path)
    is_opencv = str(arrays.get("axes", "")).lower() == "opencv"
    return set(arrays) - {""} | ({"axes=opencv"} if is_opencv else set()), arrays.get("", np.empty(0)).shape
