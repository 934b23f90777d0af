"""The gate to Ray Tune: a sweep's search as a Tuner that can be restored, and what its trials reported."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.train.sweep_config import SweepConfig
from pipelines.train.sweep_space import Axis, Space
from pipelines.train.sweep_trial import run_trial

MAX_FAILURES = 1  # a trial that fails is tried once more, from its last checkpoint

stop_asked: list[int] = []  # exit statuses that signals ask for; raising in their handler would break Ray's own calls


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; Ray Tune must not take it for a trial's error."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def search(sweep: SweepConfig, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Run what is missing of a sweep; return a row a trial: point, value, step, error, curve, folder."""
    from ray import tune

    space = Space.of(sweep.space)
    trainable = _trainable(sweep, tree)
    path = Path(sweep.output) / "tune" / "search"
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # what is proposed must survive a kill
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    if tune.Tuner.can_restore(str(path)):
        tuner = tune.Tuner.restore(str(path), trainable=trainable, resume_unfinished=True)
        return _rows(tuner.fit())
    proposals, config = _proposals(sweep, space, tree)
    tuner = tune.Tuner(
        trainable,
        param_space=config,
        tune_config=tune.TuneConfig(
            metric="value",
            mode="min",
            num_samples=1 if "point" in config else sweep.num_trials,
            max_concurrent_trials=sweep.max_concurrent,
            search_alg=proposals,
            scheduler=_scheduler(sweep, space, int(tree["train"]["num_steps"])),
        ),
        run_config=_run_config("search", sweep, tree),
    )
    return _rows(tuner.fit())


def repeat(
    sweep: SweepConfig, tree: dict[str, Any], point: dict[str, Any], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Train one point to its end with each seed; what was trained in the search is taken from there."""
    from ray import tune

    own: dict[str, Any] = {key: {"choice": [value]} for key, value in point.items()}
    own["train.seed"] = {"choice": list(seeds)}
    fixed = dataclasses.replace(sweep, space=own, search="grid", scheduler="none")
    points = [{**point, "train.seed": seed} for seed in seeds]
    tuner = tune.Tuner(
        _trainable(fixed, tree),
        param_space={"point": tune.grid_search(points)},
        tune_config=tune.TuneConfig(metric="value", mode="min", max_concurrent_trials=sweep.max_concurrent),
        run_config=_run_config(f"repeat-{time.time_ns()}", sweep, tree),
    )
    return _rows(tuner.fit())


def _trainable(sweep: SweepConfig, tree: dict[str, Any]) -> Any:
    from ray import tune

    function = functools.partial(run_trial, tree=tree, sweep=sweep)
    if tree["train"].get("launcher") == "ray":
        return tune.with_resources(function, {"cpu": 0})  # its ranks reserve what they need, on any node
    return tune.with_resources(function, {"cpu": sweep.cpus_per_trial, "gpu": sweep.gpus_per_trial})


def _run_config(name: str, sweep: SweepConfig, tree: dict[str, Any]) -> Any:
    from ray import tune

    return tune.RunConfig(
        name=name,
        storage_path=str(Path(sweep.output) / "tune"),
        verbose=0,
        callbacks=[Board(sweep, int(tree["train"]["num_steps"]))],
        failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
    )


def _proposals(sweep: SweepConfig, space: Space, tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return (Tune's search algorithm or None, its param_space)."""
    import optuna
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    first = [space.today(tree)] if sweep.start_from_config and space.today(tree) else []
    if sweep.search == "grid":
        points = first + [point for point in space.grid() if point not in first]
        return None, {"point": tune.grid_search(points)}
    if sweep.search == "pbt":
        return BasicVariantGenerator(random_state=sweep.seed), {axis.key: _domain(axis) for axis in space.axes}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = optuna.samplers
    maker: Any = samplers.RandomSampler if sweep.search == "random" else samplers.TPESampler
    sampler = maker(seed=sweep.seed)
    return OptunaSearch(space.define, metric="value", mode="min", sampler=sampler, points_to_evaluate=first or None), {}


def _domain(axis: Axis) -> Any:
    """Return Ray Tune's domain of an axis, from which PBT draws."""
    from ray import tune

    if axis.kind == "choice":
        return tune.choice(list(axis.values))
    low, high, *step = axis.values
    log = axis.kind.startswith("log_")
    if "int" in axis.kind:
        return tune.lograndint(low, high + 1) if log else tune.qrandint(low, high, step[0] if step else 1)
    if log:
        return tune.loguniform(low, high)
    return tune.quniform(low, high, step[0]) if step else tune.uniform(low, high)


def _scheduler(sweep: SweepConfig, space: Space, num_steps: int) -> Any:
    from ray.tune import schedulers

    grace = min(sweep.grace_steps, num_steps)
    if sweep.search == "pbt":
        return schedulers.PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=grace,
            hyperparam_mutations={axis.key: _domain(axis) for axis in space.axes},
            quantile_fraction=0.25 if sweep.num_trials >= 4 else 0.5,
            require_attrs=False,
            synch=True,  # all are compared at the same step
        )
    if sweep.scheduler == "asha":
        return schedulers.ASHAScheduler(
            time_attr="step", max_t=num_steps, grace_period=grace, reduction_factor=sweep.reduction_factor
        )
    if sweep.scheduler == "median":
        return schedulers.MedianStoppingRule(time_attr="step", grace_period=grace, min_samples_required=3)
    return schedulers.FIFOScheduler()


def _rows(results: Any) -> list[dict[str, Any]]:
    rows = []
    for result in results:
        metrics, config = result.metrics or {}, result.config or {}
        frame = result.metrics_dataframe
        curve: list[list[float]] = []
        if frame is not None and "value" in frame:
            curve = [[int(step), float(value)] for step, value in zip(frame["step"], frame["value"], strict=True)]
        error = str(result.error).strip().splitlines()[-1] if result.error else None
        rows.append({"drawn": config.get("point", config), "value": metrics.get("value"), "step": metrics.get("step")})
        rows[-1] |= {"error": error, "curve": sorted(curve), "metrics": metrics, "folder": metrics.get("folder")}
    return rows


def _callback() -> type:
    from ray.tune import Callback

    return Callback


class Board(_callback()):  # type: ignore[misc]
    """Says on the terminal what the trials do: a line an event."""

    def __init__(self, sweep: SweepConfig, num_steps: int):
        self.metric, self.num_steps, self.num_trials = sweep.metric, num_steps, sweep.num_trials
        self.names: dict[str, int] = {}
        self.best = (0, math.inf)
        self.began: dict[str, tuple[float, int]] = {}
        self.start = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """End the sweep where a signal asked for it."""
        if stop_asked:
            raise Interrupted(stop_asked[0])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say which point is tried."""
        drawn = trial.config.get("point", trial.config)
        point = ", ".join(f"{key}={_short(value)}" for key, value in drawn.items())
        self._say(trial, f"starts: {point}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict, **info: Any) -> None:
        """Say how far a trial is, how good, how fast and how long it will take."""
        step, value, now = result["step"], result["value"], time.monotonic()
        before, at = self.began.setdefault(trial.trial_id, (now, step))
        rate = (step - at) / (now - before) if step > at else None
        eta = f", {rate:.2f} steps/s, {(self.num_steps - step) / rate:.0f} s to its end" if rate else ""
        self.best = min(self.best, (-step, value))
        best = f"best at step {-self.best[0]}: {self.best[1]:.5f}"
        self._say(trial, f"step {step}/{self.num_steps}: {self.metric} {value:.5f} ({best}){eta}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say how a trial ended."""
        step = (trial.last_result or {}).get("step", 0)
        self._say(trial, "finished" if step >= self.num_steps else f"stopped early at step {step}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say that a trial failed."""
        self._say(trial, "failed")

    def _say(self, trial: Any, text: str) -> None:
        number = self.names.setdefault(trial.trial_id, len(self.names) + 1)
        print(f"[{time.monotonic() - self.start:7.0f} s] trial {number}: {text}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
