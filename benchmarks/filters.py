"""Measure how well scores detect what they name: `python benchmarks/filters.py --media DIR` writes results/filters.*.

Every clip (17 frames from `--places` of each real video, and of synthetic scenes) is a negative unchanged, and a
positive after an edit: a line of text in one of four styles, black bars, a logo in a corner over a panning picture, a
blur, a slide-show, depth that jitters or drifts. Positives of text, bars and logos are encoded as H.264 (crf 26) before
scoring. Surveillance and night videos, which contain repeated frames, are left out of the slide-shows; the night video,
whose picture is as black as bars, is left out of the bars.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ex4d import video
from ex4d.errors import BadSample
from ex4d.quality import SCORES, clip, geometry, shot
from ex4d.quality.overlay import text_share
from ex4d.quality.pictures import luma, shrink, spread
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

RESULTS = Path(__file__).parent / "results"
NUM_FRAMES = 17
VIDEOS = (
    *("ex4d_flower/input.mp4", "torchcodec_dog/*.mp4", "sam2_gallery/**/*.mp4", "vipe_examples/*.mp4"),
    *("intel_static/**/*.m*", "pose2sim_multicam/videos/*", "torchcodec_nasa/*.mp4"),
)
STANDS, DARK = ("one-by-one", "bottle", "nasa"), ("nasa",)
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "nobody",
    "saw",
    "what",
    "came",
    "next",
    "2026",
]
Frames = np.ndarray


def clips(media: Path, places: int) -> dict[str, tuple[Frames, float]]:
    """Return {name: (frames uint8 [T,H,W,3], longer side at most 512; frames per second)}."""
    found = {}
    for path in sorted({path for pattern in VIDEOS for path in media.glob(pattern)}):
        try:
            info = video.probe(path)
            pts, time_base = video.frame_pts(path)
            scale = min(1.0, 512 / max(info.size))
            size = (round(info.size[0] * scale / 2) * 2, round(info.size[1] * scale / 2) * 2)
            for start in sorted({number * (len(pts) - NUM_FRAMES) // max(1, places - 1) for number in range(places)}):
                chosen = pts[start : start + NUM_FRAMES]
                fps = (len(chosen) - 1) / float((chosen[-1] - chosen[0]) * time_base)
                found[f"{path.parent.name}/{path.name}@{start}"] = (video.decode(path, chosen, size, "squeeze"), fps)
        except BadSample:
            continue
    return found


def scenes() -> dict[str, tuple[Frames, np.ndarray]]:
    """Return {name: (frames, exact z_depth)} of synthetic scenes with still, gentle and strong camera motion."""
    found = {}
    for motion in ("static", "gentle", "strong"):
        settings = SyntheticConfig(
            num_frames=NUM_FRAMES, size=(96, 96), camera_motion=motion, supersample=1, max_frequency=12.0, fps=16.0
        )
        for index in range(4):
            found[f"synthetic {motion} {index}"] = render_clip(*clip_scene(settings, index), settings.fps)
    return found


def written(frames: Frames, rng: np.random.Generator) -> Frames:
    """Draw one or two lines of text: white with an outline, yellow, white on black, or black on white."""
    height, width = frames.shape[1:3]
    size, style = max(10, int(height * rng.uniform(0.045, 0.09))), int(rng.integers(4))
    font = ImageFont.load_default(size)
    layer = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(layer)
    y = int(height * rng.choice([0.06, 0.45, 0.78]))
    for _ in range(int(rng.integers(1, 3))):
        text = " ".join(rng.choice(WORDS, int(rng.integers(3, 6))))
        while draw.textlength(text, font=font) > 0.95 * width:
            text = text[:-2]
        long = draw.textlength(text, font=font)
        x = int((width - long) * rng.choice([0.05, 0.5, 0.95]))
        if style >= 2:
            draw.rectangle(
                (x - 4, y - 2, x + long + 4, y + 1.2 * size),
                fill=(0, 0, 0, 200) if style == 2 else (250, 250, 250, 230),
            )
        fill = [(255, 255, 255, 255), (255, 230, 0, 255), (255, 255, 255, 255), (10, 10, 10, 255)][style]
        rim = {"stroke_width": max(1, size // 14), "stroke_fill": (0, 0, 0, 255)} if style == 0 else {}
        draw.text((x, y), text, fill=fill, font=font, **rim)
        y += int(1.35 * size)
    return _blended(frames, np.asarray(layer, np.float32))


def panned(frames: Frames, rng: np.random.Generator) -> Frames:
    """Return uint8 [64,H,W,3]: a window of 70 % that slides over the middle frame, like a panning camera."""
    height, width = (int(0.7 * side) // 2 * 2 for side in frames.shape[1:3])
    room = np.array([frames.shape[1] - height, frames.shape[2] - width])
    ends = np.array([[0, 0], room]) if rng.random() < 0.5 else np.array([[room[0], 0], [0, room[1]]])
    at = np.rint(np.linspace(*ends, 64)).astype(int)
    return np.stack([frames[len(frames) // 2][y : y + height, x : x + width] for y, x in at])


def marked(frames: Frames, rng: np.random.Generator) -> Frames:
    """Draw a ring and three letters in a corner, half to fully opaque."""
    height, width = frames.shape[1:3]
    size, corner, opacity = int(0.08 * height), int(rng.integers(4)), rng.uniform(0.5, 1)
    x = int(0.04 * width) if corner % 2 else int(0.96 * width) - 3 * size
    y = int(0.06 * height) + size if corner // 2 else int(0.94 * height)
    layer = np.zeros((height, width, 4), np.uint8)
    ink = (255, 255, 255, int(255 * opacity))
    cv2.circle(layer, (x + size // 2, y - size // 2), size // 2, ink, 2)
    cv2.putText(layer, "TV7", (x + size, y), cv2.FONT_HERSHEY_SIMPLEX, size / 25, ink, 2)
    return _blended(frames, layer.astype(np.float32))


def barred(frames: Frames, rng: np.random.Generator) -> tuple[Frames, tuple[int, int]]:
    """Return (frames shrunk between black bars, (px of a bar above and below, px of a bar at the sides))."""
    height, width = frames.shape[1:3]
    share, beside = rng.uniform(0.05, 0.2), rng.random() < 0.4
    top, left = (0, int(share * width)) if beside else (int(share * height), 0)
    out = np.zeros_like(frames)
    size = (width - 2 * left, height - 2 * top)
    out[:, top : height - top, left : width - left] = [cv2.resize(frame, size) for frame in frames]
    return out, (top, left)


def _blended(frames: Frames, layer: np.ndarray) -> Frames:
    opacity = layer[..., 3:] / 255
    return np.stack([(frame * (1 - opacity) + layer[..., :3] * opacity).astype(np.uint8) for frame in frames])


def encoded(frames: Frames) -> Frames:
    """Return the frames after H.264 compression."""
    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    return video.read(video.encode(np.ascontiguousarray(even), 10, crf=26))[0]


def small(frames: Frames) -> np.ndarray:
    """Return uint8 [T,h,w] luma at 144 lines, the resolution at which shots are examined."""
    width = round(frames.shape[2] * 144 / frames.shape[1])
    return luma(np.stack([cv2.resize(frame, (width, 144), interpolation=cv2.INTER_AREA) for frame in frames]))


def text_score(frames: Frames) -> float:
    """Return the clip's text score."""
    medium = shrink(frames, clip.TEXT_SIDE)
    return text_share(luma(medium[spread(len(medium), 8)]))


def logo_score(frames: Frames) -> float:
    """Return the shot's logo score."""
    grey = small(frames)
    return shot.logo_share(grey, shot.find_box(grey))


def sharp_score(frames: Frames) -> float:
    """Return the clip's sharpness."""
    return float(np.median([clip.sharpness(image) for image in luma(frames[spread(len(frames), 7)])]))


def figures(name: str, negatives: list[float], positives: list[float], threshold: float | None) -> dict[str, float]:
    """Return the detection figures at the suggested threshold; if that is None, at the best threshold."""
    low_is_bad = SCORES[name].keep == "min"
    negative, positive = np.array(negatives), np.array(positives)
    limit = threshold if threshold is not None else float(np.percentile(negative, 100 if not low_is_bad else 0))
    hits = (positive < limit if low_is_bad else positive > limit).sum()
    false = (negative < limit if low_is_bad else negative > limit).sum()
    return {
        "threshold": limit,
        "negatives": len(negative),
        "positives": len(positive),
        "recall": float(hits / len(positive)),
        "precision": float(hits / max(1, hits + false)),
        "false_share": float(false / len(negative)),
    }


def measure(media: Path, places: int) -> dict[str, dict[str, float]]:
    """Return {score: figures}."""
    rng = np.random.default_rng(0)
    real, made = clips(media, places), scenes()
    negatives: dict[str, list[float]] = {name: [] for name in ("text", "logo", "sharpness", "still")}
    positives: dict[str, list[float]] = {name: [] for name in negatives}
    bars = {"clips": 0, "found": 0, "false": 0, "most_lost_px": 0}

    def is_any(name: str, parts: tuple[str, ...]) -> bool:
        return any(part in name for part in parts)

    for name, (frames, _) in real.items():
        negatives["text"].append(text_score(frames))
        if negatives["text"][-1] > (SCORES["text"].suggested or 0.0):
            print(f"text is seen in {name}: {negatives['text'][-1]:.4f}")
        positives["text"].append(text_score(encoded(written(frames, rng))))
        moving = panned(frames, rng)
        negatives["logo"].append(logo_score(moving))
        positives["logo"].append(logo_score(encoded(marked(moving, rng))))
        negatives["sharpness"].append(sharp_score(frames))
        blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), max(frames.shape) / 128) for frame in frames])
        positives["sharpness"].append(sharp_score(blurred))
        if not is_any(name, STANDS):
            grey = luma(shrink(frames, clip.SIDE))
            negatives["still"].append(clip.still_share(grey))
            positives["still"].append(clip.still_share(luma(shrink(encoded(frames[[0, 16]].repeat(8, 0)), clip.SIDE))))
        if not is_any(name, DARK):
            _count_bars(bars, frames, rng)
    table = {name: figures(name, negatives[name], positives[name], SCORES[name].suggested) for name in negatives}
    table["bars"] = {key: float(value) for key, value in bars.items()}
    return table | _depth(made, rng)


def _count_bars(bars: dict[str, int], frames: Frames, rng: np.random.Generator) -> None:
    size = frames.shape[1:3]
    grey = small(frames)
    bars["false"] += shot.find_box(grey) != (0, 0, *grey.shape[1:])
    changed, (top, left) = barred(frames, rng)
    grey = small(encoded(changed))
    y, x, height, width = shot.source_box(shot.find_box(grey), grey.shape[1:], size)
    lost = [y - top, x - left, size[0] - top - y - height, size[1] - left - x - width]
    bars["clips"] += 1
    bars["found"] += min(lost) >= 0 and max(lost) <= 0.03 * max(size)
    bars["most_lost_px"] = max(bars["most_lost_px"], *(lost if min(lost) >= 0 else [0]))


def _depth(made: dict[str, tuple[Frames, np.ndarray]], rng: np.random.Generator) -> dict[str, dict[str, float]]:
    def jitter(z_depth: np.ndarray) -> np.ndarray:
        return z_depth * np.exp(rng.normal(0, 0.02, (len(z_depth), 1, 1)))

    def drift(z_depth: np.ndarray) -> np.ndarray:
        return z_depth * 1.01 ** np.arange(len(z_depth))[:, None, None]

    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {"depth_flicker": jitter, "depth_drift": drift}
    table = {}
    for name, change in changes.items():
        truth = [geometry.measure(frames, z_depth)[name] for frames, z_depth in made.values()]
        wrong = [geometry.measure(frames, change(z).astype(np.float32))[name] for frames, z in made.values()]
        table[name] = figures(name, truth, wrong, None)
        table[name] |= {"truth": float(np.max(truth)), "changed": float(np.median(wrong))}
    return table


def sentences(table: Mapping[str, Any]) -> list[str]:
    """Return what the table of scores does not hold, as lines of Markdown."""
    bars = {name: f"{value:g}" for name, value in table["bars"].items()}
    found = (
        f"{bars['found']} of {bars['clips']} made bars are found, losing at most {bars['most_lost_px']} px of picture"
    )
    lines = ["", f"Bars: {found}; {bars['false']} are seen where there are none.", ""]
    for name in ("depth_flicker", "depth_drift"):
        row = table[name]
        lines.append(
            f"- `{name}`: at most {row['truth']:.3g} on true depth; {row['changed']:.3g} (median) once changed."
        )
    return [*lines, ""]


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--media", type=Path, required=True)
    parser.add_argument("--places", type=int, default=3, help="clips of each video (default: %(default)s)")
    started, args = time.time(), parser.parse_args()
    cv2.setNumThreads(1)
    table = measure(args.media, args.places)
    columns = ("threshold", "negatives", "positives", "recall", "precision", "false_share")
    lines = [
        "# Scores against made positives",
        "",
        f"| score | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name, row in table.items():
        if "recall" in row:
            lines.append(f"| {name} | " + " | ".join(f"{row[column]:.3g}" for column in columns) + " |")
    lines += sentences(table)
    (RESULTS / "filters.json").write_text(
        json.dumps({"figures": table, "seconds": round(time.time() - started, 1)}, indent=1) + "\n"
    )
    (RESULTS / "filters.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
