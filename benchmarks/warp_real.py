"""Warp real pictures with measured depth: `python benchmarks/warp_real.py` writes results/warp_real.{json,md}.

Needs the folder `rgbd_icl_tum` (slambook2's pictures of ICL-NUIM and TUM RGB-D) under ../shared/media, or EX4D_MEDIA.
"""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import asdict
from pathlib import Path

import real_pairs

from ex4d.errors import BadSample
from ex4d.geometry.mesh import PROFILES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
LEAST_COVERAGE = 0.2  # with the default profile; pairs with less overlap say little


def measure(media: Path) -> list[dict]:
    """Return a row for each overlapping pair and profile."""
    sets = {
        "ICL": real_pairs.load_icl(media / "ch12" / "dense_RGBD" / "data"),
        "TUM": real_pairs.load_tum(media / "ch7"),
    }
    rows = []
    for name, views in sets.items():
        for i, source in enumerate(views):
            for j, target in enumerate(views):
                if i == j or not _overlap(source, target):
                    continue
                for profile in PROFILES:
                    found = asdict(real_pairs.score(source, target, profile))
                    rows.append({"pair": f"{name} {i + 1} → {j + 1}", "profile": profile, **found})
    return rows


def _overlap(source: real_pairs.View, target: real_pairs.View) -> bool:
    try:
        return real_pairs.score(source, target).coverage >= LEAST_COVERAGE
    except BadSample:
        return False


def markdown(rows: list[dict]) -> str:
    """Return the table as a page."""
    about = (
        "Frame i drawn from where frame j was taken, 480 × 640, pairs whose coverage is at least "
        f"{LEAST_COVERAGE:.0%}. ICL: exact depth and the given poses; TUM: Kinect depth, the pose by PnP. PSNR over "
        "the pixels marked visible; still: the same pixels, frame i left as it is; same surface: those of them whose "
        f"drawn depth is within {real_pairs.AGREE:.0%} of the measured. Recall: of what frame i has truly seen too, "
        "the share marked visible. Where the set's poses and pictures disagree (frame 3, by a few pixels), the PSNR "
        "says so."
    )
    lines = [
        "# Warps between real pictures",
        "",
        textwrap.fill(about, 120, break_on_hyphens=False),
        "",
        "| pair | profile | PSNR dB | still dB | same surface dB | coverage | recall | median depth error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        shares = f"{r['coverage']:.1%} | {r['recall']:.1%} | {r['depth_error']:.2%}"
        figures = f"{r['psnr']:.2f} | {r['psnr_still']:.2f} | {r['psnr_same_surface']:.2f}"
        lines.append(f"| {r['pair']} | {r['profile']} | {figures} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the two files."""
    media = Path(os.environ.get("EX4D_MEDIA", ROOT.parent / "shared" / "media")) / "rgbd_icl_tum"
    if not media.is_dir():
        raise SystemExit(f"{media} is not here: nothing measured")
    rows = measure(media)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "warp_real.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "warp_real.md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
