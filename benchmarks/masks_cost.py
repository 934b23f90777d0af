"""Measure the CPU seconds of masks at 49 × 512 × 512, and the accuracy of tracks and visibility at that size.

    python benchmarks/masks_cost.py [--against PATH]

`--against`: the root of another checkout of this project, measured in turns with this one. Synthetic clips, truth from
ray casting. Four masks per clip, default kinds, one process, one thread. About five minutes per checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from sight import visible_from

from ex4d.geometry import masks, trajectory
from ex4d.geometry.camera import Camera
from ex4d.geometry.mask_scene import Scene
from ex4d.geometry.masks import KINDS, MaskConfig
from ex4d.geometry.tracks import track
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

ROOT = Path(__file__).resolve().parent.parent
SIZE = (512, 512)
CLIPS = ((1, "gentle", True), (2, "strong", True), (3, "static", True), (4, "gentle", False))
TRACKED = 17  # frames of the clips with true tracks


def config_of(seed: int, motion: str, bodies: bool, num_frames: int) -> SyntheticConfig:
    """Return the settings of a synthetic clip."""
    return SyntheticConfig(
        num_frames=num_frames, size=SIZE, seed=seed, camera_motion=motion, moving_bodies=bodies, max_frequency=12.0
    )


def cost(clip: tuple[int, str, bool]) -> dict[str, float]:
    """Return the CPU seconds, misses of the target, and kinds of one clip's masks, for two seeds."""
    config = config_of(*clip, 49)
    scene, cameras = clip_scene(config, 0)
    made = (*render_clip(scene, cameras, config.fps), cameras[0].K)
    masks.draw(made[0][:3], made[1][:3], made[2], MaskConfig(), 0)  # compiles
    seconds, misses, kinds = [], [], []
    for seed in (0, 1):
        start = time.process_time()
        drawn = masks.draw(*made, MaskConfig(), seed)
        seconds.append(time.process_time() - start)
        misses.append(np.abs(drawn.hole_share.max(axis=1) - drawn.target))
        kinds.append(np.bincount(drawn.kind, minlength=len(KINDS)))
    return {
        "cpu_s": float(np.mean(seconds)),
        "largest_miss": float(np.max(misses)),
        "within_5_points": float((np.stack(misses) <= 0.05).mean()),
        **dict(zip(KINDS, np.sum(kinds, axis=0).tolist(), strict=True)),
    }


def truth(clip: tuple[int, str, bool]) -> dict[str, float]:
    """Return the errors of a clip's tracks and visibility masks against the truth."""
    config = config_of(*clip, TRACKED)
    scene, cameras = clip_scene(config, 0)
    frames, z_depth = render_clip(scene, cameras, config.fps)
    points = np.stack(np.meshgrid(*(np.arange(4, SIZE[0], 8) + 0.5,) * 2), axis=-1).reshape(-1, 2)
    row, column = points[:, 1].astype(int), points[:, 0].astype(int)
    xy, tracked = track(frames, points)
    near, kept, covered = [], [], []
    for t in range(1, TRACKED):
        visible, uv = visible_from(scene, cameras[0], 0.0, cameras[t], t / config.fps)
        near.append((np.linalg.norm(xy[t] - uv[row, column], axis=1) < 2)[tracked[t]])
        kept.append(tracked[t][visible[row, column]])
        covered.append(tracked[t][~visible[row, column]])
    K, radius = cameras[0].K, trajectory.radius_of(z_depth[0])
    smooth = away_from_edges(z_depth[0])
    overlaps = []
    for name, angle_deg in (("orbit", 30.0), ("orbit", 60.0), ("orbit", 85.0), ("arc", 45.0)):
        path = trajectory.build(name, 2, angle_deg, radius)
        true = visible_from(scene, cameras[0], 0.0, Camera(K, path[-1], SIZE))[0]
        found = _visibility(frames[:1], z_depth[:1], K, path[-1])
        overlaps.append((found & true & smooth).sum() / ((found | true) & smooth).sum())
    return {
        "tracks_within_2_px": float(np.concatenate(near).mean()),
        "visible_points_kept": float(np.concatenate(kept).mean()),
        "hidden_points_kept": float(np.concatenate(covered).mean()),
        "visibility_iou": float(np.mean(overlaps)),
        "visibility_iou_least": float(np.min(overlaps)),
    }


def away_from_edges(z_depth: np.ndarray) -> np.ndarray:
    """Return bool [H, W]: False within two pixels of a depth step over 4.6 %, where a mesh is torn."""
    import cv2

    ratio = cv2.dilate(z_depth, np.ones((3, 3))) / cv2.erode(z_depth, np.ones((3, 3)))
    return cv2.dilate((ratio > 1.046).astype(np.uint8), np.ones((5, 5))) == 0


def _visibility(frames: np.ndarray, z_depth: np.ndarray, K: np.ndarray, w2c: np.ndarray) -> np.ndarray:
    """Return the visibility mask of frame 0 as masks draw it."""
    return Scene(frames, z_depth, K).view(0, w2c[None], "visibility", MaskConfig().depth_tolerance)


def main() -> None:
    """Measure this checkout and another in turn; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps({**cost(args.one), **truth(args.one)}))
        return
    checkouts = [path for path in (args.against, ROOT) if path]
    rows: dict[Path, list[dict[str, float]]] = {path: [] for path in checkouts}
    for clip in CLIPS:
        for path in checkouts:
            command = [sys.executable, __file__, "--one", json.dumps(clip)]
            environment = {**os.environ, "PYTHONPATH": str(path)}
            told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            rows[path].append(json.loads(told.splitlines()[-1]))
            print(path, clip, rows[path][-1], flush=True)
    print("\n| figure |", " | ".join(map(str, checkouts)), "|\n|---|" + "---|" * len(checkouts))
    for name in rows[ROOT][0]:
        values = [np.mean([row[name] for row in rows[path]]) for path in checkouts]
        print(f"| {name} |", " | ".join(f"{value:.4g}" for value in values), "|")


if __name__ == "__main__":
    main()
