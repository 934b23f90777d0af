"""Compare the hole shares of training masks and of generation, and draw masks: `python benchmarks/masks.py`.

Writes results/masks.{json,md}, docs/images/hole_share.png and docs/images/masks.png. Ten synthetic clips; generation
warps and erodes at full size, as `ex4d generate` does. About a minute.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.stats import wasserstein_distance

from ex4d.generate import GenerateConfig
from ex4d.geometry import imperfect, masks, trajectory
from ex4d.geometry.masks import KINDS, MaskConfig
from ex4d.geometry.render import warp_video
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
SPREADS = {
    "matched": MaskConfig(num_masks=8),
    "even, 10 to 90 %": MaskConfig(num_masks=8, generation=(), hole_share=(0.1, 0.9)),
}
COLOURS = {"generation": (30, 30, 30), "matched": (200, 80, 20), "even, 10 to 90 %": (60, 120, 200)}
Clip = tuple[np.ndarray, np.ndarray, np.ndarray]


def clip(seed: int, size: int, num_frames: int, motion: str = "gentle") -> Clip:
    """Return (frames, z_depth, K) of a synthetic clip."""
    config = SyntheticConfig(
        num_frames=num_frames, size=(size, size), seed=seed, max_frequency=8.0, camera_motion=motion
    )
    scene, cameras = clip_scene(config, 0)
    return *render_clip(scene, cameras, config.fps, config.supersample), cameras[0].K


def generated(made: Clip, name: str, angle_deg: float) -> np.ndarray:
    """Return the hole share of a clip's condition in each frame, float64 [T]."""
    frames, z_depth, K = made
    path = trajectory.build(name, len(frames), angle_deg, trajectory.radius_of(z_depth[0]))
    _, visible = warp_video(frames, z_depth, K, path, backend="cpu")
    return 1 - masks.erode(visible, GenerateConfig().erosion_px).mean(axis=(1, 2))


@dataclass(frozen=True)
class Comparison:
    """Two histograms of the hole share, and the distance between them.

    Attributes:
        edges: float64 [B + 1], shares from 0 to 1.
        training, generation: float64 [B], each with sum 1.
        distance: the Wasserstein distance between the two samples: the mean distance by which a share must move.
        percentiles: 10, 50 and 90 of training and of generation, float64 [2, 3].
    """

    edges: np.ndarray
    training: np.ndarray
    generation: np.ndarray
    distance: float
    percentiles: np.ndarray


def compare(training: np.ndarray, generated: np.ndarray, num_bins: int = 20) -> Comparison:
    """Compare the hole shares of training masks with those of generation.

    Args:
        training: real [..., T], `hole_share` of the masks; generated: real [..., T], of the conditions. Frame 0,
            which is complete in both, is left out.
    """
    first, second = (np.asarray(values, np.float64)[..., 1:].ravel() for values in (training, generated))
    edges = np.linspace(0, 1, num_bins + 1)
    counts = [np.histogram(values, edges)[0] / max(1, values.size) for values in (first, second)]
    percentiles = np.stack([np.percentile(values, [10, 50, 90]) for values in (first, second)])
    return Comparison(edges, counts[0], counts[1], float(wasserstein_distance(first, second)), percentiles)


def measure(clips: list[Clip]) -> tuple[dict, dict[str, np.ndarray]]:
    """Return (figures, {name: histogram}) of the clips' masks against the holes of generation on the same clips."""
    paths = MaskConfig().generation
    shares = {path: np.stack([generated(made, *path) for made in clips]) for path in paths}
    everything = np.concatenate(list(shares.values()))
    figures: dict = {"generation": {f"{n} {a:g}": percentiles(values) for (n, a), values in shares.items()}}
    figures["generation"]["all"] = percentiles(everything)
    histograms = {}
    for name, config in SPREADS.items():
        drawn = [masks.draw(*made, config, seed) for seed, made in enumerate(clips)]
        training = np.concatenate([one.hole_share for one in drawn])
        missed = np.abs(training.max(axis=1) - np.concatenate([one.target for one in drawn]))
        found = compare(training, everything)
        peaks = compare(*(np.stack([x * 0, x], 1) for x in (training.max(1), everything.max(1))))
        kinds = np.bincount(np.concatenate([one.kind for one in drawn]), minlength=len(KINDS))
        figures[name] = {
            "training": percentiles(training),
            "distance_frames": round(found.distance, 3),
            "distance_fullest": round(peaks.distance, 3),
            "largest_miss": round(float(missed.max()), 3),
            "within_5_points": float((missed <= 0.05).mean()),
            "kinds": dict(zip(KINDS, kinds.tolist(), strict=True)),
        }
        histograms |= {name: found.training, "generation": found.generation}
    return figures, histograms


def percentiles(shares: np.ndarray) -> list[float]:
    """Return percentiles 10, 50, 90 over all frames but the first, then over the frame with most holes of each clip."""
    values = [np.percentile(shares[:, 1:], [10, 50, 90]), np.percentile(shares.max(axis=1), [10, 50, 90])]
    return [round(float(x), 2) for x in np.concatenate(values)]


def plot(histograms: dict[str, np.ndarray]) -> Image.Image:
    """Return the histograms as stepped lines."""
    width, height, left, bottom = 640, 360, 50, 40
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    top = max(h.max() for h in histograms.values()) * 1.1
    across, up = width - left - 20, height - bottom - 40
    draw.line([(left, 40), (left, height - bottom), (width - 20, height - bottom)], fill="black")
    for share in np.linspace(0, 1, 6):
        draw.text((left + share * across - 8, height - bottom + 6), f"{100 * share:.0f} %", fill="black")
    draw.text((left, height - 16), "share of holes in a frame; frames of all masks but the first", fill="black")
    draw.text((4, 24), "share of the frames", fill="black")
    for row, (name, values) in enumerate(histograms.items()):
        edges = left + np.linspace(0, across, len(values) + 1)
        line = [(x, height - bottom - v / top * up) for k, v in enumerate(values) for x in edges[k : k + 2]]
        draw.line(line, fill=COLOURS[name], width=3)
        draw.text((width - 200, 44 + 14 * row), f"{'' if name == 'generation' else 'training, '}{name}", COLOURS[name])
    return picture


def sheet(columns: tuple[int, ...] = (0, 2, 4, 6, 8)) -> Image.Image:
    """Draw two masks of each kind on their clips, and a condition with imperfect geometry beside the exact one."""
    rows: list[tuple[str, np.ndarray]] = []
    for seed, kind in enumerate(KINDS):
        # For tracking, moving bodies in front of a static camera: enough points survive.
        frames, z_depth, K = clip(20 + seed, 144, 9, "static" if kind == "tracking" else "gentle")
        alone = {name: float(name == kind) for name in KINDS}
        drawn = masks.draw(frames, z_depth, K, MaskConfig(num_masks=2, hole_share=(0.2, 0.8), **alone), seed)
        for visible, index, share in zip(drawn.visible, drawn.kind, drawn.hole_share, strict=True):
            rows.append((f"{KINDS[index]} {100 * share.max():.0f} %", frames * visible[..., None]))
    w2c = trajectory.build("orbit", 9, 40.0, trajectory.radius_of(z_depth[0]))
    for name, errors in (("imperfect", {}), ("the same, exact", {"jitter": 0.0, "blur_px": 0.0})):
        rows.append((name, imperfect.condition(frames, z_depth, K, w2c, 0, **errors)[0]))
    picture = Image.fromarray(np.concatenate([np.concatenate(row[list(columns)], 1) for _, row in rows]))
    draw = ImageDraw.Draw(picture)
    for number, (name, _) in enumerate(rows):
        draw.text((4, 144 * number + 2), name, fill="white", stroke_width=1, stroke_fill="black")
    return picture


def markdown(figures: dict, num_clips: int) -> str:
    """Return the figures as a page."""
    lines = [
        "# Shares of holes",
        "",
        f"{figures['date']}; {num_clips} synthetic clips, frame 0 left out; percentiles 10 / 50 / 90. Distance: "
        "Wasserstein, over all frames and over the fullest frame of each mask.",
        "",
        "| what | all frames | fullest frame | distance, frames | distance, fullest | largest miss of the aim |",
        "|---|---|---|---|---|---|",
    ]
    rows = [(f"generation, {name}", values, ["", "", ""]) for name, values in figures["generation"].items()]
    for name in SPREADS:
        row = figures[name]
        cells = [row["distance_frames"], row["distance_fullest"], f"{100 * row['largest_miss']:.1f} points"]
        rows.append((f"training, {name}", row["training"], cells))
    for name, values, cells in rows:
        first, second = (" / ".join(f"{x:.2f}" for x in half) for half in (values[:3], values[3:]))
        lines.append(f"| {name} | {first} | {second} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, draw, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-clips", type=int, default=10)
    args = parser.parse_args()
    figures, histograms = measure([clip(seed, 128, 17) for seed in range(args.num_clips)])
    figures["date"] = datetime.now(UTC).date().isoformat()
    text = markdown(figures, args.num_clips)
    (RESULTS / "masks.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "masks.md").write_text(text, encoding="utf-8")
    IMAGES.mkdir(parents=True, exist_ok=True)
    plot(histograms).save(IMAGES / "hole_share.png", optimize=True)
    sheet().quantize(192).save(IMAGES / "masks.png", optimize=True)
    print(text)


if __name__ == "__main__":
    main()
