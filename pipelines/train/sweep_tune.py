"""The only module that uses Ray Tune: a restorable Tuner for a sweep, and the results of its trials."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.search import ConcurrencyLimiter, SearchGenerator
from ray.tune.search.basic_variant import BasicVariantGenerator

from ex4d.errors import ConfigError
from pipelines.train import sweep_board, sweep_schedule
from pipelines.train.sweep_board import Display
from pipelines.train.sweep_config import SweepConfig
from pipelines.train.sweep_space import Space
from pipelines.train.sweep_trial import run_trial

# Sweeps that were started before 2026-11-27 have pickled references to these names.
_folder, _inside = sweep_schedule.folder, sweep_schedule._inside

ENDED = ("TERMINATED", "ERROR")  # statuses of Ray Tune
MAX_FAILURES = 1  # a failed trial is retried once, from its last checkpoint

stop_asked: list[int] = []  # exit statuses requested by signals; raising in the handler would break Ray's calls


class Interrupted(BaseException):
    """Raised by Ctrl-C or SIGTERM; a BaseException, so that Ray Tune does not treat it as a trial's error."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


def search(sweep: SweepConfig, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the missing trials of a sweep; return one row per trial, see `_rows`."""
    from ray import tune

    space = Space.of(sweep.space)
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")  # proposals must survive a kill
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # disables its banner; we draw our own table
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # A failed trial gets one line in the table and one at the end, with its reason.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="ray.tune")
    before = _before(sweep, tree)
    if before is not None:
        return _rows(before.fit())
    proposals, config = _proposals(sweep, space, tree)
    tuner = tune.Tuner(
        _trainable(sweep, tree),
        param_space=config,
        tune_config=tune.TuneConfig(
            metric="value",
            mode="min",
            num_samples=1 if "point" in config else sweep.num_trials,
            search_alg=proposals,
            scheduler=sweep_schedule.scheduler(sweep, space, tree),
        ),
        run_config=_run_config("search", "sweep", sweep, tree),
    )
    return _rows(tuner.fit())


def check_limit(sweep: SweepConfig, tree: dict[str, Any]) -> None:
    """Raise ConfigError if more trials are under way than may run at a time: Ray Tune resumes them all at once."""
    before = _before(sweep, tree)
    if before is None:
        return
    analysis = before._local_tuner._experiment_analysis  # None if it was killed before its first trial
    statuses = [trial.status for trial in analysis.trials] if analysis else []
    unfinished = len(statuses) - sum(status in ENDED for status in statuses)
    if unfinished > sweep.max_concurrent:
        allowed = f"must be at least {unfinished}, the number of trials under way, which are resumed at once"
        raise ConfigError("sweep.max_concurrent", sweep.max_concurrent, allowed)


def so_far(sweep: SweepConfig, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a sweep that has not ended."""
    before = _before(sweep, tree)
    if before is None or before._local_tuner._experiment_analysis is None:  # it ended before its first trial
        return []
    return _rows(before.get_results())


def _before(sweep: SweepConfig, tree: dict[str, Any]) -> Any:
    """Return the Tuner of an earlier start of this sweep, or None."""
    from ray import tune

    path = str(Path(sweep.output) / "tune" / "search")
    if not tune.Tuner.can_restore(path):
        return None
    with tempfile.TemporaryFile(dir=sweep.output) as probe:
        this_user = os.fstat(probe.fileno()).st_uid  # as this file system shows it, which may map users
    # Ray Tune unpickles these files.
    if any(file.lstat().st_uid != this_user for file in (Path(path).parent, Path(path), *Path(path).iterdir())):
        raise ConfigError("sweep.output", sweep.output, "belongs to another user, whose state could run code here")
    tuner: Any = tune.Tuner.restore(path, trainable=_trainable(sweep, tree), resume_unfinished=True)
    # Ray Tune restores the settings of the first start; max_concurrent and num_trials may have changed since.
    restored = tuner._local_tuner._tune_config
    restored.search_alg, _ = _proposals(sweep, Space.of(sweep.space), tree)
    restored.max_concurrent_trials = None
    return tuner


def repeat(
    sweep: SweepConfig, tree: dict[str, Any], point: dict[str, Any], seeds: Sequence[int], title: str
) -> list[dict[str, Any]]:
    """Train one point to its end with each seed; results of the search are reused."""
    from ray import tune

    own: dict[str, Any] = {key: {"choice": [value]} for key, value in point.items()}
    own["train.seed"] = {"choice": list(seeds)}
    fixed = dataclasses.replace(sweep, space=own, search="grid", scheduler="none")
    points = [{**point, "train.seed": seed} for seed in seeds]
    tuner = tune.Tuner(
        _trainable(fixed, tree),
        param_space={"point": tune.grid_search(points)},
        tune_config=tune.TuneConfig(metric="value", mode="min", max_concurrent_trials=sweep.max_concurrent),
        run_config=_run_config(f"repeat-{time.time_ns()}", title, fixed, tree),
    )
    return _rows(tuner.fit())


def _trainable(sweep: SweepConfig, tree: dict[str, Any]) -> Any:
    from ray import tune

    function = functools.partial(run_trial, tree=tree, sweep=sweep)
    if tree["train"].get("launcher") == "ray":
        # Its ranks reserve their own resources, on any node. Ray Tune needs a reservation, but ranks may need all CPUs.
        return tune.with_resources(function, tune.PlacementGroupFactory([{"memory": 2**20}]))
    return tune.with_resources(function, {"cpu": sweep.cpus_per_trial, "gpu": sweep.gpus_per_trial})


def _run_config(name: str, title: str, sweep: SweepConfig, tree: dict[str, Any]) -> Any:
    from ray import tune

    return tune.RunConfig(
        name=name,
        storage_path=str(Path(sweep.output) / "tune"),
        verbose=0,
        callbacks=[Board(title, sweep, tree)],
        stop={"step": int(tree["train"]["num_steps"])},
        checkpoint_config=tune.CheckpointConfig(num_to_keep=3),  # PBT: none may be deleted before it is copied
        failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
    )


def _proposals(sweep: SweepConfig, space: Space, tree: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return (Ray Tune's search algorithm, param_space)."""
    import optuna
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    first = [space.today(tree)] if space.today(tree) else []
    if sweep.search == "grid":
        points = first + [point for point in space.grid() if point not in first]
        return _listed(sweep), {"point": tune.grid_search(points)}
    if sweep.search == "pbt":
        generator = BasicVariantGenerator(points_to_evaluate=first or None, random_state=sweep.seed)
        return generator, {axis.key: sweep_schedule.domain(axis) for axis in space.axes}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = optuna.samplers
    maker: Any = samplers.RandomSampler if sweep.search == "random" else samplers.TPESampler
    sampler = maker(seed=sweep.seed)
    optuna_search = OptunaSearch(
        space.define, metric="value", mode="min", sampler=sampler, points_to_evaluate=first or None
    )
    return _limited(optuna_search, sweep), {}


def _listed(sweep: SweepConfig) -> Any:
    """Return the search algorithm of a grid. After a restart it takes the limit of now, not the one it restores."""

    class Listed(BasicVariantGenerator):
        def restore_from_dir(self, folder: str) -> None:
            super().restore_from_dir(folder)
            self.max_concurrent = sweep.max_concurrent

    return Listed(max_concurrent=sweep.max_concurrent)


def _limited(optuna_search: Any, sweep: SweepConfig) -> Any:
    """Return the search algorithm that asks Optuna. After a restart it takes the limits of now, as `_listed`."""
    limiter: Any = ConcurrencyLimiter(optuna_search, sweep.max_concurrent)

    class Limited(SearchGenerator):
        def restore_from_dir(self, folder: str) -> None:
            super().restore_from_dir(folder)
            self._total_samples = sweep.num_trials
            limiter.max_concurrent = sweep.max_concurrent

    return Limited(limiter)


def _rows(results: Any) -> list[dict[str, Any]]:
    """Return {"drawn": point, "value", "step", "metrics", "folder", "curve", "error", "ended"} of each trial."""
    rows = []
    for result, trial in zip(results, results._experiment_analysis.trials, strict=True):
        metrics, config = result.metrics or {}, result.config or {}
        frame = result.metrics_dataframe
        curve: dict[int, float] = {}
        if frame is not None and "value" in frame:  # a resumed trial may have reported a step twice
            curve = {int(step): float(value) for step, value in zip(frame["step"], frame["value"], strict=True)}
        row = {"drawn": config.get("point", config), "curve": [list(item) for item in sorted(curve.items())]}
        row |= {"metrics": metrics} | {key: metrics.get(key) for key in ("value", "step", "folder")}
        row["error"] = str(result.error).strip().splitlines()[-1] if result.error else None
        rows.append(row | {"ended": trial.status in ENDED})
    return rows


class Board(Callback):
    """Shows the trials while Ray Tune runs them, and ends the sweep after a signal.

    Ray Tune pickles this object with the sweep's state, so members that cannot be pickled are created late.
    """

    def __init__(self, title: str, sweep: SweepConfig, tree: dict[str, Any]):
        self.title, self.total, self.sweep, self.tree = title, 0, sweep, tree
        self.space, self.last = Space.of(sweep.space), int(tree["train"]["num_steps"])
        self.folders: dict[str, Path] = {}
        self.display: Display | None = None

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """Take the number of trials, which may have been raised since this object was pickled."""
        self.total = total_num_samples or 0

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Update the display if it is due. Raises Interrupted after a signal."""
        self.display = self.display or Display(self.title, self.total, self.sweep.metric, self.last)
        if stop_asked:
            self.display.show(sweep_board.interrupted(self.rows(trials)))
            self.display.close()
            raise Interrupted(stop_asked[0])
        if self.display.due():
            self.display.show(self.rows(trials))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Show the final state of all trials."""
        if self.display:
            self.display.show(self.rows(trials))
            self.display.close()

    def rows(self, trials: Sequence[Any]) -> list[sweep_board.Row]:
        """Return one row per trial, in the order in which the trials were proposed."""
        result = []
        for number, trial in enumerate(trials, 1):
            if trial.trial_id not in self.folders:
                self.folders[trial.trial_id] = sweep_schedule.folder(trial, self.sweep, self.space, self.tree)
            log = self.folders[trial.trial_id] / "train" / "metrics.jsonl"
            point = self.space.whole(trial.config.get("point", trial.config), self.tree)
            result.append(sweep_board.row(number, trial.status, point, trial.last_result or {}, log, self.last))
        return result
