"""Compare depth from parallax with the truth: `python benchmarks/parallax.py` writes results/parallax.{json,md}.

Twenty synthetic clips of static scenes and twenty with moving bodies, each with a moving camera; and the real pairs, if
the folder `rgbd_icl_tum` exists (../shared/media, or EX4D_MEDIA). The baseline is the best constant depth.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import real_pairs
from depth_error import abs_rel, abs_rel_of_constant

from ex4d.depth import DepthRequest, estimate
from ex4d.errors import Filtered
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
PAIR_SIZE = (192, 256)


def synthetic(num_clips: int, moving_bodies: bool) -> dict[str, float]:
    """Return the mean errors over the clips that were not rejected, the number of rejects, and seconds per clip."""
    ours, constant, seconds = [], [], []
    for seed in range(num_clips):
        config = SyntheticConfig(num_frames=9, size=(96, 96), seed=seed, moving_bodies=moving_bodies)
        frames, truth = render_clip(*clip_scene(config, 0), fps=8.0)
        started = time.process_time()
        try:
            ours.append(abs_rel(estimate("parallax", frames, DepthRequest()).values, truth))
        except Filtered:
            continue
        seconds.append(time.process_time() - started)
        constant.append(abs_rel_of_constant(truth))
    worse = int(np.sum(np.array(ours) >= np.array(constant)))
    mean = {"abs_rel": np.mean(ours), "constant": np.mean(constant), "seconds": np.mean(seconds)}
    counts = {"clips": num_clips, "refused": num_clips - len(ours), "no_better_than_the_constant": worse}
    return {**{key: float(value) for key, value in mean.items()}, **counts}


def pairs(media: Path) -> list[dict[str, object]]:
    """Return a row for each neighbouring pair: errors where depth was measured, or the reason for its rejection."""
    import cv2

    sets = {
        "ICL": real_pairs.load_icl(media / "ch12" / "dense_RGBD" / "data"),
        "TUM": real_pairs.load_tum(media / "ch7"),
    }
    rows: list[dict[str, object]] = []
    for name, views in sets.items():
        for i in range(len(views) - 1):
            two, size = views[i : i + 2], PAIR_SIZE[::-1]
            frames = np.stack([cv2.resize(v.frame, size, interpolation=cv2.INTER_AREA) for v in two])
            truth = np.stack([cv2.resize(v.z_depth, size, interpolation=cv2.INTER_NEAREST) for v in two])
            row: dict[str, object] = {"pair": f"{name} {i + 1}, {i + 2}"}
            try:
                values, known = estimate("parallax", frames, DepthRequest()).values, truth > 0
                row |= {"abs_rel": abs_rel(values[known], truth[known]), "constant": abs_rel_of_constant(truth[known])}
            except Filtered as error:
                row["refused"] = str(error)
            rows.append(row)
    return rows


def markdown(results: dict) -> str:
    """Return the tables as a page."""
    lines = [
        "# Depth by parallax",
        "",
        "9 frames of 96 × 96, a gently moving camera; mean |z − truth| / truth after one scale and shift of the clip's "
        "disparity, beside the best constant. Process time of one core.",
        "",
        "| scenes | abs-rel | constant | ratio | clips | refused | no better than the constant | s a clip |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ("static", "moving bodies"):
        r = results[name]
        figures = f"{r['abs_rel']:.3f} | {r['constant']:.3f} | {r['abs_rel'] / r['constant']:.2f}"
        counts = f"{r['clips']} | {r['refused']} | {r['no_better_than_the_constant']} | {r['seconds']:.2f}"
        lines.append(f"| {name} | {figures} | {counts} |")
    lines += ["", "Real pairs with measured depth, 192 × 256:", "", "| pair | abs-rel | constant |", "|---|---|---|"]
    for row in results["pairs"]:
        found = f"{row['abs_rel']:.3f} | {row['constant']:.3f}" if "abs_rel" in row else f"{row['refused']} | "
        lines.append(f"| {row['pair']} | {found} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-clips", type=int, default=20)
    args = parser.parse_args()
    media = Path(os.environ.get("EX4D_MEDIA", ROOT.parent / "shared" / "media")) / "rgbd_icl_tum"
    results = {
        "static": synthetic(args.num_clips, moving_bodies=False),
        "moving bodies": synthetic(args.num_clips, moving_bodies=True),
        "pairs": pairs(media) if media.is_dir() else [],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "parallax.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "parallax.md").write_text(markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
