"""The whole way in one file: synthetic videos -> shards -> adapter -> a new view -> how good it is -> a page."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ex4d import config, synthetic
from ex4d.data.verify import verify
from ex4d.errors import ConfigError
from ex4d.evaluate import novel_views
from ex4d.evaluate.novel_views import EvaluateConfig
from ex4d.generate import GenerateConfig, load, novel_view
from ex4d.models.backbone import ModelConfig
from ex4d.train.config import TrainConfig
from ex4d.viewer import page
from pipelines import preprocess, train

SECTIONS = {
    "ray": preprocess.RayConfig,
    "synthetic": synthetic.SyntheticConfig,
    "preprocess": preprocess.PreprocessConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
}


def main(config_path: str, output: str) -> int:
    """Run every step into the folder `output`; print the figures and where things are; return the exit status."""
    console, started = Console(), time.monotonic()
    out = Path(output)
    dataset, run_folder = out / "dataset", out / "train"
    settings = config.load(
        config_path,
        SECTIONS,
        [f"preprocess.output={dataset}", f"train.data={dataset}", f"train.output={run_folder}"],
    )
    seconds: dict[str, float] = {}

    def step(name: str) -> None:
        seconds[name] = time.monotonic() - started - sum(seconds.values())

    console.rule("1. videos to shards")
    made = preprocess.run(settings["preprocess"], settings["ray"], settings["synthetic"])
    console.print(made.table())
    if made.exit_code:
        return made.exit_code
    report = verify(str(dataset), full=True)
    console.print(str(report))
    if not report.ok:
        return 1
    step("preprocess")

    console.rule("2. shards to an adapter")
    status = train.main([config_path, f"train.data={dataset}", f"train.output={run_folder}"])
    if status:
        return status
    adapter = run_folder / "adapter"
    step("train")

    console.rule("3. a new view of a video that was never seen")
    world = _held_out(settings["synthetic"], settings["preprocess"], settings["evaluate"])
    source = synthetic.write_corpus(out / "held_out", dataclasses.replace(world, num_videos=1))[0]
    view = novel_view(
        video_path=source,
        adapter_path=adapter,
        trajectory_name=settings["evaluate"].trajectory,
        angle_deg=settings["evaluate"].angle_deg,
        config=settings["generate"],
        seed=settings["evaluate"].seed,
    )
    video_path = view.write(out / "novel_view.mp4")[0]
    step("generate")

    console.rule("4. against the truth, on held-out scenes")
    views, scores, videos = _evaluate(settings, world, adapter)
    columns, rows = novel_views.table(scores)
    _print_scores(console, columns, rows, novel_views.margins(scores), len(views))
    step("evaluate")

    page_path = _write_page(out, settings, views, videos, columns, rows, run_folder, seconds)
    record = {"scores": [dataclasses.asdict(s) for s in scores], "seconds": seconds}
    (out / "scores.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.rule(f"done in {time.monotonic() - started:.0f} s")
    for name, path in (("dataset", dataset), ("adapter", adapter), ("video", video_path), ("page", page_path)):
        print(f"{name}: {path}")
    return 0


def _held_out(
    corpus: synthetic.SyntheticConfig, clips: preprocess.PreprocessConfig, evaluate: EvaluateConfig
) -> synthetic.SyntheticConfig:
    """Return the world of the held-out scenes: as in training, at the clip's size and length, other seeds."""
    if evaluate.corpus_seed == corpus.seed:
        raise ConfigError("evaluate.corpus_seed", evaluate.corpus_seed, "must differ from synthetic.seed")
    return dataclasses.replace(
        corpus,
        seed=evaluate.corpus_seed,
        num_frames=clips.num_frames,
        size=clips.size,
        num_videos=evaluate.num_scenes,
    )


def _evaluate(settings: dict[str, Any], world: synthetic.SyntheticConfig, adapter: Path) -> tuple[list, list, list]:
    base, trained = load(adapter)
    _, untrained = load(adapter, zero=True)
    chosen = settings["evaluate"]
    with Progress(transient=True) as progress:
        task = progress.add_task("rendering the truth", total=chosen.num_scenes)
        views = []
        for index in range(chosen.num_scenes):
            views.append(novel_views.make_view(index, world, chosen))
            progress.advance(task)
        task = progress.add_task("sampling", total=chosen.num_scenes)
        scores, videos = novel_views.compare(
            base,
            trained,
            untrained,
            views,
            settings["generate"],
            chosen.seed,
            on_view=lambda done, total: progress.update(task, completed=done),
        )
    return views, scores, videos


def _print_scores(
    console: Console, columns: list[str], rows: list[list[str]], leads: dict[str, tuple[float, float]], num_clips: int
) -> None:
    table = Table(title=f"PSNR in dB against exact novel views, mean ± standard deviation over {num_clips} clips")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name in ("zero adapter", "other clip's condition"):
        whole, holes = leads[name]
        console.print(f"trained adapter over {name}: {whole:+.2f} dB whole frame, {holes:+.2f} dB in the holes")


def _write_page(
    out: Path,
    settings: dict[str, Any],
    views: list,
    videos: list,
    columns: list[str],
    rows: list[list[str]],
    run_folder: Path,
    seconds: dict[str, float],
) -> Path:
    losses = [json.loads(line)["loss"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    shown = []
    for view, made in list(zip(views, videos, strict=True))[:4]:
        clips = (
            ("source", view.frames),
            ("depth", page.depth_colours(view.z_depth)),
            ("condition", view.cond_video),
            ("base model alone", made["zero adapter"]),
            ("with the adapter", made["trained adapter"]),
            ("ground truth", view.truth),
        )
        shown.append(page.Row(f"held-out scene {view.index}", [page.Clip(label, frames) for label, frames in clips]))
    chosen = settings["evaluate"]
    content = page.Page(
        title="EX-4D: the whole way, on a CPU",
        summary=(
            "Training pairs were made from single-view videos alone. The scenes below were not among them, and the "
            "true novel view of each is known exactly.",
            f"Path: {chosen.trajectory}, {chosen.angle_deg:g}°; {settings['generate'].num_inference_steps} steps.",
        ),
        rows=shown,
        tables=[
            page.Table(
                "PSNR against the exact novel view, dB",
                f"Mean ± standard deviation over {len(views)} held-out clips; frame 0, which is given, is left out.",
                columns,
                rows,
                best=0,
            )
        ],
        losses=losses,
        fps=settings["synthetic"].fps / 2,
        facts={
            **{f"{name}, seconds": f"{value:.0f}" for name, value in seconds.items()},
            "training steps": str(len(losses)),
            "frames": " × ".join(str(n) for n in np.shape(views[0].frames)[:3]),
        },
    )
    return page.write(content, out / "index.html")
