"""Measure the cost of Ray over a bare loop, and the cost of each stage.

    python benchmarks/preprocess.py --hardware "2 x86-64 cores"

The same stage functions process the same clips, once as two nested `for` loops in one process, once on Ray with two
workers that are already started; runs are interleaved, each into an empty folder. A rate counts the clips finished
after the first quarter, which excludes the start of a pass; the start is reported separately. Then the stages are timed
in one process at the size that the 14B model is trained on. Writes benchmarks/results/preprocess.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.runtime import job, progress, runner
from pipelines.runtime.stage import Row, Track, quiet_threads

RESULTS = Path(__file__).parent / "results"
PASS = "clip"
LARGE = (49, (512, 512))


class Bare:
    """The loop that one would write without a pipeline. Errors propagate."""

    problems = ()

    def __call__(
        self, tracks: Sequence[Track], rows: Iterable[Row], context: Any, added: deque[tuple[str, Row]]
    ) -> Iterator[tuple[str, Row]]:
        """Yield finished rows."""
        quiet_threads()
        stages = {track.name: track.stages for track in tracks}
        for first in rows:
            todo = deque([(tracks[0].name, first)])
            while todo:
                name, row = todo.popleft()
                for stage in stages[name]:
                    if row["refusal"] is None or stage.takes_rejected:
                        row = row | stage.function({name: row[name] for name in stage.reads}, context)
                yield name, row
                todo.extend(added)
                added.clear()


class Stamped(progress.Progress):
    """Progress that records when each clip finished."""

    stamps: ClassVar[list[float]] = []
    began: ClassVar[float] = 0.0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        Stamped.stamps, Stamped.began = [], time.perf_counter()

    def count(self, current: progress.Pass, row: Row, video_s: float) -> None:
        super().count(current, row, video_s)
        if current.name == PASS:
            Stamped.stamps.append(time.perf_counter())


def timed(config: PreprocessConfig, runner_name: str) -> dict[str, float]:
    """Return the steady rate in clips per second, the seconds to the first clip, and those of the whole run."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = preprocess.run(replace(config, output=folder), runner_name=runner_name)
        whole = time.perf_counter() - start
    if result.exit_code or result.counts["samples"] != result.counts["clips_planned"]:
        raise SystemExit(f"the corpus is not clean: {result.table()}")
    stamps = Stamped.stamps
    first = len(stamps) // 4
    rate = (len(stamps) - 1 - first) / (stamps[-1] - stamps[first])
    return {"rate": rate, "first_s": stamps[0] - Stamped.began, "whole_s": whole, "clips": len(stamps)}


def compare(config: PreprocessConfig, runs: int) -> dict[str, Any]:
    """Return both sides' runs and, for each pair, the ratio of clips per second and core, Ray's over the loop's."""
    sides = {"bare": ("inline", 1), "ray": ("ray", config.num_workers)}
    guarded, runner.Inline = runner.Inline, Bare
    few = replace(config, input=list(config.input or ())[:16])
    timed(few, "inline")  # compiles, and starts Ray's workers
    timed(few, "ray")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for pair in range(runs):
        for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
            found[name].append(timed(config, sides[name][0]))
            print(name, found[name][-1], flush=True)
    runner.Inline = guarded
    pairs = zip(found["ray"], found["bare"], strict=True)
    ratios = sorted(on_ray["rate"] / sides["ray"][1] / loop["rate"] for on_ray, loop in pairs)
    return {"runs": found, "ratios": ratios, "ratio": statistics.median(ratios)}


def stage_costs(folder: Path, num_clips: int) -> dict[str, float]:
    """Return {stage: seconds per clip} for 49 × 512 × 512 with depth beside the video, in one process."""
    num_frames, size = LARGE
    made = SyntheticConfig(num_videos=num_clips, num_frames=num_frames, size=size, supersample=1, max_frequency=30.0)
    paths = [str(path) for path in write_corpus(folder / "large", made)]
    config = PreprocessConfig(output="unset", input=paths, num_frames=num_frames, size=size)
    with tempfile.TemporaryDirectory() as output:
        preprocess.run(replace(config, output=output, input=paths[:1]), runner_name="inline")
    with tempfile.TemporaryDirectory() as output:
        result = preprocess.run(replace(config, output=output), runner_name="inline")
    return {name: tally.worker_s / tally.done for name, tally in result.stages.items() if tally.done}


def markdown(facts: dict[str, Any]) -> str:
    """Return the results as a page."""
    overhead, costs = facts["overhead"], facts["stage_s"]
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("rate", "first_s", "whole_s")}
        for name, runs in overhead["runs"].items()
    }
    lines = [
        "# Preprocessing: Ray against a bare loop, and the cost of each stage",
        "",
        f"{facts['date']}, {facts['hardware']}. {facts['clips']} clips of {facts['clip']}, {facts['pairs']} "
        f"interleaved runs, medians. Ray: {facts['workers']} workers of a Ray that runs already "
        f"(its start: {facts['ray_start_s']:.1f} s).",
        "",
        "| | clips a second | a core | first clip after | whole run |",
        "|---|---|---|---|---|",
    ]
    for name, cores in (("bare", 1), ("ray", facts["workers"])):
        rate, first_s, whole_s = median[name].values()
        lines.append(f"| {name} | {rate:.2f} | {rate / cores:.2f} | {first_s:.2f} s | {whole_s:.1f} s |")
    low, high = overhead["ratios"][0], overhead["ratios"][-1]
    lines += [
        "",
        f"Throughput a core, Ray over the loop: **{overhead['ratio']:.2f}** ({low:.2f}–{high:.2f}); target ≥ 0.85.",
        "",
        f"Stages at {LARGE[0]} × {LARGE[1][0]} × {LARGE[1][1]}, one process, seconds on the clock:",
        "",
        "| stage | seconds a clip (hash, probe, shots: a video) | × decode |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {seconds:.3f} | {seconds / costs['decode']:.2f} |" for name, seconds in costs.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="said in the results")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--large-clips", type=int, default=3)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    job.Progress = Stamped  # type: ignore[misc]
    import ray

    start = time.perf_counter()
    ray.init(num_cpus=2, object_store_memory=512 << 20, include_dashboard=False, log_to_driver=False)
    ray_start_s = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as name:
        corpus = SyntheticConfig(num_videos=arguments.clips, num_frames=9, size=(128, 128), supersample=1)
        paths = [str(path) for path in write_corpus(Path(name) / "small", corpus)]
        config = PreprocessConfig(output="unset", input=paths, num_frames=9, size=(128, 128), num_workers=2)
        overhead = compare(config, arguments.pairs)
        costs = stage_costs(Path(name), arguments.large_clips)
    facts = {
        "date": datetime.date.today().isoformat(),
        "hardware": arguments.hardware,
        "clips": arguments.clips,
        "clip": "9 × 128 × 128",
        "workers": 2,
        "pairs": arguments.pairs,
        "ray_start_s": ray_start_s,
        "overhead": overhead,
        "stage_s": costs,
    }
    print(markdown(facts))
    if not arguments.no_write:
        (RESULTS / "preprocess.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "preprocess.md").write_text(markdown(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
