"""Two procedural scenes from two cameras, pairs with different lenses, and helpers that read and change the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ex4d import synthetic, video
from ex4d.data import manifest
from ex4d.data.sample import Sample, decode
from ex4d.data.tar import read_sample
from ex4d.geometry.camera import Camera, intrinsics
from ex4d.geometry.masks import MaskConfig
from ex4d.geometry.pose_file import PoseFile
from ex4d.geometry.pose_trees import write_json

WORLD = synthetic.SyntheticConfig(num_videos=2, num_frames=11, size=(64, 96), second_camera_deg=40.0, seed=3)
FEW = {"members": ("source",), "num_frames": 5, "size": (64, 64), "clips_per_shot": 2, "max_bad_fraction": 1.0}
FEW |= {"masks": MaskConfig(num_masks=1, erosion_px=(1, 1))}


def samples(folder: str) -> list[Sample]:
    rows = manifest.read_table(folder, manifest.MANIFEST).to_pylist()
    blobs = [(Path(folder) / row["shard"]).read_bytes()[row["offset"] :][: row["length"]] for row in rows]
    return [decode(read_sample(blob, row["key"])) for blob, row in zip(blobs, rows, strict=True)]


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def write(path: str, **values: object) -> None:
    rewrite(Path(path), lambda tree: tree.update(values))


def film(folder: Path, name: str, own_fov: float, other_fov: float, bars: int, stored: int = 1) -> list[Camera]:
    """Write a pair filmed through two lenses, bars of so many px above and below the other picture; return the cameras.

    Args:
        stored: the clip's camera.json speaks of pictures so many times smaller.
    """
    scene, cameras = synthetic.clip_scene(WORLD, 0)
    radius = 2.0
    others = [Camera(intrinsics(WORLD.size, other_fov), camera.w2c, WORLD.size) for camera in cameras]
    swung = synthetic.second_cameras(WORLD, 0, cameras, radius)
    own = [Camera(intrinsics(WORLD.size, own_fov), camera.w2c, WORLD.size) for camera in swung]
    for which, lens in ((f"{name}.mp4", own), (f"{name}.source.mp4", others)):
        frames, z_depth = synthetic.render_clip(scene, lens, WORLD.fps, WORLD.supersample)
        if lens is others and bars:
            frames[:, :bars] = frames[:, -bars:] = 0
        K = lens[0].K / [[stored], [stored], [1]] if lens is own else lens[0].K
        size = tuple(side // stored for side in WORLD.size) if lens is own else WORLD.size
        file = PoseFile(np.stack([camera.w2c for camera in lens]), np.stack([K] * 11), size=size)
        (folder / which).with_suffix(".camera.json").write_bytes(write_json(file))
        np.savez(folder / which.replace(".mp4", ".depth.npz"), z_depth=z_depth)
        (folder / which).write_bytes(video.encode(frames, WORLD.fps))
    return own
