"""Calibrate the simulation on one workload, predict the others, and draw its prediction for 1 to 64 nodes.

    python benchmarks/scale/scaling_curve.py [compare]

Reads benchmarks/results/scaling.json, which `scaling.py` writes. The overhead of Ray, the driver, a second worker and a
second rank comes from the workload `calibration` alone. For a predicted workload, only the cost of its stages on some
of its videos is used, or that of one rank's step in short runs, alone and beside another such run. Writes
benchmarks/results/scaling.md and docs/images/scaling.svg.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simulate import Cluster, Outcome, Overhead, Pass, Preprocess, Row, Step
from simulate_training import Training, train

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
PICTURE = ROOT / "docs" / "images" / "scaling.svg"
NODES = (1, 4, 16, 64)
WARM = ("split", "clip")  # passes whose workers load libraries and start a decoding child
Costs = Sequence[dict[str, float]]


def best(runs: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, float]]:
    """Return {(workload, length, workers): minimum of each figure over the runs}, since disturbances only add time."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for run in runs:
        case = tuple(run["case"])
        known = found.setdefault(case, {})
        for name in run.keys() - {"case", "load"}:
            known[name] = min(run[name], known.get(name, math.inf))
    return found


def fit(points: dict[int, float]) -> tuple[float, float]:
    """Return (slope, intercept) of the line through two points."""
    (x0, y0), (x1, y1) = sorted(points.items())
    slope = (y1 - y0) / (x1 - x0)
    return slope, y0 - slope * x0


def mean(costs: Costs, name: str) -> float:
    """Return the mean of a figure over the measured videos."""
    return statistics.fmean(one[name] for one in costs)


# ---------------------------------------------------------------- preprocess


@dataclass(frozen=True)
class OnRay:
    """Costs that Ray adds to the stages, from the calibration.

    Args:
        overhead: of start and end. in_ray: time of a stage in a worker, relative to a single process.
        busy: time of a stage with two workers, relative to one. warm_s: {pass: extra time of a worker's first task}.
    """

    overhead: Overhead
    in_ray: float
    busy: float
    warm_s: dict[str, float]


def on_ray(costs: Costs, runs: dict[tuple[Any, ...], dict[str, float]]) -> OnRay:
    """Return the calibration of preprocess, from runs of two lengths with one and two workers."""
    known = {case[1:]: run for case, run in runs.items() if case[0] == "calibration"}
    slopes = {workers: fit({n: run["clip"] for (n, w), run in known.items() if w == workers})[0] for workers in (1, 2)}
    in_ray, busy = slopes[1] / mean(costs, "clip"), slopes[2] / slopes[1]
    warm_s = {
        name: statistics.fmean(
            max(0.0, run[name] - n * mean(costs, name) * in_ray * (busy if w == 2 else 1.0)) / w
            for (n, w), run in known.items()
        )
        for name in WARM
    }
    beside = {
        n: run["wall"] - sum(run[k] for k in ("hash", "split", "clip", "pack"))
        for (n, w), run in known.items()
        if w == 1
    }
    row_s, start_s = fit(beside)
    return OnRay(Overhead(start_s, row_s=max(0.0, row_s / (2 + mean(costs, "clips")))), in_ray, busy, warm_s)


def passes(costs: Costs, videos: int, found: OnRay, mb: float = 0.0, plan_s: float = 0.0) -> list[Pass]:
    """Return the passes over `videos` videos, with costs taken from the measured ones.

    Args:
        mb: size of a video, which is read once. plan_s: the driver's work per video once all videos are known.
    """
    of_videos = [costs[index % len(costs)] for index in range(videos)]

    def step(seconds: float, mb: float = 0.0) -> tuple[Step]:
        return (Step("cpu", seconds * found.in_ray, mb),)

    def row(one: dict[str, float]) -> Row:
        clips = [Row(step(one["clip"] / one["clips"], one["mb"] * bool(mb)))] * int(one["clips"])
        return Row(step(one["hash"], mb), [Row(step(one["split"]), clips)])

    shards = max(1, round(sum(one["mb"] for one in of_videos) / 1024))
    packed = [Row((Step("cpu", sum(one["pack"] for one in of_videos) / shards, 2 * 1024.0 * bool(mb)),))] * shards
    warm_s = (0.0, found.warm_s["split"], found.warm_s["clip"])
    return [Pass([row(one) for one in of_videos], warm_s), Pass(packed, plan_s=plan_s * videos)]


def compare_preprocess(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return simulated and measured durations of all preprocess runs."""
    costs, runs = results["costs"], best(results["runs"])
    found = on_ray(costs["calibration"], runs)
    rows = []
    for (name, videos, workers), run in runs.items():
        cluster = Cluster(cpus=workers, busy=found.busy)
        simulated = Preprocess(cluster, found.overhead).run(passes(costs[name], videos, found))
        rows.append(row("preprocess", f"{name}, {videos} videos", workers, simulated, run["wall"]))
    return rows


def row(job: str, name: str, workers: int, simulated: Outcome, measured_s: float) -> dict[str, Any]:
    """Return a row of the comparison."""
    off = simulated.wall_s / measured_s - 1
    return {
        "job": job,
        "workload": name,
        "workers": workers,
        "simulated_s": simulated.wall_s,
        "measured_s": measured_s,
    } | {
        "off": off,
        "is_prediction": not name.startswith("calibration"),
    }


# ---------------------------------------------------------------- training


def compare_training(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return simulated and measured durations of a step; its cost on one rank comes from short runs."""
    runs = best(results["runs"])
    costs = {case[0]: cost for case, cost in best(results["costs"]).items()}
    small, large = "calibration", "calibration, more weights"
    # Communication cost of a second rank, beside its load on the first: a part per message and a part per MB.
    added = {name: run["step"] - costs[name]["beside_s"] for (name, _, ranks), run in runs.items() if ranks == 2}
    more_mb = costs[large]["adapter_mb"] - costs[small]["adapter_mb"]
    s_per_mb = max(1e-6, (added[large] - added[small]) / more_mb)
    latency_s = max(0.0, added[small] - costs[small]["adapter_mb"] * s_per_mb) / 2
    rows = []
    for (name, _, ranks), run in runs.items():
        cost = costs[name]
        busy = cost["beside_s"] / cost["alone_s"]
        one = Training(
            1, cost["alone_s"], gradient_mb=cost["adapter_mb"], reduce_mb_s=1 / s_per_mb, latency_s=latency_s
        )
        simulated = train(one, Cluster(cpus=ranks, busy=busy))
        rows.append(row("train", f"{name}, a step", ranks, simulated, run["step"]))
    return rows


# ---------------------------------------------------------------- the curve

VIDEOS, VIDEO_MB = 8_000, 20.0
PLAIN = Cluster(cpus=16, busy=1.0)
SLOW = replace(PLAIN, node_mb_s=1250.0, store_mb_s=5000.0, slow_share=0.05, slow_by=2.0)
FAILING = replace(SLOW, mtbf_s=24 * 3600.0)
# The paper's training, from `ex4d train configs/train_14b.yaml train.dry_run=true` on an H200: estimated, not measured.
BIG = Training(
    10_000, 27.6, gradient_mb=399.0, batch_mb=4 * 1.3, save_every=500, save_s=10.0, start_s=180.0, weights_mb=45_000.0
)
GPUS = Cluster(gpus=8)


def preprocess_curve(results: dict[str, Any]) -> dict[str, list[float]]:
    """Return {modelled effects: clips per hour on each of NODES}, from the measured cost of large clips."""
    costs = results["clip"]["costs"]
    measured = on_ray(results["preprocess"]["costs"]["calibration"], best(results["preprocess"]["runs"]))
    found = replace(measured, in_ray=1.0)  # workers have cores of their own
    driver = results["driver"]
    plan_s = driver["plan_cpu_s_per_video"]
    row_s = driver["stream_cpu_s_per_video"] / (2 + mean(costs, "clips"))
    overhead = replace(found.overhead, driver_s=driver["s_per_task"], driver_row_s=row_s, row_s=0.0)
    cases = {
        "start, driver, tail": (PLAIN, passes(costs, VIDEOS, found, 0.0, plan_s)),
        "and network, store, slow nodes": (SLOW, passes(costs, VIDEOS, found, VIDEO_MB, plan_s)),
        "and failures": (FAILING, passes(costs, VIDEOS, found, VIDEO_MB, plan_s)),
    }
    work_s = VIDEOS * sum(mean(costs, name) for name in ("hash", "split", "clip", "pack"))
    curves = {"ideal": [VIDEOS / (work_s / PLAIN.cpus / nodes) * 3600 for nodes in NODES]}
    for name, (cluster, work) in cases.items():
        walls = (Preprocess(replace(cluster, nodes=nodes), overhead).run(work).wall_s for nodes in NODES)
        curves[name] = [VIDEOS / wall_s * 3600 for wall_s in walls]
    return curves


def training_curve() -> dict[str, list[float]]:
    """Return {modelled effects: steps per hour × ranks, on each of NODES}."""
    slow_link = replace(GPUS, node_mb_s=1250.0, store_mb_s=5000.0)
    fast_link = replace(GPUS, node_mb_s=25_000.0, store_mb_s=20_000.0)
    uneven = replace(BIG, spread=0.03)
    cases = {
        "ideal": (replace(BIG, gradient_mb=0.0, batch_mb=0.0, weights_mb=0.0, start_s=0.0, save_s=0.0), GPUS),
        "25 GB/s links, 20 GB/s store": (BIG, fast_link),
        "and ranks that differ by 3 %": (uneven, fast_link),
        "and failures": (uneven, replace(fast_link, mtbf_s=30 * 24 * 3600.0)),
        "1.25 GB/s links, 5 GB/s store, all of these": (uneven, replace(slow_link, mtbf_s=30 * 24 * 3600.0)),
    }
    clips = BIG.num_steps * 4 * 8

    def wall_s(run: Training, cluster: Cluster) -> float:
        seeds = range(1 if math.isinf(cluster.mtbf_s) else 3)  # chance decides when nodes fail
        return statistics.fmean(train(run, cluster, seed).wall_s for seed in seeds)

    return {
        name: [clips * nodes / wall_s(run, replace(cluster, nodes=nodes)) * 3600 for nodes in NODES]
        for name, (run, cluster) in cases.items()
    }


def draw(curves: dict[str, dict[str, list[float]]]) -> None:
    """Draw the curves: throughput relative to one ideal node."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6))
    for axis, (title, curve) in zip(axes, curves.items(), strict=True):
        for name, rates in curve.items():
            style = {"color": "0.6", "linestyle": "--"} if name == "ideal" else {"marker": "o", "markersize": 3}
            axis.plot(NODES, [rate / curve["ideal"][0] for rate in rates], label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="nodes", ylabel="speed, one ideal node = 1", title=title)
        axis.set_xticks(NODES, [str(nodes) for nodes in NODES])
        axis.set_yticks(NODES, [str(nodes) for nodes in NODES])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def markdown(rows: Sequence[dict[str, Any]], curves: dict[str, dict[str, list[float]]]) -> str:
    """Return the results as a page."""
    lines = ["# Scale: the simulation against real runs, and what it says of 1 to 64 nodes", ""]
    lines += ["| job | workload | workers | simulated | measured | off |", "|---|---|---|---|---|---|"]
    for one in rows:
        kind = "" if one["is_prediction"] else " (calibration)"
        figures = f"{one['simulated_s']:.3g} s | {one['measured_s']:.3g} s | {one['off']:+.0%}"
        lines.append(
            f"| {one['job']} | {one['workload'].removeprefix('calibration, ')}{kind} | {one['workers']} | {figures} |"
        )
    for title, curve in curves.items():
        lines += ["", f"{title}: clips an hour, and the share of the ideal", ""]
        lines += ["| nodes | " + " | ".join(curve) + " |", "|---" * (len(curve) + 1) + "|"]
        for index, nodes in enumerate(NODES):
            shares = (f"{rates[index]:,.0f} ({rates[index] / curve['ideal'][index]:.0%})" for rates in curve.values())
            lines.append(f"| {nodes} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare simulation and runs; without `compare`, also draw the curves and write the page."""
    results = json.loads(RESULTS.read_text())
    rows = [
        *compare_preprocess(results["preprocess"]),
        *(compare_training(results["train"]) if "train" in results else []),
    ]
    for one in rows:
        print(one)
    if "compare" in sys.argv[1:]:
        return
    curves = {"preprocess": preprocess_curve(results), "training": training_curve()}
    draw(curves)
    RESULTS.with_suffix(".md").write_text(markdown(rows, curves), encoding="utf-8")


if __name__ == "__main__":
    main()
