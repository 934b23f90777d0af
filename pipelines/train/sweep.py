"""`ex4d sweep`: many short trainings through Ray Tune, and what they show.

    OUTPUT/tune/          Ray Tune's own state: the same command run again goes on with it
    OUTPUT/trials/NAME/   a trial: config.yaml, train.log and the run's folder
    OUTPUT/sweep.json     every trial, best first; OUTPUT/best.yaml; OUTPUT/report/index.html

Trials are compared after the same number of steps: the one that got furthest wins, and among those the lowest value.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ex4d import config
from ex4d.config import checked, setting
from ex4d.data import manifest
from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig
from ex4d.train.config import EXIT_PREEMPTED, TrainConfig
from pipelines.runtime.cluster import check_output, connected
from pipelines.runtime.runner import RayConfig
from pipelines.train import sweep_report
from pipelines.train.sweep_space import Space, value_in, with_values

REPORTED = ("loss", "mse", "grad_norm", "samples_per_s", "peak_memory_bytes")
PBT_KEYS = ("lr", "weight_decay", "max_grad_norm", "hole_weight", "condition_dropout", "shift", "ema_decay")
SCALES_LOSS = ("train.hole_weight", "train.timestep_sampling", "train.shift", "train.condition_dropout", "train.seed")
MAX_FAILURES = 1  # a trial that fails is tried once more, from its last checkpoint


@dataclass(frozen=True)
class SweepConfig:
    """Many short trainings."""

    output: str = setting("out/sweep", "Folder of the trials, the table and best.yaml.")
    space: dict[str, dict[str, Any] | str] = setting(
        {"train.lr": {"log_uniform": [1e-4, 1e-2]}},
        "What varies: {KEY: {KIND: values, when: {KEY: values}}} or {KEY: =KEY}; kinds: uniform, log_uniform, "
        "int_uniform, log_int_uniform [low, high] or [low, high, step], choice [values].",
    )
    num_trials: int = setting(4, "Number of trials.", ge=1)
    max_concurrent: int = setting(1, "Trials that run at the same time.", ge=1)
    metric: Literal["validation_loss", "mse", "loss"] = setting("validation_loss", "Metric to minimise.")
    report: tuple[str, ...] = setting(("loss", "mse", "samples_per_s"), "Metrics to report beside it.")
    window: int = setting(10, "Steps over which mse or loss is averaged.", ge=1)
    search: Literal["tpe", "random", "grid", "pbt"] = setting("tpe", "How points are proposed.")
    scheduler: Literal["asha", "median", "none"] = setting("asha", "How weak trials are stopped early.")
    grace_steps: int = setting(10, "Steps between two comparisons; no trial is stopped earlier.", ge=1)
    reduction_factor: int = setting(2, "ASHA: one of so many trials survives each rung.", ge=2)
    start_from_config: bool = setting(True, "Make the file's own values the first trial.")
    repeat_seeds: int = setting(3, "Train the best and the file's own values with so many seeds; 1: do not.", ge=1)
    cpus_per_trial: float = setting(1.0, "CPUs that Ray reserves for each trial.", ge=0)
    gpus_per_trial: float = setting(0.0, "GPUs that Ray reserves for each trial.", ge=0)
    group: str = setting("sweep", "W&B group of all trials.")
    seed: int = setting(0, "Seed of the proposals.", ge=0, le=2**31 - 1)

    def __post_init__(self) -> None:
        need = checked(self, "sweep")
        unknown = [name for name in self.report if name not in REPORTED]
        need(not unknown, "report", f"some of {', '.join(REPORTED)}")
        space = Space.of(self.space)
        if self.metric == "loss":
            scaling = [axis.key for axis in space.axes if axis.key in SCALES_LOSS]
            need(not scaling, "metric", f"validation_loss: {', '.join(scaling)} changes what `loss` means")
        if self.search == "grid":
            space.grid()
        if self.search == "pbt":
            fixed = [axis.key for axis in space.axes if axis.key.removeprefix("train.") not in PBT_KEYS]
            need(not fixed, "space", f"train. and one of {', '.join(PBT_KEYS)}: sweep.search=pbt changes them midway")
            need(self.num_trials > 1, "num_trials", "at least 2 where sweep.search=pbt")


SECTIONS = {"sweep": SweepConfig, "ray": RayConfig, "train": TrainConfig, "model": ModelConfig}


def command(path: str, overrides: Sequence[str]) -> int:
    """Do `ex4d sweep`: run or resume the sweep of a config file; return the exit status."""
    loaded = config.load(path, SECTIONS, overrides)
    sweep, train = loaded["sweep"], loaded["train"]
    check_output("sweep.output", sweep.output)
    tree = trial_tree(sweep, train, config.read_yaml(path), overrides)
    _check_data(sweep, train)
    output = Path(sweep.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    sweep = config.validate(SweepConfig, {**config.to_dict(sweep), "output": str(output)}, "sweep")
    _check_same(sweep, tree, output)
    try:
        with _interruptible(), connected(loaded["ray"].address):
            rows = run(sweep, tree)
            noise = confirm(sweep, tree, rows)
    except Interrupted as stop:
        print(f"interrupted: finished trials and checkpoints are kept in {output}; the same command goes on from there")
        return stop.status
    return sweep_report.write(rows, noise, tree, sweep)


def trial_tree(
    sweep: SweepConfig, train: TrainConfig, file: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the sections model and train of every trial, before its point is put in."""
    tree = {name: file.get(name) or {} for name in ("model", "train")}
    for override in (o for o in overrides if o.startswith(("train.", "model."))):
        key, _, text = override.partition("=")
        tree = with_values(tree, {key: config.parse_value(text)})
    data = train.data if "://" in train.data else str(Path(train.data).resolve())
    values = {"train.data": data, "train.num_steps": train.num_steps, "train.wandb_group": sweep.group}
    for key in ("save_every", "validate_every"):
        if tree["train"].get(key) is None:
            values[f"train.{key}"] = sweep.grace_steps
    if sweep.metric == "validation_loss":
        # Judged at every rung and by the ranks, or the value would come too late to compare.
        values |= {"train.validate_every": sweep.grace_steps, "train.validate_apart": False}
    if sweep.search == "pbt":
        values |= {"train.save_every": sweep.grace_steps, "train.keep_last": train.num_steps // sweep.grace_steps + 2}
    return with_values(tree, values)


def _check_data(sweep: SweepConfig, train: TrainConfig) -> None:
    """Raise where every trial would find out for itself that it has no data or nothing to judge by."""
    facts = manifest.read_dataset(train.data)
    if sweep.metric == "validation_loss" and not facts["counts"].get("samples_val"):
        allowed = f"mse: {train.data} has no validation split; or make one with preprocess.val_fraction"
        raise ConfigError("sweep.metric", sweep.metric, allowed)


def _check_same(sweep: SweepConfig, tree: dict[str, Any], output: Path) -> None:
    """Raise ConfigError where the folder holds a sweep with other settings."""
    free = ("max_concurrent", "cpus_per_trial", "gpus_per_trial", "repeat_seeds")
    now = {"sweep": {k: v for k, v in config.to_dict(sweep).items() if k not in free}, **json.loads(json.dumps(tree))}
    path = output / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for section in now:
        for key in sorted(now[section].keys() | before[section].keys()):
            if now[section].get(key) != before[section].get(key):
                was = before[section].get(key)
                allowed = f"{was!r}, with which the sweep in {output} was started; or another sweep.output"
                raise ConfigError(f"{section}.{key}", now[section].get(key), allowed)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; Ray Tune must not take it for a trial's error."""

    def __init__(self, status: int):
        self.status = status


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into Interrupted, instead of Ray Tune's own end, which looks like a finished sweep."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    statuses = {signal.SIGINT: 130, signal.SIGTERM: EXIT_PREEMPTED}

    def stop(number: int, _: object) -> None:
        raise Interrupted(statuses[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in statuses}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the search


def run(sweep: SweepConfig, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trials of the whole sweep, best first: those that were done before are not done again."""
    from pipelines.train.sweep_tune import search

    return sweep_report.ranked(search(sweep, tree), sweep, tree)


def confirm(sweep: SweepConfig, tree: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return {"best": rows, "default": rows}: both trained to the end with several seeds, so that chance shows."""
    if sweep.repeat_seeds < 2 or not rows or rows[0]["state"] == "failed" or sweep.search == "pbt":
        return {}
    from pipelines.train.sweep_tune import repeat

    seed = int(value_in(tree, "train.seed"))
    seeds = [seed + index for index in range(sweep.repeat_seeds)]
    best = {key: value for key, value in rows[0]["point"].items() if key != "train.seed"}
    return {name: repeat(sweep, tree, point, seeds) for name, point in (("best", best), ("default", {}))}
