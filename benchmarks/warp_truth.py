"""Compare warps with exact novel views: `python benchmarks/warp_truth.py` writes results/warp_truth.{json,md}.

Procedural scenes with exact depth, textures up to the Nyquist limit, supersampled truth, the last frame of an orbit of
30, 60 and 90°. The default mesh is compared with the closed one, whose curtains have unlimited reach, the released
profile, the torn mesh, exact correspondences as the upper bound, and sweeps of occlusion threshold and curtain reach.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import warp

from ex4d.geometry.profiles import PROFILES

ANGLES_DEG = (30.0, 60.0, 90.0)
THRESHOLDS_DEG = (0.6, 1.25, 2.5, 5.0, 10.0)
REACHES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
FIELDS = ("psnr", "coverage", "recall", "false_share")
RESULTS = Path(__file__).parent / "results"


def measure(size: int, num_scenes: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return {angle: {method: {figure: mean over the scenes}}}."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for angle in ANGLES_DEG:
        scores: dict[str, list[warp.WarpScore]] = {}
        for index in range(num_scenes):
            pair = warp.make_pair((71, index), (size, size), angle, max_frequency=size / 2)
            found = {name: warp.score(pair, name) for name in ("default", "closed", "released", "torn")}
            found["exact correspondences"] = warp.score_ceiling(pair)
            for threshold in THRESHOLDS_DEG:
                found[f"threshold {threshold:g}°"] = warp.score(pair, mesh=warp.with_threshold(pair, threshold))
            for reach in REACHES:
                found[f"reach {reach:g}"] = warp.score(pair, replace(PROFILES["default"], curtain_reach=reach))
            for name, value in found.items():
                scores.setdefault(name, []).append(value)
        table[f"{angle:g}"] = {
            name: {field: float(np.nanmean([asdict(v)[field] for v in values])) for field in FIELDS}
            for name, values in scores.items()
        }
    return table


def markdown(results: dict[str, dict], num_scenes: int) -> str:
    """Return the tables as a page."""
    about = (
        f"Mean over {num_scenes} procedural scenes, textures up to the Nyquist limit, supersampled 4 × 4, "
        "last frame of the orbit. PSNR over the pixels marked visible; coverage: their share; recall: of the "
        f"surface that both cameras truly see, outside {warp.BAND_PX} px around depth edges, the share that is marked "
        "visible; false: of the pixels marked visible there, the share that the source does not see."
    )
    lines = [
        "# Warps against exact novel views",
        "",
        textwrap.fill(about, 120, break_on_hyphens=False),
    ]
    for size, table in results.items():
        for angle, methods in table.items():
            lines += ["", f"## {size} × {size}, orbit {angle}°", "", "| mesh | PSNR dB | coverage | recall | false |"]
            lines += ["|---|---|---|---|---|"]
            for name, v in methods.items():
                shares = " | ".join(f"{100 * v[field]:.1f} %" for field in FIELDS[1:])
                lines.append(f"| {name} | {v['psnr']:.2f} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--num-scenes", type=int, default=8)
    args = parser.parse_args()
    results = {str(size): measure(size, args.num_scenes) for size in args.sizes}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "warp_truth.json").write_text(
        json.dumps({"num_scenes": args.num_scenes, "sizes": results}, indent=1) + "\n"
    )
    text = markdown(results, args.num_scenes)
    (RESULTS / "warp_truth.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
