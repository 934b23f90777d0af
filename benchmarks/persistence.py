"""Compare persistent static surfaces with exact novel views: writes results/persistence.{json,md}.

Synthetic clips of 33 frames; the view is the last frame of a path that is fixed in the world. Possible pixels are those
of the novel view whose surface the current frame does not see and one of the other frames does, by ray casting.
`recall` is the share of them that is filled; `fine` leaves out those where one pixel of the other frame would have to
cover more than eight. `false` is the share of the added pixels that no frame sees, and, after the comma, that share
outside 3 px around depth edges. PSNR is over the visible pixels, then with exact correspondences in place of the mesh.
Ghosts: share of the true silhouettes of moving bodies that other frames' surfaces cover.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from sight import visible_from
from warp import edge_band

from ex4d.depth import DepthRequest, estimate
from ex4d.errors import Filtered
from ex4d.evaluate.metrics import psnr
from ex4d.geometry import trajectory
from ex4d.geometry.camera import Camera
from ex4d.geometry.render import persistent, warp_video
from ex4d.synthetic import Scene, SyntheticConfig, clip_scene

RESULTS = Path(__file__).parent / "results"
NUM_FRAMES, FPS, LAST = 33, 8.0, 32
PATHS = (("orbit", 30.0), ("orbit", 60.0), ("orbit", 90.0), ("full", 90.0))
FINE = 1 / 8  # least area, in px of the other frame, that a pixel of the view covers


@dataclass(frozen=True)
class Clip:
    """A scene, its cameras and its frames; frames that no view uses are black."""

    scene: Scene
    cameras: list[Camera]
    frames: np.ndarray
    z_depth: np.ndarray
    w2c: np.ndarray
    moves: np.ndarray
    unit: float = 1.0  # units of z_depth and w2c per unit of the scene


def clip(seed: int, motion: str, size: tuple[int, int], moving_bodies: bool, frames: set[int]) -> Clip:
    """Return a clip with only the given frames rendered."""
    config = SyntheticConfig(
        num_frames=NUM_FRAMES, size=size, fps=FPS, seed=seed, moving_bodies=moving_bodies, camera_motion=motion
    )
    scene, cameras = clip_scene(config, 0)
    pictures, depth = np.zeros((NUM_FRAMES, *size, 3), np.uint8), np.ones((NUM_FRAMES, *size), np.float32)
    moves = np.zeros(depth.shape, bool)
    for t in frames:
        pictures[t], depth[t] = scene.render(cameras[t], t / FPS, 2)
        moves[t] = scene.moving(cameras[t], t / FPS)
    w2c = np.stack([camera.w2c for camera in cameras]) @ cameras[0].c2w
    return Clip(scene, cameras, pictures, depth, w2c, moves)


def estimated(made: Clip) -> Clip | None:
    """Return the clip with depth, cameras and moving parts from parallax, in their own unit; None if it is rejected."""
    try:
        found = estimate("parallax", made.frames, DepthRequest())
    except Filtered:
        return None
    assert found.w2c is not None
    assert found.dynamic_mask is not None
    unit = float(np.median(found.values / made.z_depth))
    return Clip(made.scene, made.cameras, made.frames, found.values, found.w2c, found.dynamic_mask, unit)


def measure(made: Clip, path: tuple[str, float], radius: float, num_others: int) -> dict[str, float]:
    """Return the figures of one view."""
    K, size = made.cameras[0].K, made.cameras[0].size
    pose = trajectory.build(path[0], NUM_FRAMES, path[1], radius)[LAST]
    novel, moved = Camera(K, pose @ made.cameras[0].w2c, size), pose.copy()
    moved[:3, 3] *= made.unit
    truth, z_depth = made.scene.render(novel, LAST / FPS, 2)
    used = persistent.others(LAST, NUM_FRAMES, num_others)
    present = visible_from(made.scene, novel, LAST / FPS, made.cameras[LAST])[0]
    exact, union, footprint = np.zeros((*size, 3), np.uint8), np.zeros(size, bool), np.zeros(size)
    for s in used:
        seen, uv = visible_from(made.scene, novel, LAST / FPS, made.cameras[s], s / FPS)
        across, down = np.gradient(uv, axis=1), np.gradient(uv, axis=0)
        area = np.abs(across[..., 0] * down[..., 1] - across[..., 1] * down[..., 0])
        places = (uv - 0.5).astype(np.float32)
        picture = cv2.remap(
            made.frames[s], places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        exact[seen & ~union] = picture[seen & ~union]
        union, footprint = union | seen, np.maximum(footprint, np.where(seen, area, 0))
    last = slice(LAST, None)
    shown, visible = (
        x[0]
        for x in warp_video(
            made.frames[last], made.z_depth[last], K, moved[None], source_w2c=made.w2c[last], backend="cpu"
        )
    )
    moves = made.moves if made.moves.any() else None
    world = persistent.World(
        made.frames, made.z_depth, K, made.w2c, num_others, moves, None, persistent.profile_of("default"), "cpu"
    )
    started = time.process_time()
    colour, added = world.fill(LAST, ~visible, moved, K)
    seconds = time.process_time() - started
    body = made.scene.moving(novel, LAST / FPS)
    possible, edge, everything = ~present & union & ~body, edge_band(z_depth), visible | added
    fine = possible & (footprint > FINE)
    wrong = added & ~(present | union)
    both = np.where(added[..., None], colour, shown)
    return {
        "holes_before": (~visible).sum(), "holes": (~everything).sum(), "exact_before": (~present).sum(),
        "exact": (~(present | union)).sum(), "possible": possible.sum(), "recalled": (possible & added).sum(),
        "fine": fine.sum(), "fine_recalled": (fine & added).sum(), "added": added.sum(), "false": wrong.sum(),
        "added_inner": (added & ~edge).sum(), "false_inner": (wrong & ~edge).sum(), "pixels": visible.size,
        "psnr_before": psnr(shown, truth, visible), "psnr": psnr(both, truth, everything),
        "psnr_exact": psnr(np.where((union & added)[..., None], exact, shown), truth, visible | (union & added)),
        "body": body.sum(), "ghost": (added & body).sum(), "seconds": seconds,
    }  # fmt: skip


def rows_of(size: int, num_clips: int, source: str, counts: tuple[int, ...], moving_bodies: bool) -> list[dict]:
    """Return a row for each kind of motion, path and number of other frames; each figure is the mean over the clips."""
    rows: list[dict[str, Any]] = []
    wanted = set(range(NUM_FRAMES)) if source == "parallax" else {0, LAST}
    wanted |= {s for n in counts for s in persistent.others(LAST, NUM_FRAMES, n)}
    for motion in ("strong", "gentle"):
        truth = [clip(seed, motion, (size, size), moving_bodies, wanted) for seed in range(num_clips)]
        used = truth if source == "exact" else [estimated(made) for made in truth]
        for path in PATHS:
            for count in counts:
                views = [
                    measure(made, path, trajectory.radius_of(true.z_depth[0]), count)
                    for true, made in zip(truth, used, strict=True)
                    if made is not None
                ]
                if not views:
                    continue
                row: dict[str, Any] = {key: float(np.nanmean([view[key] for view in views])) for key in views[0]}
                row |= {"size": size, "source": source, "motion": motion, "path": f"{path[0]} {path[1]:g}"}
                row |= {"others": count, "clips": len(views), "bodies": moving_bodies}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def markdown(rows: list[dict]) -> str:
    """Return the tables as a page."""
    lines = ["# Persistence", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    groups = {(row["source"], row["size"], row["bodies"]) for row in rows}
    for source, size, bodies in sorted(groups, key=str):
        mine = [row for row in rows if (row["source"], row["size"], row["bodies"]) == (source, size, bodies)]
        what = "depth and cameras by parallax" if source == "parallax" else "exact depth and cameras"
        lines += [f"## {size} × {size}, {what}, bodies {'move' if bodies else 'stand'}", ""]
        lines.append(
            "| motion | path | N | clips | holes % | fall % (exact) | recall % | fine % | false % | PSNR 0, N, exact |"
            + (" ghosts % |" if bodies else "")
        )
        lines.append("|" + "---|" * (11 if bodies else 10))
        for r in mine:
            fall, exact = 1 - r["holes"] / r["holes_before"], 1 - r["exact"] / r["exact_before"]
            recall, fine = r["recalled"] / max(r["possible"], 1), r["fine_recalled"] / max(r["fine"], 1)
            false, inner = r["false"] / max(r["added"], 1), r["false_inner"] / max(r["added_inner"], 1)
            line = (
                f"| {r['motion']} | {r['path']} | {r['others']} | {r['clips']} | {100 * r['holes'] / r['pixels']:.1f} "
            )
            line += f"| {100 * fall:.0f} ({100 * exact:.0f}) | {100 * recall:.0f} | {100 * fine:.0f} "
            line += f"| {100 * false:.1f}, {100 * inner:.1f} "
            line += f"| {r['psnr_before']:.1f}, {r['psnr']:.1f}, {r['psnr_exact']:.1f} |"
            lines.append(line + (f" {100 * r['ghost'] / max(r['body'], 1):.1f} |" if bodies else ""))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-clips", type=int, default=6)
    num_clips = parser.parse_args().num_clips
    rows = rows_of(96, num_clips, "exact", (0, 2, 4, 8), False)
    rows += rows_of(96, num_clips, "exact", (4,), True)
    rows += rows_of(96, num_clips, "parallax", (0, 4), False)
    rows += rows_of(512, max(1, num_clips // 3), "exact", (0, 4), False)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "persistence.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "persistence.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
