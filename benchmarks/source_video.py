"""Measure the benefit of two-camera clips: compare three adapters of the tiny base with the true views of scenes.

    python benchmarks/source_video.py [--steps 400] [--scenes 16]

| adapter | trained on |
|---|---|
| simulated masks | videos of one camera, as `ex4d demo` does |
| two cameras | the true view from a second camera, with a condition warped from the first |
| two cameras, source video | the same, with the first camera's video as a second condition |

The recipe is that of configs/tiny.yaml. Writes results/source_video.md and .json; about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import textwrap
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import config as configs
from ex4d.evaluate import summary
from ex4d.evaluate.summary import Range
from ex4d.geometry.masks import MaskConfig
from pipelines.commands import demo
from pipelines.evaluate import job as evaluate
from pipelines.evaluate.stages import ADAPTER, BASE
from pipelines.preprocess import run as preprocess
from pipelines.train import launch as train

HERE = Path(__file__).resolve().parent
RECIPE = str(HERE.parent / "configs" / "tiny.yaml")
SECOND_CAMERA_DEG = 60.0
RANGES = {"orbit-30": ("orbit", 30.0), "orbit-60": ("orbit", 60.0)}
WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "simulated masks": ({}, False),
    "two cameras": ({"members": ("source",), "masks": MaskConfig(num_masks=1)}, False),
    "two cameras, source video": ({"members": ("source",), "masks": MaskConfig(num_masks=1)}, True),
}


def figures_of(way: str, folder: Path, steps: int, scenes: int) -> tuple[dict[str, Range], float]:
    """Train an adapter in one of WAYS; return (the figures of each range, seconds of training)."""
    members, source_video = WAYS[way]
    settings = configs.load(RECIPE, demo.sections())
    data, run = folder / f"data-{len(members)}", folder / f"run-{way}"
    # A clip is a whole video, since the two cameras coincide in its first frame.
    world = replace(settings["synthetic"], num_frames=9, second_camera_deg=SECOND_CAMERA_DEG if members else None)
    chosen = replace(settings["preprocess"], output=str(data), depth="sidecar", **members)
    assert preprocess.run(chosen, settings["ray"], world).exit_code == 0
    started = time.perf_counter()
    asked = [f"train.data={data}", f"train.output={run}", f"train.num_steps={steps}"]
    assert train.command(RECIPE, [*asked, f"model.source_video={str(source_video).lower()}"]) == 0
    seconds = time.perf_counter() - started
    judged = evaluate.EvaluateConfig(
        adapter=str(run / "adapter"),
        output=str(folder / f"judged-{way}"),
        ranges=RANGES,
        num_scenes=scenes,
        methods=(ADAPTER, BASE),
    )
    report = evaluate.run(judged, settings["generate"], settings["synthetic"], settings["ray"])
    assert report.exit_code == 0
    return dict(report.ranges), seconds


def row(views: Range, method: str, other: Range | None) -> dict[str, str]:
    """Return dB as text: whole frame, holes, and the mean paired difference from the adapter of another run."""
    cells = {}
    for name in ("psnr", "psnr_holes"):
        values = [figures[name] for figures in views.figures[method]]
        cells[name] = summary.spread(values)
        if other is not None:
            theirs = [figures[name] for figures in other.figures[ADAPTER]]
            gain = np.array([a - b for a, b in zip(values, theirs, strict=True) if a is not None and b is not None])
            cells[f"{name} lead"] = f"{gain.mean():+.2f} ± {gain.std() / np.sqrt(len(gain)):.2f}"
    return cells


def main() -> None:
    """Train, evaluate, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--scenes", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = {way: figures_of(way, Path(name), args.steps, args.scenes) for way in WAYS}
    first = next(iter(WAYS))
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for reach in RANGES:
        tables[reach] = {"the base alone": row(found[first][0][reach], BASE, None)}
        for way, (views, _) in found.items():
            tables[reach][way] = row(views[reach], ADAPTER, None if way == first else found[first][0][reach])
    date = datetime.now(UTC).date().isoformat()
    about = (
        f"{date}; {platform.machine()}, two cores; tiny base, {args.steps} steps of 8 clips, 48 scenes, the second "
        f"camera up to {SECOND_CAMERA_DEG:g}° away; {args.scenes} scenes that were not trained on. dB, mean ± standard "
        "deviation over scenes; leads over simulated masks, mean of the pairs ± its standard error."
    )
    lines = [
        "# What clips of two cameras are worth",
        "",
        textwrap.fill(about, 120, break_on_hyphens=False),
    ]
    for reach, rows in tables.items():
        lines += ["", f"| {reach} | whole frame | in the holes | lead | lead in the holes |", "|---|---|---|---|---|"]
        names = ("psnr", "psnr_holes", "psnr lead", "psnr_holes lead")
        lines += [
            f"| {way} | " + " | ".join(cells.get(name, "") for name in names) + " |" for way, cells in rows.items()
        ]
    lines += ["", "Training, s: " + ", ".join(f"{way} {seconds:.0f}" for way, (_, seconds) in found.items()) + "."]
    (HERE / "results" / "source_video.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {"date": date, "steps": args.steps, "tables": tables, "train_s": {w: s for w, (_, s) in found.items()}}
    (HERE / "results" / "source_video.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
