"""`ex4d plan`: estimate the cost of a preprocess run from a few of its videos.

A sample of the corpus, spread over its file sizes, runs through the real stages, with as many videos in parallel as
there are workers. The means are scaled to the whole corpus and the specified cluster. The errors of earlier plans on
this machine are reported beside the new figures.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import config as config_file
from ex4d import storage
from ex4d.config import checked, setting
from ex4d.errors import ConfigError
from ex4d.synthetic import SyntheticConfig
from pipelines.inputs import Source, Sources
from pipelines.preprocess import cost_history, fetch, file_cache
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.clips import middles
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.runtime.stage import quiet_threads

FILE = "plan.json"
# Fraction of a worker's time on Ray that is spent in stages: benchmarks/results/preprocess.md.
EFFICIENCY = 0.9
RAY_START_S = 10.0
MOST_ASKED = 300  # maximum number of remote videos whose size is requested
_warm: list[bool] = []  # not empty once a measuring process has warmed up


@dataclass(frozen=True)
class PlanConfig:
    """The settings of `ex4d plan`: what to measure, and for which corpus and cluster."""

    sample_videos: int = setting(8, "Videos to measure.", ge=1)
    num_videos: int | None = setting(
        None, "Videos of the corpus to plan for; null: as many as preprocess.input holds.", ge=1
    )
    num_cpus: int | None = setting(None, "CPUs of the cluster; null: preprocess.num_workers.", ge=1)
    num_gpus: int = setting(0, "GPUs of the cluster.", ge=0)
    usd_per_cpu_hour: float | None = setting(None, "Price of a CPU; null: no cost is printed.", ge=0)
    usd_per_gpu_hour: float | None = setting(None, "Price of a GPU; null: no cost is printed.", ge=0)

    def __post_init__(self) -> None:
        checked(self, "plan")


SECTIONS = {**preprocess.SECTIONS, "plan": PlanConfig}
OPTIONAL = preprocess.OPTIONAL


@dataclass(frozen=True)
class Measured:
    """Measurements of one video: the time of each stage, and the output.

    Args:
        worker_s: {stage: wall-clock seconds}.
        cpu_s, gpu_s: these times multiplied by the CPUs or GPUs that each stage reserves, summed.
        samples, sample_bytes: number and total size of the samples made. video_s: length of the video.
    """

    worker_s: dict[str, float]
    cpu_s: float
    gpu_s: float
    samples: int
    sample_bytes: int
    video_s: float


@dataclass(frozen=True)
class Mean:
    """A mean over the sample's videos, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.1g}"


@dataclass(frozen=True)
class Plan:
    """What `preprocess.run` on the whole corpus is expected to need. A Mean is per video, other figures are totals.

    Args:
        stage_s: {stage: worker seconds per video}.
        cpu_s, gpu_s: seconds of reserved CPU and GPU per video.
        wall_h: hours on the specified cluster. cpu_h, gpu_h, usd: totals.
        gpu_actors: number of GPU actors that keep pace with the CPUs.
        disk_gb: staging and shards together. samples, shards: their numbers.
    """

    num_videos: int
    sample_videos: int
    video_h: float
    stage_s: dict[str, Mean]
    cpu_s: Mean
    gpu_s: Mean
    samples: int
    disk_gb: float
    shards: int
    cpu_h: float
    gpu_h: float
    wall_h: float
    num_cpus: int
    num_gpus: int
    gpu_actors: int
    usd: float | None

    def table(self) -> str:
        """Return the plan as text."""
        from rich.console import Console
        from rich.table import Table

        text = io.StringIO()
        console = Console(file=text, width=100, markup=False)
        table = Table("stage", "seconds a video", "share", title=f"measured on {self.sample_videos} videos")
        whole = sum(mean.value for mean in self.stage_s.values()) or 1.0
        for name, mean in self.stage_s.items():
            table.add_row(name, str(mean), f"{mean.value / whole:.0%}")
        console.print(table)
        spread = self.cpu_s.error / self.cpu_s.value if self.cpu_s.value else 0.0
        lines = [
            f"corpus: {self.num_videos} videos, {self.video_h:.3g} h; {self.samples} samples expected",
            f"work: {self.cpu_h:.3g} CPU-h ± {spread:.0%}, {self.gpu_h:.3g} GPU-h",
            f"wall: {_duration(self.wall_h)} on {self.num_cpus} CPUs and {self.num_gpus} GPUs"
            + (f", {self.gpu_actors} GPU actors keep pace" if self.gpu_actors else ""),
            f"disk: {self.disk_gb:.3g} GB, {self.shards} shards",
        ]
        if self.usd is not None:
            lines.append(f"cost: {self.usd:.2f} USD")
        for line in lines:
            console.print(line, highlight=False)
        return text.getvalue().rstrip()


def command(config_path: str, overrides: Sequence[str]) -> int:
    """Run `ex4d plan`; return the exit status."""
    estimate, earlier = write(config_file.load(config_path, SECTIONS, overrides, OPTIONAL))
    print(estimate.table(), cost_history.judgement(earlier), sep="\n")
    return 0


def write(sections: dict[str, Any]) -> tuple[Plan, list[float]]:
    """Make the plan of a configuration and write it to OUTPUT/plan.json; return it and the errors of earlier plans."""
    config, choice = sections["preprocess"], sections["plan"]
    plan, earlier = make(config, choice, sections["synthetic"]), cost_history.earlier_errors()
    storage.write_bytes(storage.join(config.output, FILE), json.dumps(asdict(plan), indent=2).encode())
    cost_history.remember(config.output, plan.cpu_s.value)
    return plan, earlier


def make(config: PreprocessConfig, choice: PlanConfig, synthetic: SyntheticConfig | None) -> Plan:
    """Run a sample of the corpus through the stages and return the plan."""
    sources = preprocess.find_sources(config, synthetic)
    config = preprocess.with_depth(config, sources)
    if not sources.num_videos:
        raise ConfigError("preprocess.input", config.input, "must hold at least one file that may be a video")
    with fetch.reach(config):
        chosen = spread(sources, choice.sample_videos)
    return scale(measured(config, chosen), sources.num_videos, config, choice)


def measured(config: PreprocessConfig, chosen: Sequence[Source]) -> list[Measured]:
    """Measure videos, as many in parallel as this machine would process, since processes slow each other down.

    Each process first measures one video to warm up: compiling and starting the decoder cost once per worker.
    """
    uses_gpu = any(stage.num_gpus for stage in preprocess.stages_of(config).clip)
    count = 1 if uses_gpu else min(config.num_workers, os.cpu_count() or 1, len(chosen))
    is_set = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray does for workers with one CPU
    try:
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            return list(pool.map(_measure_warm, repeat(config), repeat(chosen[0]), chosen))
    finally:
        if not is_set:
            del os.environ["OMP_NUM_THREADS"]


def _measure_warm(config: PreprocessConfig, first: Source, source: Source) -> Measured:
    quiet_threads()
    if not _warm:
        measure(config, first)
        _warm.append(True)
    return measure(config, source)


def spread(sources: Iterable[Source], count: int) -> list[Source]:
    """Return `count` videos: the middle ones of equal groups by file size, so that long videos are represented.

    A store may need a request per size. If some videos are remote, only MOST_ASKED, evenly spread, are considered.

    Args:
        sources: sorted by name; iterated over three times.
    """
    asked: Sequence[int] = range(sum(1 for _ in _videos(sources)))
    if not all(storage.is_local(video.path) for video in _videos(sources)):
        asked = middles(asked, MOST_ASKED)
    sizes = np.fromiter(
        (file_cache.size_or_0(video.path) for _, video in _chosen(sources, asked)), np.int64, len(asked)
    )
    numbers = [asked[index] for index in middles(np.argsort(sizes, kind="stable").tolist(), count)]
    found = dict(_chosen(sources, numbers))
    return [found[number] for number in numbers]


def _videos(sources: Iterable[Source]) -> Iterator[Source]:
    return (source for source in sources if source.is_video)


def _chosen(sources: Iterable[Source], numbers: Sequence[int]) -> Iterator[tuple[int, Source]]:
    wanted = numbers if isinstance(numbers, range) else frozenset(numbers)
    return ((number, video) for number, video in enumerate(_videos(sources)) if number in wanted)


def measure(config: PreprocessConfig, source: Source) -> Measured:
    """Measure one video, from an empty folder to its staged samples."""
    with tempfile.TemporaryDirectory(prefix="ex4d-plan-") as folder:
        alone = replace(config, output=folder, max_bad_fraction=1.0, metrics_port=None, keep_staging="all")
        result = preprocess.run(alone, runner_name="inline", sources=Sources([source]))
        samples = [path.stat().st_size for path in (Path(folder) / "staging" / "clips").glob("*.tar")]
    tallies = result.stages
    return Measured(
        worker_s={name: tally.worker_s for name, tally in tallies.items()},
        cpu_s=sum(tally.worker_s * tally.num_cpus for tally in tallies.values()),
        gpu_s=sum(tally.worker_s * tally.num_gpus for tally in tallies.values()),
        samples=len(samples),
        sample_bytes=sum(samples),
        video_s=tallies["shots"].video_s,
    )


def scale(sample: Sequence[Measured], corpus: int, config: PreprocessConfig, choice: PlanConfig) -> Plan:
    """Return the plan for a corpus, scaled from the measurements of a sample of it.

    Stages overlap, so the wall time is determined by the scarcer of CPUs and GPUs.
    """
    num_videos = choice.num_videos or corpus
    num_cpus = choice.num_cpus or config.num_workers

    def mean(values: Sequence[float]) -> Mean:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        rest = max(0.0, 1 - len(values) / num_videos)  # measured videos need no estimate (finite population correction)
        return Mean(statistics.fmean(values), deviation * math.sqrt(rest / len(values)))

    cpu_s, gpu_s = mean([one.cpu_s for one in sample]), mean([one.gpu_s for one in sample])
    share = max(stage.num_gpus for stage in preprocess.stages_of(config).clip)  # of depth, captioner or scorer
    if gpu_s.value and not choice.num_gpus:
        raise ConfigError("plan.num_gpus", choice.num_gpus, "must be at least 1, since a stage reserves a GPU")
    cpu_wall_s = num_videos * cpu_s.value / num_cpus
    gpu_wall_s = num_videos * gpu_s.value / choice.num_gpus if gpu_s.value else 0.0
    in_bytes = num_videos * statistics.fmean(one.sample_bytes for one in sample)
    cpu_h, gpu_h = (num_videos * part.value / 3600 for part in (cpu_s, gpu_s))
    prices = (choice.usd_per_cpu_hour if cpu_h else 0.0, choice.usd_per_gpu_hour if gpu_h else 0.0)
    return Plan(
        num_videos=num_videos,
        sample_videos=len(sample),
        video_h=num_videos * statistics.fmean(one.video_s for one in sample) / 3600,
        stage_s={
            name: mean([one.worker_s.get(name, 0.0) for one in sample])
            for name in {name: 0 for one in sample for name in one.worker_s}
        },
        cpu_s=cpu_s,
        gpu_s=gpu_s,
        samples=round(num_videos * statistics.fmean(one.samples for one in sample)),
        disk_gb=(1.1 if config.keep_staging == "none" else 2) * in_bytes / 1e9,
        shards=math.ceil(in_bytes / (config.shard_size_mb << 20)),
        cpu_h=cpu_h,
        gpu_h=gpu_h,
        wall_h=(RAY_START_S + max(cpu_wall_s, gpu_wall_s) / EFFICIENCY) / 3600,
        num_cpus=num_cpus,
        num_gpus=choice.num_gpus,
        gpu_actors=math.ceil(gpu_s.value / share / (cpu_s.value / num_cpus)) if gpu_s.value else 0,
        usd=None if prices[0] is None or prices[1] is None else cpu_h * prices[0] + gpu_h * prices[1],
    )


def _duration(hours: float) -> str:
    seconds = round(hours * 3600)
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if hours < 2 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
