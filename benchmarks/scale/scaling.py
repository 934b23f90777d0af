"""Calibrate the simulation beside this on one workload, and compare it with real runs of others.

    python benchmarks/scale/scaling.py preprocess     # twelve minutes on two cores that do nothing else
    python benchmarks/scale/scaling.py train          # eight minutes
    python benchmarks/scale/scaling.py driver         # one minute
    python benchmarks/scale/scaling.py clip           # one minute: the cost of a clip of 49 × 512 × 512

Each writes its part of benchmarks/results/scaling.json. Of a workload that is predicted, only the cost of its stages is
measured, in one process and on some of its videos (as `ex4d plan` does), or the cost of one rank's step. What Ray, the
driver, a second worker and a second rank add comes from the workload `calibration` alone. `scaling_curve.py` draws.
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from simulate import Cluster, Overhead, Pass, Preprocess, Step, Training, train

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PASSES = {"hash": ("identify",), "split": ("probe", "shots", "record_video"), "pack": ("build_shard",)}
ROWS_PER_VIDEO = 2  # of the passes hash and split
ROUNDS = 2


@dataclass(frozen=True)
class Corpus:
    """A made workload of preprocess."""

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


@dataclass(frozen=True)
class Batch:
    """A workload of training: clips [T, H, W], clips of a rank in a step, rank of the LoRA, steps."""

    clip: tuple[int, int, int]
    micro: int
    lora_rank: int
    num_steps: int


BATCHES = {
    "calibration": Batch((9, 64, 64), 4, 16, 60),
    "larger clips": Batch((9, 96, 96), 6, 16, 40),
    "more weights": Batch((5, 64, 64), 4, 64, 60),
}


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return (slope, intercept) of the line through two points."""
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return slope, y[0] - slope * x[0]


def several(cases: Sequence[Any], measure: Callable[[Any], dict[str, float]]) -> dict[Any, dict[str, float]]:
    """Return {case: the least of each figure}, after ROUNDS rounds over the cases: what disturbs only adds."""
    found: dict[Any, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case in cases:
            found[case].append(measure(case))
            print(case, {name: round(value, 2) for name, value in found[case][-1].items()}, flush=True)
    return {case: {name: min(one[name] for one in rounds) for name in rounds[0]} for case, rounds in found.items()}


# ---------------------------------------------------------------- preprocess


def write_corpus(folder: Path, chosen: Corpus) -> dict[str, Any]:
    """Write the videos; return the section `preprocess` of runs over them."""
    from ex4d.synthetic import SyntheticConfig, write_corpus

    frames = chosen.num_frames * chosen.clips_per_shot
    write_corpus(folder, SyntheticConfig(num_videos=chosen.videos, num_frames=frames, size=chosen.size, supersample=1))
    clip = {"num_frames": chosen.num_frames, "size": [*chosen.size], "clips_per_shot": chosen.clips_per_shot}
    return {"input": str(folder), **clip, "masks": {"num_masks": chosen.num_masks}, "depth": "sidecar"}


def stage_costs(section: dict[str, Any], count: int = 6) -> list[dict[str, float]]:
    """Return seconds in each pass, and the number of clips, of some of the videos, each run alone in this process."""
    from ex4d import config as config_file
    from pipelines.preprocess import cost
    from pipelines.preprocess import run as preprocess

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump({"preprocess": section | {"output": "unused"}}, file)
        file.flush()
        config = config_file.load(file.name, preprocess.SECTIONS, (), preprocess.OPTIONAL)["preprocess"]
    videos = cost.spread(preprocess.find_sources(config, None), count)
    cost.measure(config, videos[0])  # compiles

    def measure(number: int) -> dict[str, float]:
        one = cost.measure(config, videos[number])
        return _by_pass(one.worker_s) | {"clips": one.samples, "mb": one.sample_bytes / 1e6}

    return list(several(range(len(videos)), measure).values())


def _by_pass(worker_s: dict[str, float]) -> dict[str, float]:
    found = {name: sum(worker_s.get(stage, 0.0) for stage in stages) for name, stages in PASSES.items()}
    return found | {"clip": sum(worker_s.values()) - sum(found.values())}


def run_preprocess(section: dict[str, Any], videos: int, workers: int) -> dict[str, float]:
    """Return seconds of a run of the command on the first so many videos: on the clock, and in each pass of stages."""
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


def passes(costs: Sequence[dict[str, float]], videos: int, found: dict[str, Any]) -> list[Pass]:
    """Return the passes of a run over so many videos that cost what some of them were measured to."""
    of_videos = [costs[index % len(costs)] for index in range(videos)]
    rows = {name: [(Step("cpu", one[name] * found["in_ray"]),) for one in of_videos] for name in ("hash", "split")}
    rows["clip"] = [
        (Step("cpu", one["clip"] / one["clips"] * found["in_ray"]),)
        for one in of_videos
        for _ in range(int(one["clips"]))
    ]
    rows["pack"] = [(Step("cpu", sum(one["pack"] for one in of_videos) * found["in_ray"]),)]
    return [Pass(rows[name], found["warm_s"].get(name, 0.0)) for name in ("hash", "split", "clip", "pack")]


def predict(costs: Sequence[dict[str, float]], videos: int, workers: int, found: dict[str, Any]) -> float:
    """Return the simulated duration of a run."""
    cluster = Cluster(nodes=1, cpus=workers, busy=found["busy"])
    overhead = Overhead(start_s=found["start_s"], row_s=found["row_s"])
    return Preprocess(cluster, overhead).run(passes(costs, videos, found)).wall_s


def calibrate(costs: Sequence[dict[str, float]], runs: dict[tuple[int, int], dict[str, float]]) -> dict[str, Any]:
    """Return what Ray and a second worker add, from runs of two lengths, {(videos, workers): seconds}."""
    few, many = sorted({videos for videos, _ in runs})
    lines = {
        (name, workers): fit((few, many), [runs[videos, workers][name] for videos in (few, many)])
        for name in ("hash", "split", "clip")
        for workers in (1, 2)
    }
    mean = {name: statistics.fmean(one[name] for one in costs) for name in ("hash", "split", "clip")}
    beside = [
        runs[videos, 1]["wall"] - sum(runs[videos, 1][name] for name in (*mean, "pack")) for videos in (few, many)
    ]
    row_s, start_s = fit((few, many), beside)
    clips = statistics.fmean(one["clips"] for one in costs)
    return {
        "start_s": start_s,
        "row_s": max(0.0, row_s / (ROWS_PER_VIDEO + clips)),
        "in_ray": lines["clip", 1][0] / mean["clip"],
        "busy": lines["clip", 2][0] / lines["clip", 1][0],
        "warm_s": {name: max(0.0, lines[name, 1][1]) for name in mean},
    }


def preprocess() -> dict[str, Any]:
    """Calibrate on one corpus, predict the others with one and two workers, and measure them."""
    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as folder:
        sections = {name: write_corpus(Path(folder) / name, chosen) for name, chosen in CORPORA.items()}
        costs = {name: stage_costs(section) for name, section in sections.items()}
        whole, few = CORPORA["calibration"].videos, CORPORA["calibration"].videos // 3
        known = [("calibration", videos, workers) for videos in (few, whole) for workers in (1, 2)]
        others = [(name, chosen.videos, workers) for name, chosen in CORPORA.items() for workers in (1, 2)][2:]
        runs = several([*known, *others], lambda case: run_preprocess(sections[case[0]], *case[1:]))
    found = calibrate(costs["calibration"], {case[1:]: runs[case] for case in known})
    rows = [
        _compared(*case[::2], predict(costs[case[0]], *case[1:], found), runs[case]["wall"])
        for case in [*known, *others]
    ]
    return {
        "calibration": found,
        "costs": costs,
        "corpora": {k: asdict(v) for k, v in CORPORA.items()},
        "compared": rows,
    }


def _compared(name: str, workers: int, simulated_s: float, measured_s: float) -> dict[str, Any]:
    row = {"workload": name, "workers": workers, "simulated_s": simulated_s, "measured_s": measured_s}
    print(row | {"off": f"{simulated_s / measured_s - 1:+.1%}"}, flush=True)
    return row | {"off": simulated_s / measured_s - 1, "is_prediction": name != "calibration"}


# ---------------------------------------------------------------- training


def run_training(folder: Path, chosen: Batch, num_steps: int, ranks: int) -> dict[str, float]:
    """Return seconds of a run of the command: on the clock, a step, and of it what is not communication."""
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
    total = statistics.median(step["total"] for step in steps)
    alone = statistics.median(step["total"] - step.get("communication", 0.0) for step in steps)
    return {"wall": wall_s, "step": total, "computing": alone, "adapter_mb": size / 1e6}


def reduce_mb_s() -> float:
    """Return the all-reduce between two processes of this machine in MB/s, as `ex4d doctor --cluster` measures it."""
    code = (
        "import sys; from pipelines.commands.node_pairs import all_reduce; "
        "print(all_reduce('127.0.0.1', int(sys.argv[1]), int(sys.argv[2]), 2, False)[0])"
    )
    words = [sys.executable, "-c", code, "29871"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([*words, str(rank)], env=environment, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    return min(float(process.communicate()[0]) for process in both) * 1e9 / 8 / 1e6  # 2 (n − 1) / n is in it


def training() -> dict[str, Any]:
    """Calibrate on one workload, predict the others with one and two ranks, and measure them."""
    sys.path.insert(0, str(ROOT / "tests" / "train"))
    import make_run

    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as name:
        folders = {name_: Path(name) / name_ for name_ in BATCHES}
        for key, folder in folders.items():
            make_run.make_dataset(folder, 24, 2, BATCHES[key].clip[0], BATCHES[key].clip[1:])
        chosen = BATCHES["calibration"]
        known = [
            ("calibration", steps, ranks) for steps in (chosen.num_steps // 4, chosen.num_steps) for ranks in (1, 2)
        ]
        others = [(key, one.num_steps, ranks) for key, one in BATCHES.items() for ranks in (1, 2)][2:]
        short = [(key, 12, 1) for key in list(BATCHES)[1:]]  # what a step costs one rank: all that is known of these

        def measure(case: tuple[str, int, int]) -> dict[str, float]:
            return run_training(folders[case[0]], BATCHES[case[0]], *case[1:])

        runs = several([*known, *short, *others], measure)
    steps = (known[0][1], known[-1][1])
    lines = {ranks: fit(steps, [runs["calibration", count, ranks]["wall"] for count in steps]) for ranks in (1, 2)}
    of_step = {ranks: runs["calibration", steps[1], ranks] for ranks in (1, 2)}
    speed, busy = reduce_mb_s(), of_step[2]["computing"] / of_step[1]["computing"]
    more_s = lines[2][0] - busy * lines[1][0] - of_step[1]["adapter_mb"] / speed
    found = {
        "start_s": {str(ranks): line[1] for ranks, line in lines.items()},
        "busy": busy,
        "beside_s": lines[1][0] - of_step[1]["step"],
        "reduce_mb_s": speed,
        "latency_s": max(0.0, more_s / 2),
    }
    alone = {"calibration": of_step[1], **{key: runs[key, count, ranks] for key, count, ranks in short}}
    rows = []
    for key, count, ranks in [*known, *others]:
        cost = alone[key]["step"] + found["beside_s"]
        run = Training(
            count,
            cost,
            start_s=found["start_s"][str(ranks)],
            gradient_mb=alone[key]["adapter_mb"],
            reduce_mb_s=speed,
            latency_s=found["latency_s"],
        )
        simulated = train(run, Cluster(cpus=ranks, busy=busy)).wall_s
        rows.append(_compared(key, ranks, simulated, runs[key, count, ranks]["wall"]))
    return {
        "calibration": found,
        "alone": alone,
        "batches": {k: asdict(v) for k, v in BATCHES.items()},
        "compared": rows,
    }


# ---------------------------------------------------------------- what the curve needs beside


def driver(videos: int = 4000) -> dict[str, float]:
    """Return the driver's CPU seconds for a video (plan, ledger, counts), with stages that do nothing."""
    from ex4d.errors import Filtered
    from pipelines.inputs import Source
    from pipelines.preprocess import run as preprocess
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
        split=tuple(
            quick(stage) if stage.name != "shots" else quick(replace(stage, reads=("path",))) for stage in plain.split
        ),
        clip=(replace(plain.clip[0], function=refuse), *plain.clip[1:]),
    )
    sources = [Source(f"/nowhere/{number}.mp4", f"{number}.mp4") for number in range(videos)]
    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as folder:
        config = PreprocessConfig(
            output=folder, input=[folder], depth="sidecar", clips_per_shot=1, max_bad_fraction=1.0
        )
        started = time.process_time()
        result = preprocess.run(config, runner_name="inline", stages=stages, sources=sources)
        spent = time.process_time() - started - sum(tally.worker_s for tally in result.stages.values())
    return {"videos": videos, "clips": result.counts["clips_planned"], "cpu_s_per_video": spent / videos}


def clip() -> dict[str, Any]:
    """Return the cost of clips of 49 × 512 × 512 with depth beside the video."""
    with tempfile.TemporaryDirectory(prefix="ex4d-scale-") as folder:
        section = write_corpus(Path(folder) / "large", Corpus(3, 49, (512, 512), 1, 4))
        return {"costs": stage_costs(section, 3)}


def main() -> None:
    """Do one part, and put it into the results."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "preprocess": preprocess, "train": training, "driver": driver, "clip": clip,
    }  # fmt: skip
    for name in sys.argv[1:] or parts:
        found = parts[name]() | {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg()[1]}
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(results | {name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
