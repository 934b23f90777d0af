"""Read camera poses from JSON, and write our own format.

| format | poses | axes, unit | intrinsics |
|---|---|---|---|
| `json` | our camera.json: `axes` "opencv", `K`, `w2c`, `size` | OpenCV w2c | px |
| `recammaster` | JSON: frameN → camNN → `[r r r 0] … [tx ty tz 1]`, row vectors | Unreal c2w, left-handed, cm | none |
| `nerfstudio` | transforms.json (also Blender's NeRF scenes) or the viewer's camera_path.json | OpenGL c2w | px |
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import text
from ex4d.errors import ConfigError
from ex4d.geometry.pose_file import (
    OPENGL,
    PoseFile,
    bytes_of,
    check_poses,
    numbers,
    squared,
    tree_of,
    world_to_camera,
)

# Unreal: x forward, y right, z up. OpenCV: x right, y down, z forward. Determinant -1: handedness changes.
UNREAL = np.array([[0.0, 1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


def of_json(data: bytes) -> PoseFile:
    """Parse the bytes of a camera.json. Raises ValueError if they are not valid."""
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
    return PoseFile(w2c, K, None if size is None else (size[0], size[1]))


def check_axes(tree: dict[str, Any]) -> None:
    """Raise ValueError unless the file says that its axes are OpenCV's."""
    if str(tree.get("axes")).lower() != "opencv":
        raise ValueError(f"has the axes {tree.get('axes')!r}; must be opencv")


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


def _lens(tree: dict[str, Any], frames: list[dict[str, Any]]) -> tuple[np.ndarray | None, tuple[int, int] | None]:
    """Return (K, size) of a transforms.json; intrinsics of a frame override those of the file."""
    lens = [{**tree, **frame} for frame in frames]
    if not all({"fl_x", "cx", "cy"} <= set(one) for one in lens):
        return None, None
    rows = [[one["fl_x"], one.get("fl_y", one["fl_x"]), one["cx"], one["cy"]] for one in lens]
    K = np.tile(np.eye(3), (len(rows), 1, 1))
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2] = numbers(rows, "fl_x").T
    sides = tree.get("h"), tree.get("w")
    return K, (int(sides[0]), int(sides[1])) if sides[0] and sides[1] else None


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
    return PoseFile(w2c, K, size)
