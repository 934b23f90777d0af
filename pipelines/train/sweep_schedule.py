"""Ray Tune's schedulers for a sweep: which trials are stopped early, and how PBT changes settings.

Ray Tune pickles references to the functions of this module into the sweep's folder: a sweep that is resumed by newer
code needs their names.
"""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path
from typing import Any

from ex4d.train import runlog
from pipelines.train.sweep_config import SweepConfig
from pipelines.train.sweep_space import Axis, Space
from pipelines.train.sweep_trial import rungs, trial_folder


def scheduler(sweep: SweepConfig, space: Space, tree: dict[str, Any]) -> Any:
    """Return the scheduler that a sweep chooses."""
    from ray.tune import schedulers

    num_steps = int(tree["train"]["num_steps"])
    grace = min(sweep.grace_steps, num_steps)
    if sweep.search == "pbt":
        random.seed(sweep.seed)  # PBT samples from this generator
        # A value changes to a neighbour in a list, to 0.8 or 1.2 times itself, or to a new draw.
        mutations = {axis.key: list(axis.values) if axis.kind == "choice" else domain(axis) for axis in space.axes}
        return schedulers.PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=grace,
            hyperparam_mutations=mutations,
            custom_explore_fn=functools.partial(_inside, space),
            quantile_fraction=0.25 if sweep.num_trials >= 4 else 0.5,
            require_attrs=False,
            synch=True,  # all trials are compared at the same step
        )
    if sweep.scheduler == "asha":
        asha = _remembering(schedulers.ASHAScheduler, sweep, space, tree)
        return asha(time_attr="step", max_t=num_steps, grace_period=grace, reduction_factor=sweep.reduction_factor)
    if sweep.scheduler == "median":
        median = _remembering(schedulers.MedianStoppingRule, sweep, space, tree)
        # No time slices: a paused trial would have to reload its model.
        return median(time_attr="step", grace_period=grace, min_samples_required=3, min_time_slice=math.inf)
    return schedulers.FIFOScheduler()


def _remembering(base: Any, sweep: SweepConfig, space: Space, tree: dict[str, Any]) -> Any:
    """Return a scheduler class that restores the trials' reports after a restart, which Ray Tune does not do."""
    last = int(tree["train"]["num_steps"])

    class Remembering(base):
        def __init__(self, **options: Any):
            super().__init__(**options)
            self.last_steps: dict[str, int] = {}  # the last step of each trial

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, trial)
            until = (trial.last_result or {}).get("step", 0)
            log = folder(trial, sweep, space, tree) / "train" / "metrics.jsonl"
            before = [record for record in rungs(runlog.read(log), sweep, last) if record["step"] <= until]
            for record in before:
                self.on_trial_result(tune_controller, trial, record)
            if before and trial.status == "TERMINATED":
                self.on_trial_complete(tune_controller, trial, before[-1])

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if result["step"] <= self.last_steps.get(trial.trial_id, 0):
                return base.CONTINUE  # a resumed trial repeats its reports
            self.last_steps[trial.trial_id] = result["step"]
            return super().on_trial_result(tune_controller, trial, result)

    return Remembering


def domain(axis: Axis) -> Any:
    """Return an axis as a Ray Tune domain, from which PBT samples."""
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


def _inside(space: Space, point: dict[str, Any]) -> dict[str, Any]:
    """Return a point that PBT has perturbed, with each number clipped to its range and rounded to its step."""
    changed = dict(point)
    for axis in space.axes:
        if axis.kind != "choice":
            low, high, *step = axis.values
            value = min(max(point[axis.key], low), high)
            if step:
                steps = min(round((value - low) / step[0]), math.floor((high - low) / step[0] + 1e-9))
                value = low + steps * step[0]
            changed[axis.key] = value
    return changed


def folder(trial: Any, sweep: SweepConfig, space: Space, tree: dict[str, Any]) -> Path:
    """Return the folder of one of Ray Tune's trials."""
    point = space.whole(trial.config.get("point", trial.config), tree)
    return trial_folder(sweep, point, tree, trial.trial_id)
