"""`ex4d demo`: synthetic videos -> shards -> adapter -> a novel view -> evaluation -> a page, in one file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ex4d import config, synthetic
from ex4d.redact import terminal

if TYPE_CHECKING:
    from ex4d.viewer.page import Page
    from pipelines.evaluate.report import Report

CONFIG = "configs/tiny.yaml"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d demo`."""
    parser.add_argument(
        "--config", metavar="CONFIG.yaml", help=f"default: {CONFIG} or, if it is missing, the copy in the package"
    )
    parser.add_argument("--output", default="out/demo", help="folder for all outputs (default: %(default)s)")


def sections() -> dict[str, type]:
    """Return the sections of a configuration that the demo reads: those of its jobs."""
    from pipelines.evaluate import job as evaluate
    from pipelines.preprocess import run as preprocess
    from pipelines.train import launch as train

    return {**preprocess.SECTIONS, **train.SECTIONS, **evaluate.SECTIONS}


def run(args: argparse.Namespace) -> int:
    """Run `ex4d demo`; return the exit status."""
    return main(args.config or default_config(), args.output)


def default_config() -> str:
    """Return the path of the demo's settings: in the checkout if there is one, else in the package."""
    return CONFIG if Path(CONFIG).exists() else str(files("pipelines.commands") / "tiny.yaml")


def main(config_path: str, output: str) -> int:
    """Run every step into the folder `output`; print the figures and the paths; return the exit status."""
    from rich.console import Console

    from ex4d.viewer import page
    from pipelines.evaluate import job as evaluate
    from pipelines.train import launch as train

    console, started = Console(file=terminal(sys.stdout)), time.monotonic()
    out = Path(output)
    dataset, run_folder = out / "dataset", out / "train"
    places = {
        **{"preprocess.output": dataset, "train.data": dataset, "train.output": run_folder},
        **{"evaluate.adapter": run_folder / "adapter", "evaluate.output": out / "evaluation"},
    }
    settings = config.load(config_path, sections(), [f"{key}={path}" for key, path in places.items()])
    seconds: dict[str, float] = {}

    def step(name: str) -> None:
        seconds[name] = time.monotonic() - started - sum(seconds.values())

    console.rule("1. videos to shards")
    status = _shards(settings)
    if status:
        return status
    step("preprocess")

    console.rule("2. shards to an adapter")
    status = train.command(config_path, [f"train.data={dataset}", f"train.output={run_folder}"])
    if status:
        return status
    step("train")

    console.rule("3. a new view of a video that was never seen")
    video_path = _novel_view(settings, out, run_folder / "adapter")
    step("generate")

    console.rule("4. against the truth, on held-out scenes")
    report = evaluate.run(settings["evaluate"], settings["generate"], settings["synthetic"], settings["ray"])
    print(report.table())
    if report.exit_code:
        return report.exit_code
    _print_leads(report)
    step("evaluate")

    page_path = page.write(_page(settings, report, run_folder, seconds), out / "index.html")
    console.rule(f"done in {time.monotonic() - started:.0f} s")
    results = {"dataset": dataset, "adapter": run_folder / "adapter", "video": video_path, "page": page_path}
    print(*(f"{name}: {path}" for name, path in results.items()), sep="\n")
    return 0


def _shards(settings: Mapping[str, Any]) -> int:
    """Make and verify the dataset; return the exit status."""
    from ex4d.data.verify import verify
    from pipelines.preprocess import run as preprocess

    result = preprocess.run(settings["preprocess"], settings["ray"], settings["synthetic"])
    print(result.table())
    if result.exit_code:
        return result.exit_code
    checked = verify(settings["preprocess"].output, full=True)
    print(checked)
    return 0 if checked.ok else 1


def _novel_view(settings: Mapping[str, Any], out: Path, adapter: Path) -> Path:
    """Write a novel view of a synthetic video that was not trained on; return its path."""
    from ex4d.generate import novel_view
    from pipelines.evaluate.config import CORPUS_SEED

    chosen = settings["evaluate"]
    unseen = dataclasses.replace(settings["synthetic"], seed=CORPUS_SEED, num_videos=1)
    source = synthetic.write_corpus(out / "held_out", unseen)[0]
    trajectory, angle_deg = next(iter(chosen.ranges.values()))[:2]
    view = novel_view(
        video_path=source,
        adapter_path=adapter,
        trajectory=trajectory,
        angle_deg=angle_deg,
        config=settings["generate"],
        seed=chosen.seed,
        source_motion=chosen.source_motion,
        persistent_frames=chosen.persistent_frames,
    )
    return view.write(out / "novel_view.mp4")[0]


def _print_leads(report: Report) -> None:
    from ex4d.evaluate import summary
    from pipelines.evaluate.stages import ADAPTER, BASE, METHODS, OTHER

    for name, views in report.ranges.items():
        for other in (BASE, OTHER):
            whole, holes = (summary.lead(views, ADAPTER, other, figure) for figure in ("psnr", "psnr_holes"))
            if whole is not None and holes is not None:
                lead = f"{whole:+.2f} dB whole frame, {holes:+.2f} dB in the holes"
                print(f"{name}: {METHODS[ADAPTER]} over {METHODS[other]}: {lead}")


def _page(settings: dict[str, Any], report: Report, run_folder: Path, seconds: dict[str, float]) -> Page:
    """Return the evaluation's page extended by the training's losses, as one file with embedded videos."""
    losses = [json.loads(line)["loss"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    notes = (
        "Training pairs were made from single-view videos alone. The scenes below were not among them, and the "
        "true novel view of each is known exactly.",
        f"{settings['generate'].num_inference_steps} steps of the sampler.",
    )
    times = {f"{name}, seconds": f"{value:.0f}" for name, value in seconds.items()}
    facts = {**times, "training steps": str(len(losses))}
    return report.page("EX-4D: the whole way, on a CPU", notes, losses=losses, facts=facts)
