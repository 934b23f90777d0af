"""Measure the inputs of the simulation in this folder, and the real runs that it is compared with.

    python benchmarks/scale/scaling.py preprocess     # ten minutes on two idle cores
    python benchmarks/scale/scaling.py train          # ten minutes
    python benchmarks/scale/scaling.py driver clip    # a minute each

Each writes its part of benchmarks/results/scaling.json; `preprocess` and `train` add rounds to the existing ones.
`scaling_curve.py` calibrates on one of the workloads, predicts the others, and draws the curves.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PASSES = {
    "hash": ("identify",),
    "split": ("probe", "shots", "record_video", "first_clips"),
    "pack": ("build_shard",),
}
ALONE_STEPS = 12  # steps of the short runs that measure the cost of a step on one rank
ROUNDS = 2


@dataclass(frozen=True)
class Corpus:
    """A synthetic workload of preprocess."""

    videos: int
    num_frames: int
    size: tuple[int, int]
    clips_per_shot: int
    num_masks: int


CORPORA = {
    "calibration": Corpus(24, 9, (128, 128), 2, 1),
    "long clips": Corpus(20, 25, (96, 96), 1, 2),
    "large clips": Corpus(10, 9, (256, 256), 3, 1),
}
# Number of videos whose stages are measured one by one: all of the calibration, half of the predicted workloads.
MEASURED = {"calibration": 24, "long clips": 10, "large clips": 5}


@dataclass(frozen=True)
class Batch:
    """A workload of training: clips [T, H, W], clips per rank and step, rank of the LoRA, steps."""

    clip: tuple[int, int, int]
    micro: int
    lora_rank: int
    num_steps: int


BATCHES = {
    "calibration": Batch((9, 64, 64), 4, 16, 40),
    "calibration, more weights": Batch((5, 64, 64), 4, 64, 40),  # for the cost of gradients by size
    "larger clips": Batch((9, 96, 96), 6, 16, 40),
    "larger clips, more weights": Batch((9, 96, 96), 6, 48, 40),
}


def timed(cases: Sequence[tuple[Any, ...]], measure: Callable[..., dict[str, float]]) -> list[dict[str, Any]]:
    """Measure each case in turn, and return the results."""
    found = []
    for case in cases:
        found.append({"case": [*case], **measure(*case), "load": os.getloadavg()[0]})
        print({name: round(value, 2) if isinstance(value, float) else value for name, value in found[-1].items()})
    return found


# ---------------------------------------------------------------- preprocess


def write_corpus(folder: Path, chosen: Corpus) -> dict[str, Any]:
    """Write the videos; return the section `preprocess` of runs over them."""
    from ex4d.synthetic import SyntheticConfig, write_corpus

    frames = chosen.num_frames * chosen.clips_per_shot
    write_corpus(folder, SyntheticConfig(num_videos=chosen.videos, num_frames=frames, size=chosen.size, supersample=1))
    clip = {"num_frames": chosen.num_frames, "size": [*chosen.size], "clips_per_shot": chosen.clips_per_shot}
    return {"input": str(folder), **clip, "masks": {"num_masks": chosen.num_masks}, "depth": "sidecar"}


def stage_costs(section: dict[str, Any], count: int) -> list[dict[str, float]]:
    """Return seconds per pass and the number of clips for the first videos, each processed alone in this process."""
    from ex4d import config as config_file
    from pipelines.preprocess import cost
    from pipelines.preprocess import run as preprocess

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"preprocess": section | {"output": "unused"}}, file)
        file.flush()
        config = config_file.load(file.name, preprocess.SECTIONS, (), preprocess.OPTIONAL)["preprocess"]
    videos = cost.spread(preprocess.find_sources(config, None), count)
    cost.measure(config, videos[0])  # compiles
    measured = [cost.measure(config, video) for video in videos]
    return [_by_pass(one.worker_s) | {"clips": one.samples, "mb": one.sample_bytes / 1e6} for one in measured]


def least(rounds: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Return the minimum of each figure of each video, since disturbances only add time."""
    return [{name: min(one[name] for one in same) for name in same[0]} for same in zip(*rounds, strict=True)]


def _by_pass(worker_s: dict[str, float]) -> dict[str, float]:
    found = {name: sum(worker_s.get(stage, 0.0) for stage in stages) for name, stages in PASSES.items()}
    return found | {"clip": sum(worker_s.values()) - sum(found.values())}


def run_preprocess(section: dict[str, Any], videos: int, workers: int) -> dict[str, float]:
    """Return seconds of a run of the command on the first `videos` videos: wall time, and time in each pass."""
    paths = sorted(str(path) for path in Path(section["input"]).glob("*.mp4"))[:videos]
    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as folder:
        chosen = section | {"input": paths, "output": f"{folder}/out", "num_workers": workers}
        wall_s = _command(folder, "preprocess", {"preprocess": chosen, "ray": {"object_store_mb": 200}})
        line = json.loads((Path(folder) / "out" / "run.jsonl").read_text().splitlines()[-1])
    assert line["committed"], line
    stages = {name: stage["worker_s"] for name, stage in line["stages"].items()}
    return {"wall": wall_s, **_by_pass(stages)}


def _command(folder: str, job: str, sections: dict[str, Any]) -> float:
    """Return the duration of `ex4d JOB`."""
    path = Path(folder) / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0", "RAY_TMPDIR": "/tmp"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", job, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return time.monotonic() - started


def preprocess() -> dict[str, Any]:
    """Measure the stages of all corpora, and runs with one and two workers; for `calibration` also shorter ones.

    Every round measures both, because the load on a shared machine changes within minutes.
    """
    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as folder:
        sections = {name: write_corpus(Path(folder) / name, chosen) for name, chosen in CORPORA.items()}
        few = ("calibration", CORPORA["calibration"].videos // 3)
        whole = [few, *((name, chosen.videos) for name, chosen in CORPORA.items())]
        cases = [(*case, workers) for case in whole for workers in (1, 2)]
        costs, runs = [], []
        for _ in range(ROUNDS):
            costs.append({name: stage_costs(section, MEASURED[name]) for name, section in sections.items()})
            runs += timed(cases, lambda name, videos, workers: run_preprocess(sections[name], videos, workers))
    return {"costs": {name: least([one[name] for one in costs]) for name in CORPORA}, "runs": runs}


# ---------------------------------------------------------------- training


def run_training(folder: Path, chosen: Batch, num_steps: int, ranks: int) -> dict[str, float]:
    """Return seconds of a run of the command: wall time, per step, and per step without communication."""
    from ex4d.train import runlog

    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as output:
        model = {"base": "tiny", "lora_rank": chosen.lora_rank, "adapter_hidden": 64}
        section = {
            "data": str(folder / "dataset"),
            "output": f"{output}/run",
            "device": "cpu",
            "wandb_mode": "disabled",
        }
        section |= {"num_steps": num_steps, "micro_batch_size": chosen.micro, "num_processes": ranks}
        wall_s = _command(output, "train", {"model": model, "train": section})
        steps = [line["step_s"] for line in runlog.read(Path(output) / "run" / "metrics.jsonl")][2:]
        size = sum(path.stat().st_size for path in (Path(output) / "run" / "adapter").glob("*.safetensors"))
    computing = [step["total"] - step["communication"] for step in steps]
    figures = {"step": [step["total"] for step in steps], "computing": computing}
    # The first decile, since disturbances by other load on the machine only add time.
    deciles = {name: statistics.quantiles(values, n=10)[0] for name, values in figures.items()}
    return {"wall": wall_s, **deciles, "adapter_mb": size / 1e6}


def step_costs(folder: Path, chosen: Batch) -> dict[str, float]:
    """Return the cost of a step on one rank in short runs: alone, and beside another run on the second core."""
    with ThreadPoolExecutor(2) as pool:
        alone = run_training(folder, chosen, ALONE_STEPS, 1)
        beside = pool.map(lambda _: run_training(folder, chosen, ALONE_STEPS, 1), range(2))
        return {
            "alone_s": alone["step"],
            "beside_s": statistics.fmean(run["step"] for run in beside),
            "adapter_mb": alone["adapter_mb"],
        }


def training() -> dict[str, Any]:
    """Measure the cost of a step in short runs, and the steps of runs with one and two ranks."""
    sys.path.insert(0, str(ROOT / "tests" / "train"))
    import make_run

    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as name:
        folders = {key: Path(name) / key for key in BATCHES}
        for key, folder in folders.items():
            make_run.make_dataset(folder, 24, 2, BATCHES[key].clip[0], BATCHES[key].clip[1:])
        cases = [(key, one.num_steps, ranks) for key, one in BATCHES.items() for ranks in (1, 2)]
        costs, runs = [], []
        for _ in range(ROUNDS):
            costs += timed([(key,) for key in BATCHES], lambda key: step_costs(folders[key], BATCHES[key]))
            runs += timed(cases, lambda key, steps, ranks: run_training(folders[key], BATCHES[key], steps, ranks))
    return {"costs": costs, "runs": runs}


# ---------------------------------------------------------------- further inputs of the curve


def driver(videos: int = 4000) -> dict[str, float]:
    """Return the driver's CPU seconds per video with stages that do nothing: during the stream, and after it."""
    from ex4d.errors import Filtered
    from pipelines.inputs import Source, Sources
    from pipelines.preprocess import run as preprocess
    from pipelines.preprocess.job import Job
    from pipelines.preprocess.recipe import Stages
    from pipelines.preprocess.settings import PreprocessConfig

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    info = {"size": [720, 1280], "duration_s": 12.0, "time_base": [1, 12800], "fps": 25.0, "codec": "h264"}
    shots = [{"box": [0, 0, 720, 1280], "bars": 0.0, "logo": 0.0}] * 2
    plain_file = {"size_bytes": 5_000_000, "fetched": None, "depth_file": "", "depth_place": "", "pair": None}
    known = {
        "identify": lambda row: plain_file | {"sha256": digest(row["path"]), "caption": "a person walks along " * 6},
        "probe": lambda row: {"info": info},
        "shots": lambda row: (
            {"pts_runs": [0, [512, 299]], "cuts": [150], "shots": shots}
            | {"hashes": [digest(f"{row['path']} {part}")[:16] for part in range(8)]}
        ),
    }

    def refuse(row: dict[str, Any], config: Any) -> dict[str, Any]:
        raise Filtered("motion", 0.0, 1.0)

    def quick(stage: Any) -> Any:
        made = known.get(stage.name)
        return stage if made is None else replace(stage, function=lambda row, config, made=made: made(row))

    plain = Stages()
    stages = replace(
        plain,
        hash=tuple(map(quick, plain.hash)),
        find_shots=tuple(
            quick(stage) if stage.name != "shots" else quick(replace(stage, reads=("path",)))
            for stage in plain.find_shots
        ),
        clip=(replace(plain.clip[0], function=refuse), *plain.clip[1:]),
    )
    sources = Sources([Source(f"/nowhere/{number}.mp4", f"{number}.mp4") for number in range(videos)])
    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as folder:
        config = PreprocessConfig(
            output=folder, input=[folder], depth="sidecar", clips_per_shot=1, max_bad_fraction=1.0
        )
        spent = {"_stream": 0.0}
        streaming = Job._stream

        def timed_stream(*args: Any) -> None:
            started = time.process_time()
            streaming(*args)
            spent["_stream"] = time.process_time() - started

        Job._stream = timed_stream  # type: ignore[method-assign]
        started = time.process_time()
        result = preprocess.run(config, runner_name="inline", stages=stages, sources=sources)
        whole = time.process_time() - started
        Job._stream = streaming  # type: ignore[method-assign]
    worked = sum(tally.worker_s for name, tally in result.stages.items() if name not in ("plan", "build_shard"))
    each = {"stream": (spent["_stream"] - worked) / videos, "plan": (whole - spent["_stream"]) / videos}
    found = {f"{name}_cpu_s_per_video": seconds for name, seconds in each.items()}
    return {"videos": videos, **found, "s_per_task": 1.0 / tasks_per_s()}


def tasks_per_s(count: int = 3000) -> float:
    """Return tasks of one row per second through Ray, with two workers that do nothing: the driver's submit rate."""
    import ray
    import stream as bench

    from pipelines.runtime import backlog

    backlog.TASK_S = 0.0  # one row per task
    ray.init(address="local", num_cpus=2, object_store_memory=300 << 20, include_dashboard=False, log_to_driver=False)
    bench.rate(200, 2)
    found = bench.rate(count, 2)
    ray.shutdown()
    return found["rows_per_s"]


def clip() -> dict[str, Any]:
    """Return the cost of clips of 49 × 512 × 512 with depth beside the video."""
    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as folder:
        section = write_corpus(Path(folder) / "large", Corpus(3, 49, (512, 512), 1, 4))
        return {"costs": least([stage_costs(section, 3) for _ in range(ROUNDS)])}


def main() -> None:
    """Measure the parts named on the command line, and add them to the results."""
    parts: dict[str, Callable[[], dict[str, Any]]]
    parts = {"preprocess": preprocess, "train": training, "driver": driver, "clip": clip}
    for name in sys.argv[1:] or parts:
        found = parts[name]() | {"date": time.strftime("%Y-%m-%d")}
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if "runs" in found:
            found["runs"] = results.get(name, {}).get("runs", []) + found["runs"]
        RESULTS.write_text(json.dumps(results | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
