"""Measure whether training on persistent masks helps: writes results/persistence_training.{json,md}.

The demo's recipe (configs/tiny.yaml) is trained on masks without and with other frames' surfaces (N = 0 and 4, paths
fixed in the world), three seeds each, and evaluated on 16 held-out scenes with a moving camera, at orbits of 30 and 60
degrees, with the same N as in training. A third row generates with N = 4 from the adapters that were trained with 0.
Figures are means over the scenes, then mean and standard deviation over the seeds. Holes depend on N, so only figures
of the whole frame are comparable between rows. Takes an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from ex4d import config
from pipelines.commands.demo import sections
from pipelines.evaluate import job as evaluate
from pipelines.preprocess import run as preprocess
from pipelines.train import launch as train

CONFIG = "configs/tiny.yaml"
RESULTS = Path(__file__).parent / "results"
ROWS = {"trained 0, generated 0": (0, 0), "trained 4, generated 4": (4, 4), "trained 0, generated 4": (0, 4)}
FIGURES = ("psnr", "psnr_holes")


def main() -> None:
    """Build two datasets, train six adapters, evaluate nine times, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="out/persistence_training", help="folder of datasets and trainings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for a short try")
    args = parser.parse_args()
    out = Path(args.output)
    for frames in (0, 4):
        settings = load(out, args.overrides, frames, frames, 0)
        result = preprocess.run(settings["preprocess"], settings["ray"], settings["synthetic"])
        assert result.exit_code == 0, result.table()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ROWS}
    for seed in range(args.seeds):
        for name, (trained, generated) in ROWS.items():
            overrides = places(out, trained, generated, seed)
            if not (Path(overrides["train.output"]) / "adapter").exists():
                chosen = ("train.data", "train.output", "train.seed")
                status = train.command(CONFIG, [*args.overrides, *(f"{key}={overrides[key]}" for key in chosen)])
                assert status == 0, f"training ended with {status}"
            settings = load(out, args.overrides, trained, generated, seed)
            report = evaluate.run(settings["evaluate"], settings["generate"], settings["synthetic"], settings["ray"])
            assert report.exit_code == 0, report.table()
            found[name].append({key: means(views.figures) for key, views in report.ranges.items()})
            print(seed, name, json.dumps(found[name][-1]), flush=True)
    text = table(found)
    print(text)
    if not args.overrides:
        RESULTS.joinpath("persistence_training.json").write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.joinpath("persistence_training.md").write_text(text)


def places(out: Path, trained: int, generated: int, seed: int) -> dict[str, Any]:
    """Return the settings that differ from configs/tiny.yaml."""
    run = out / f"train-{trained}-{seed}"
    return {
        "preprocess.output": out / f"dataset-{trained}",
        "preprocess.source_motion": "remove",
        "preprocess.persistent_frames": trained,
        "train.data": out / f"dataset-{trained}",
        "train.output": run,
        "train.seed": seed,
        "evaluate.adapter": run / "adapter",
        "evaluate.output": out / f"evaluation-{trained}-{generated}-{seed}",
        "evaluate.source_motion": "remove",
        "evaluate.persistent_frames": generated,
        "evaluate.ranges": "{orbit-30: [orbit, 30.0], orbit-60: [orbit, 60.0]}",
        "evaluate.methods": "[adapter, warp]",
    }


def load(out: Path, overrides: list[str], trained: int, generated: int, seed: int) -> dict[str, Any]:
    """Return the settings of all jobs."""
    given = [f"{key}={value}" for key, value in places(out, trained, generated, seed).items()]
    return config.load(CONFIG, sections(), [*overrides, *given])


def means(figures: dict[str, list[dict[str, float | None]]]) -> dict[str, dict[str, float]]:
    """Return {method: {figure: mean over the views that have it}}."""
    found: dict[str, dict[str, float]] = {}
    for method, rows in figures.items():
        for name in FIGURES:
            values = [row[name] for row in rows if row.get(name) is not None]
            if values:
                found.setdefault(method, {})[name] = statistics.fmean(values)
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table in Markdown."""
    lines = [
        f"# Training with and without a static world that persists ({time.strftime('%Y-%m-%d')})",
        "",
        "`python benchmarks/persistence_training.py`; its docstring says what the figures mean. PSNR in dB: mean and",
        f"standard deviation of {len(next(iter(found.values())))} trainings, each a mean over 16 held-out scenes.",
        "",
        "| frames N | path | whole frame | holes | whole frame, warp alone |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in found.items():
        for path in seeds[0]:
            whole, holes = (spread([row[path]["adapter"].get(figure) for row in seeds]) for figure in FIGURES)
            warp = spread([row[path]["warp"].get("psnr") for row in seeds])
            lines.append(f"| {name} | {path} | {whole} | {holes} | {warp} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float | None]) -> str:
    """Return "mean ± standard deviation"."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.fmean(known):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
