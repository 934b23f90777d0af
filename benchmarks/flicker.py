"""Measure the flicker of masks, with and without persistent static surfaces: writes results/flicker.md.

Flicker is the share of the static surface in two neighbouring views that is visible in one and a hole in the other,
along an orbit of 45° that is fixed in the world. Synthetic clips have exact depth and cameras, and ray casting follows
the surface; the second figure leaves out changes that exact visibility has too. Real clips have depth and cameras from
parallax, and that depth follows the surface; the second figure leaves out changes that the source camera explains,
where the surface leaves its picture or is hidden in it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from sight import visible_from

from ex4d.depth import DepthRequest, estimate
from ex4d.geometry import trajectory
from ex4d.geometry.camera import Camera, invert, unproject
from ex4d.geometry.render import persistent, warp_video
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
NUM_FRAMES, FPS, ANGLE_DEG, SIZE = 17, 8.0, 45.0, (96, 96)
REAL = {  # file, every n-th frame, size
    "dog": ("vipe_examples/dog-example.mp4", 2, (90, 160)),
    "child": ("vipe_examples/cosmos-example.mp4", 3, (90, 160)),
    "kitchen": ("found_in_use/kitchen_turned_inside_out/inverted.mp4", 1, (120, 160)),
}


def views(frames, z_depth, K, path, w2c, num_others: int, moves) -> np.ndarray:
    """Return visible bool [T, H, W] of the novel views."""
    shown, visible = warp_video(frames, z_depth, K, path, source_w2c=w2c, backend="cpu", first_frame="drawn")
    if not num_others:
        return visible
    return persistent.fill(shown, visible, frames, z_depth, K, path, w2c, num_others, moves, backend="cpu")[1]


def at(values: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Return the values [H, W] at pixels uv [..., 2]; those outside of the picture are clipped to its border."""
    height, width = values.shape
    return values[np.clip(uv[..., 1].astype(int), 0, height - 1), np.clip(uv[..., 0].astype(int), 0, width - 1)]


def synthetic(seed: int, num_others: int) -> tuple[int, int, int]:
    """Return the numbers of pixels (in two neighbouring views, that change, that change in exact visibility too)."""
    config = SyntheticConfig(num_frames=NUM_FRAMES, size=SIZE, fps=FPS, seed=seed, camera_motion="strong")
    scene, cameras = clip_scene(config, 0)
    frames, z_depth = render_clip(scene, cameras, FPS, 2)
    moves = np.stack([scene.moving(camera, t / FPS) for t, camera in enumerate(cameras)])
    w2c, K = np.stack([camera.w2c for camera in cameras]) @ cameras[0].c2w, cameras[0].K
    path = trajectory.build("orbit", NUM_FRAMES, ANGLE_DEG, trajectory.radius_of(z_depth[0]))
    visible = views(frames, z_depth, K, path, w2c, num_others, moves)
    novel = [Camera(K, pose @ cameras[0].w2c, SIZE) for pose in path]
    exact = np.stack(
        [
            np.any(
                [
                    visible_from(scene, novel[t], t / FPS, cameras[s], s / FPS)[0]
                    for s in (t, *persistent.others(t, NUM_FRAMES, num_others))
                ],
                axis=0,
            )
            for t in range(NUM_FRAMES)
        ]
    )
    counts = np.zeros(3, int)
    for t in range(1, NUM_FRAMES - 1):
        seen, uv = visible_from(scene, novel[t], t / FPS, novel[t + 1], (t + 1) / FPS)
        seen &= ~scene.moving(novel[t], t / FPS)
        changed = seen & (visible[t] != at(visible[t + 1], uv))
        counts += [seen.sum(), changed.sum(), (changed & (exact[t] != at(exact[t + 1], uv))).sum()]
    return int(counts[0]), int(counts[1]), int(counts[2])


def seen_at(points: np.ndarray, pose: np.ndarray, K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (uv [..., 2] px, z [...]) of points in a camera."""
    inside = points @ pose[:3, :3].T + pose[:3, 3]
    z = np.maximum(inside[..., 2], 1e-9)
    return np.stack([K[0, 0] * inside[..., 0] / z + K[0, 2], K[1, 1] * inside[..., 1] / z + K[1, 2]], -1), inside[
        ..., 2
    ]


def real(frames: np.ndarray, found, num_others: int) -> tuple[int, int, int]:
    """Return the counts of `synthetic`, the last one of changes that the source camera explains."""
    K, w2c, z_depth, moves = found.K, found.w2c, found.values, found.dynamic_mask
    path = trajectory.build("orbit", len(frames), ANGLE_DEG, trajectory.radius_of(z_depth[0]))
    visible = views(frames, z_depth, K, path, w2c, num_others, moves)
    height, width = z_depth.shape[1:]
    counts = np.zeros(3, int)
    for t in range(1, len(frames) - 1):
        world = unproject(z_depth[t], K) @ invert(w2c[t])[:3, :3].T + invert(w2c[t])[:3, 3]
        here, z_here = seen_at(world, path[t], K)
        there, z_there = seen_at(world, path[t + 1], K)
        source, z_source = seen_at(world, w2c[t + 1], K)

        def inside(uv: np.ndarray, z: np.ndarray) -> np.ndarray:
            return (z > 0) & (uv >= 0).all(-1) & (uv < (width, height)).all(-1)

        both = inside(here, z_here) & inside(there, z_there) & ~moves[t]
        changed = both & (at(visible[t], here) != at(visible[t + 1], there))
        hidden = ~inside(source, z_source) | (at(z_depth[t + 1], source) < 0.95 * z_source)
        counts += [both.sum(), changed.sum(), (changed & hidden).sum()]
    return int(counts[0]), int(counts[1]), int(counts[2])


def main() -> None:
    """Measure and write the page."""
    import cv2

    from ex4d import video

    lines = ["# Flicker of masks", "", (__doc__ or "").split("\n\n", 1)[1].strip(), ""]
    lines += ["| clips | other frames | changes % | beyond the camera's % |", "|---|---|---|---|"]

    def add(name: str, num_others: int, counts: np.ndarray) -> None:
        total, changed, explained = counts
        shares = f"{100 * changed / total:.2f} | {100 * (changed - explained) / total:.2f}"
        lines.append(f"| {name} | {num_others} | {shares} |")
        print(lines[-1], flush=True)

    for num_others in (0, 4):
        add("synthetic, 4", num_others, np.sum([synthetic(seed, num_others) for seed in range(4)], axis=0))
    media = Path(os.environ.get("EX4D_MEDIA", ROOT.parent / "shared" / "media"))
    for name, (file, step, (height, width)) in REAL.items() if media.is_dir() else ():
        frames = video.read(media / file)[0][::step][:NUM_FRAMES]
        frames = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])
        found = estimate("parallax", frames, DepthRequest())
        for num_others in (0, 4):
            add(name, num_others, np.array(real(frames, found, num_others)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "flicker.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
