"""The settings of a sweep (YAML section `sweep`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ex4d.config import checked, setting
from pipelines.train.sweep_space import Space

REPORTED = ("loss", "mse", "grad_norm", "samples_per_s", "peak_memory_bytes")
PBT_KEYS = ("lr", "weight_decay", "max_grad_norm", "hole_weight", "condition_dropout", "shift", "ema_decay")
SCALES_LOSS = ("train.hole_weight", "train.timestep_sampling", "train.shift", "train.condition_dropout", "train.seed")


@dataclass(frozen=True)
class SweepConfig:
    """Many short trainings."""

    RENAMED: ClassVar[dict[str, str]] = {
        "start_from_config": "was removed: the first trial always takes the file's own values that lie in the space"
    }

    output: str = setting("out/sweep", "Folder of the trials, the table and best.yaml.")
    space: dict[str, dict[str, Any] | str] = setting(
        {"train.lr": {"log_uniform": [1e-4, 1e-2]}},
        "{KEY: {KIND: [low, high] or [low, high, step]}}, {KEY: {choice: values}} or {KEY: =KEY}; kinds: "
        "[log_]uniform, [log_]int_uniform.",
    )
    num_trials: int = setting(
        4, "Number of trials; grid: of all points instead. tpe and random: may be raised on resume.", ge=1
    )
    max_concurrent: int = setting(1, "Trials that run at the same time; pbt: at least num_trials.", ge=1)
    metric: Literal["validation_loss", "mse", "loss"] = setting("validation_loss", "Metric to minimise.")
    report: tuple[str, ...] = setting(("loss", "mse", "samples_per_s"), "Metrics to report beside it.")
    window: int = setting(10, "Steps over which mse or loss is averaged.", ge=1)
    search: Literal["tpe", "random", "grid", "pbt"] = setting("tpe", "How points are proposed.")
    scheduler: Literal["asha", "median", "none"] = setting("asha", "How weak trials are stopped early; pbt: not used.")
    grace_steps: int = setting(10, "Steps between two comparisons; no trial is stopped before the first.", ge=1)
    reduction_factor: int = setting(2, "ASHA: one in this many trials survives each rung.", ge=2)
    repeat_seeds: int = setting(
        3, "Train the best and the file's own values with this many seeds each; 1: skip this; pbt: not used.", ge=1
    )
    cpus_per_trial: float = setting(
        1.0, "CPUs that Ray reserves for each trial; with train.launcher=ray, its ranks reserve their own.", ge=0
    )
    gpus_per_trial: float = setting(
        0.0, "GPUs that Ray reserves for each trial; with train.launcher=ray, its ranks reserve their own.", ge=0
    )
    group: str = setting("sweep", "W&B group of all trials.")
    seed: int = setting(0, "Seed of the proposals.", ge=0, le=2**31 - 1)

    def __post_init__(self) -> None:
        need = checked(self, "sweep")
        unknown = [name for name in self.report if name not in REPORTED]
        need(not unknown, "report", f"must be some of {', '.join(REPORTED)}")
        whole = self.gpus_per_trial <= 1 or self.gpus_per_trial % 1 == 0
        need(whole, "gpus_per_trial", "must be a whole number, or less than 1 for a share of one GPU")
        space = Space.of(self.space)
        if self.metric == "loss":
            scaling = [axis.key for axis in space.axes if axis.key in SCALES_LOSS]
            need(not scaling, "metric", f"must be validation_loss: {', '.join(scaling)} changes what `loss` means")
        if self.search == "grid":
            space.grid()
        if self.search == "pbt":
            fixed = [axis.key for axis in space.axes if axis.key.removeprefix("train.") not in PBT_KEYS]
            need(not fixed, "space", f"must be train. and one of {', '.join(PBT_KEYS)}: pbt changes them midway")
            need(self.num_trials > 1, "num_trials", "must be at least 2 with sweep.search=pbt")
            allowed = f"must be at least {self.num_trials}, num_trials: pbt runs all trials that CPUs and GPUs allow"
            need(self.max_concurrent >= self.num_trials, "max_concurrent", allowed)
