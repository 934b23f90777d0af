"""Estimate cameras from a clip's own motion, and render views with them: writes results/source_cameras.{json,md}.

Synthetic clips of 9 frames at 256 × 256, with exact depth and without poses. Cameras: rotation and translation error,
the latter after the similarity that fits the centres best, in shares of the path's length. Views: an orbit by 30°
that is fixed in the world, its last frame against the exact novel view, over the visible pixels: with true cameras,
with those that are found, and with a source taken to stand still. Beside them cameras that are found without depth,
and those of COLMAP (`cameras: colmap`), with exact depth and with relative disparity, which says nothing of motion.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from ex4d.depth import DepthRequest, Geometry, foreign, parallax, source_cameras
from ex4d.errors import BadSample, Filtered
from ex4d.geometry import trajectory
from ex4d.geometry.camera import Camera, invert
from ex4d.geometry.render import warp_video
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

RESULTS = Path(__file__).parent / "results"
SIZE, NUM_FRAMES, ANGLE_DEG = (256, 256), 9, 30.0


def camera_errors(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return rotation_deg, worst_rotation_deg and translation (share of the path's length, after Sim(3))."""
    steps = found[:, :3, :3].swapaxes(1, 2) @ truth[:, :3, :3]
    angles = np.degrees(np.arccos(np.clip((np.trace(steps, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    a, b = (invert(poses)[:, :3, 3] for poses in (found, truth))
    a0, b0 = a - a.mean(axis=0), b - b.mean(axis=0)
    u, s, v = np.linalg.svd(b0.T @ a0)
    flip = np.diag([1, 1, np.sign(np.linalg.det(u @ v))])
    scale = float((s * np.diag(flip)).sum() / max(np.square(a0).sum(), 1e-12))
    left = np.linalg.norm(b0 - scale * a0 @ (u @ flip @ v).T, axis=1)
    length = float(np.linalg.norm(np.diff(b, axis=0), axis=1).sum())
    return {
        "rotation_deg": float(angles[1:].mean()),
        "worst_rotation_deg": float(angles.max()),
        "translation": float(np.sqrt(np.square(left).mean())) / length,
    }


def view_psnr(scene, frames, z_depth, cameras, source_w2c) -> float:
    """Return the PSNR, dB, of the last frame's visible pixels along an orbit that is fixed in the world."""
    K, last = cameras[0].K, NUM_FRAMES - 1
    path = trajectory.build("orbit", NUM_FRAMES, ANGLE_DEG, trajectory.radius_of(z_depth[0]))
    world = None if source_w2c is None else source_w2c[last:]
    cond, visible = warp_video(frames[last:], z_depth[last:], K, path[last:], source_w2c=world)
    truth = scene.render(Camera(K, path[last] @ cameras[0].w2c, SIZE), last / 8.0)[0]
    difference = cond[0][visible[0]].astype(float) - truth[visible[0]]
    return float(10 * np.log10(255**2 / np.square(difference).mean()))


def alone(frames: np.ndarray, truth: np.ndarray) -> dict[str, object]:
    """Return the camera errors of `depth: parallax`, which uses no other depth; None if it rejects the clip."""
    started = time.process_time()
    try:
        found = parallax.estimate(frames, DepthRequest())
    except Filtered:
        return {"alone": None}
    assert found.w2c is not None
    return {"alone": camera_errors(found.w2c, truth), "alone_seconds": time.process_time() - started}


def by_colmap(geometry: Geometry, frames: np.ndarray, truth: np.ndarray) -> dict[str, float] | None:
    """Return the camera errors of `cameras: colmap`, with its CPU seconds; None if it rejects the clip."""
    started = time.process_time() + worker_seconds()
    try:
        found = source_cameras.joined(geometry, frames, DepthRequest(cameras="colmap"))
    except (Filtered, BadSample):
        return None
    assert found.w2c is not None
    return camera_errors(found.w2c, truth) | {"seconds": time.process_time() + worker_seconds() - started}


def worker_seconds() -> float:
    """Return the CPU time of the workers so far."""
    stats = [Path(f"/proc/{worker.process.pid}/stat").read_text() for worker in foreign._workers.values()]
    ticks = [sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats]
    return sum(ticks) / os.sysconf("SC_CLK_TCK")


def measure(seed: int, motion: str, moving_bodies: bool) -> dict[str, object]:
    """Return the figures of one clip; `refused` if no cameras were found."""
    config = SyntheticConfig(
        num_frames=NUM_FRAMES, size=SIZE, seed=seed, moving_bodies=moving_bodies, camera_motion=motion, supersample=1
    )
    scene, cameras = clip_scene(config, 0)
    frames, z_depth = render_clip(scene, cameras, 8.0)
    truth = np.stack([camera.w2c for camera in cameras]) @ cameras[0].c2w
    exact = Geometry(z_depth, "z_depth", cameras[0].K)
    row: dict[str, object] = {"seed": seed, "motion": motion, "moving_bodies": moving_bodies}
    row["true"] = view_psnr(scene, frames, z_depth, cameras, truth)
    row["still"] = view_psnr(scene, frames, z_depth, cameras, None)
    started = time.process_time()
    try:
        found = source_cameras.joined(exact, frames, DepthRequest(cameras="parallax"))
    except (Filtered, BadSample) as error:
        return row | {"refused": error.reason}
    w2c = found.w2c
    assert w2c is not None
    row["seconds"] = time.process_time() - started
    row |= camera_errors(w2c, truth)
    row["camera_depth_error"] = found.provenance["camera_depth_error"]
    row |= alone(frames, truth)
    inverse = 1 / z_depth
    disparity = ((inverse - 0.5 * inverse.min()) / inverse.max()).astype(np.float32)
    row["colmap"] = by_colmap(exact, frames, truth)
    row["colmap_relative"] = by_colmap(Geometry(disparity, "disparity"), frames, truth)
    row["found"] = view_psnr(scene, frames, z_depth, cameras, w2c)
    return row


def summary(rows: list[dict]) -> str:
    """Return a table: a line for each kind of clip."""
    head = (
        "| motion | bodies | clips | refused | rotation ° (median, 90 %) | worst frame ° | "
        "translation % | PSNR true | found | still |"
    )
    lines = [
        "# Cameras from a clip's own motion",
        "",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        "",
        head,
        "|" + "---|" * 10,
    ]
    for motion in ("gentle", "strong"):
        for moving in (False, True):
            mine = [row for row in rows if (row["motion"], row["moving_bodies"]) == (motion, moving)]
            got = [row for row in mine if "refused" not in row]
            if not got:
                continue

            def both(key: str, scale: float = 1.0, chosen: list[dict] = got) -> str:
                values = [scale * row[key] for row in chosen]
                return f"{np.median(values):.2f}, {np.percentile(values, 90):.2f}" if values else ""

            psnr = " | ".join(f"{np.mean([row[key] for row in got]):.1f}" for key in ("true", "found", "still"))
            bodies = "move" if moving else "stand"
            counts = f"{len(mine)} | {len(mine) - len(got)}"
            errors = f"{both('rotation_deg')} | {both('worst_rotation_deg')} | {both('translation', 100)}"
            lines.append(f"| {motion} | {bodies} | {counts} | {errors} | {psnr} |")
    titles = {
        "alone": "Without depth (`depth: parallax`)",
        "colmap": "COLMAP, with exact depth",
        "colmap_relative": "COLMAP, with relative disparity",
    }
    for key, title in titles.items():
        lines += ["", f"{title}:", "", *other_table(rows, key)]
    seconds = [row[key]["seconds"] for row in rows for key in ("colmap", "colmap_relative") if row.get(key)]
    if seconds:
        lines += ["", f"COLMAP takes {np.median(seconds):.1f} s of CPU a clip (median), {max(seconds):.1f} at most."]
    return "\n".join(lines) + "\n"


def other_table(rows: list[dict], key: str) -> list[str]:
    """Return the lines of a table of the camera errors under a key of the rows, where None means a rejected clip."""
    lines = ["| motion | bodies | refused | rotation ° | worst | translation % |", "|" + "---|" * 6]
    for motion, moving in ((m, b) for m in ("gentle", "strong") for b in (False, True)):
        mine = [row for row in rows if (row["motion"], row["moving_bodies"]) == (motion, moving)]
        got = [row[key] for row in mine if row.get(key)]
        cells = [
            f"{np.median(values):.2f}, {np.percentile(values, 90):.2f}" if got else ""
            for name, scale in (("rotation_deg", 1), ("worst_rotation_deg", 1), ("translation", 100))
            for values in [[scale * row[name] for row in got]]
        ]
        bodies = "move" if moving else "stand"
        lines.append(f"| {motion} | {bodies} | {len(mine) - len(got)} of {len(mine)} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measure and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-clips", type=int, default=10)
    rows = []
    for seed in range(parser.parse_args().num_clips):
        for motion in ("strong", "gentle"):
            for moving_bodies in (True, False):
                rows.append(measure(seed, motion, moving_bodies))
                print(json.dumps(rows[-1]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "source_cameras.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "source_cameras.md").write_text(summary(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
