"""`ex4d sweep`: run many short trainings with Ray Tune and compare them.

    OUTPUT/tune/          Ray Tune's state: running the same command again resumes the sweep
    OUTPUT/trials/NAME/   a trial: config.yaml, train.log and the run's folder
    OUTPUT/sweep.json     all trials, best first; OUTPUT/best.yaml; OUTPUT/report/index.html

Trials are compared after the same number of steps: the furthest step ranks first, and at equal steps the lowest value.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ex4d import config, storage
from ex4d.data import manifest
from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig
from ex4d.redact import without_secrets
from ex4d.train.checks import check_settings
from ex4d.train.config import EXIT_PREEMPTED, TrainConfig
from ex4d.train.datasets import fingerprint
from pipelines.runtime.cluster import check_output, connected
from pipelines.runtime.output import exclusive, outside_datasets
from pipelines.runtime.runner import RayConfig
from pipelines.train import sweep_report
from pipelines.train.sweep_config import SweepConfig
from pipelines.train.sweep_space import value_in, with_values

SETTINGS = "settings.json"  # in the output: what may not change when the sweep is resumed
SECTIONS = {"sweep": SweepConfig, "ray": RayConfig, "train": TrainConfig, "model": ModelConfig}


def command(path: str, overrides: Sequence[str]) -> int:
    """Run `ex4d sweep`: start or resume the sweep of a config file; return the exit status."""
    loaded = config.load(path, SECTIONS, overrides)
    sweep, train = loaded["sweep"], loaded["train"]
    check_output("sweep.output", sweep.output)
    outside_datasets("sweep.output", sweep.output)
    counts = [manifest.read_dataset(data.path)["counts"] for data in train.datasets]
    validates = any(count.get("samples_val") for count in counts)
    if sweep.metric == "validation_loss" and not validates:
        paths = ", ".join(data.path for data in train.datasets)
        allowed = f"must be mse, since {paths} has no validation split; or create one with preprocess.val_fraction"
        raise ConfigError("sweep.metric", sweep.metric, allowed)
    tree = trial_tree(sweep, train, config.read_yaml(path), overrides, validates)
    check_settings(config.validate(TrainConfig, tree["train"], "train"), loaded["model"])
    if loaded["ray"].address is None:  # otherwise the base is on other machines
        from ex4d.models import experts

        experts.timesteps(loaded["model"].base, loaded["model"].revision, train.expert)
    whole = config.to_plain({"sweep": config.to_dict(sweep), **tree})
    if without_secrets(whole) != whole:
        allowed = "must be a URL without password or signature, since it is written to the trials' files"
        raise ConfigError("sweep", path, allowed)
    output = Path(sweep.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    sweep = config.validate(SweepConfig, {**config.to_dict(sweep), "output": str(output)}, "sweep")
    with exclusive(str(output)):
        from pipelines.train.sweep_tune import Interrupted, check_limit, search

        with _interruptible(), connected(loaded["ray"].address, object_store_mb=loaded["ray"].object_store_mb):
            _check_gpus(sweep, train, loaded["ray"].address is None)
            settings = _checked_settings(sweep, tree, fingerprint(train), output)
            check_limit(sweep, tree)
            storage.write_bytes(output / SETTINGS, settings)  # only now: those of a refused start are not recorded
            if train.launcher == "ray":  # for the trials, whose ranks reserve their own resources
                tree["ray"] = {"ranks_timeout_s": loaded["ray"].ranks_timeout_s}
            try:
                rows = sweep_report.ranked(search(sweep, tree), sweep, tree)
                noise = confirm(sweep, tree, rows)
            except Interrupted as stop:
                return _say_interrupted(sweep, tree, stop.status)
        return sweep_report.write(rows, noise, tree, sweep)


def _check_gpus(sweep: SweepConfig, train: TrainConfig, is_own_ray: bool) -> None:
    """Raise ConfigError if trials would share a GPU by chance, train on a CPU unnoticed, or wait for GPUs for ever.

    Args:
        is_own_ray: Ray runs on this machine alone; a cluster may get more nodes.
    """
    if train.launcher == "ray":  # its ranks reserve GPUs themselves
        return
    import ray

    each, there, allowed = sweep.gpus_per_trial, ray.cluster_resources().get("GPU", 0.0), None
    on_gpu = train.device != "cpu"
    if is_own_ray and each > there:
        allowed = f"must be at most {there:g}, the GPUs of this machine"
    elif on_gpu and each == 0 and there and (sweep.max_concurrent > 1 or not is_own_ray):
        # Ray hides no GPU from a trial that reserves none: each would take them all, or on a node without one, the CPU.
        allowed = "must be set, for each trial to have GPUs of its own (1 for one process); or set train.device=cpu"
    elif on_gpu and 0 < each < (train.num_processes or 0) > 1:
        allowed = f"must be at least {train.num_processes}, train.num_processes, since two ranks cannot share a GPU"
    if allowed:
        raise ConfigError("sweep.gpus_per_trial", each, allowed)


def _say_interrupted(sweep: SweepConfig, tree: dict[str, Any], status: int) -> int:
    """Write the results of an unfinished sweep to sweep.json, print one line, and return `status`."""
    from pipelines.train.sweep_tune import so_far

    rows = sweep_report.ranked(so_far(sweep, tree), sweep, tree)
    ended = sum(row["state"] != "interrupted" for row in rows)
    sweep_report.write_json(rows, {}, f"Interrupted when {ended} trials had ended.", sweep)
    summary = f"{ended} ended trials and the checkpoints of the others are kept in {sweep.output}"
    print(f"interrupted: {summary}; run the same command again to continue")
    return status


def trial_tree(
    sweep: SweepConfig, train: TrainConfig, file: dict[str, Any], overrides: Sequence[str], validates: bool
) -> dict[str, Any]:
    """Return the sections model and train that all trials share, before a trial's point is applied.

    Args:
        file, overrides: the sweep's config file and its overrides on the command line.
        validates: True if the dataset has samples to validate on.
    """
    tree = {name: file.get(name) or {} for name in ("model", "train")}
    for override in (o for o in overrides if o.startswith(("train.", "model."))):
        key, _, text = override.partition("=")
        tree = with_values(tree, {key: config.parse_value(text)})
    values = {
        "train.data": config.to_dict(train.absolute())["data"],
        "train.num_steps": train.num_steps,
        "train.wandb_group": sweep.group,
    }
    for key in ("save_every", "validate_every") if validates else ("save_every",):
        if tree["train"].get(key) is None:
            values[f"train.{key}"] = sweep.grace_steps
    if sweep.metric == "validation_loss":
        # The ranks validate at every rung; a separate validation would report too late for the comparison.
        values |= {"train.validate_every": sweep.grace_steps, "train.validate_apart": False}
    if sweep.search == "pbt":
        values |= {"train.save_every": sweep.grace_steps, "train.keep_last": train.num_steps // sweep.grace_steps + 2}
    return with_values(tree, values)


def _checked_settings(sweep: SweepConfig, tree: dict[str, Any], data: str, output: Path) -> bytes:
    """Return the new content of SETTINGS. Raises ConfigError if the folder holds a sweep with other settings or data.

    Args:
        data: the fingerprint of the datasets.
    """
    free = ("max_concurrent", "cpus_per_trial", "gpus_per_trial", "repeat_seeds")
    now = {"sweep": {k: v for k, v in config.to_dict(sweep).items() if k not in free}, **json.loads(json.dumps(tree))}
    path = output / SETTINGS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    if before.get("data", data) != data:
        allowed = (
            f"holds other samples or weights than when the sweep in {output} was started; use another sweep.output"
        )
        raise ConfigError("train.data", tree["train"]["data"], allowed)
    if sweep.search in ("tpe", "random") and sweep.num_trials > before["sweep"]["num_trials"]:
        before["sweep"]["num_trials"] = sweep.num_trials
    for section in now:
        for key in sorted(now[section].keys() | before[section].keys() - SweepConfig.RENAMED.keys()):
            if now[section].get(key) != before[section].get(key):
                was = before[section].get(key)
                allowed = f"the sweep in {output} has {was!r}; use that value or another sweep.output"
                raise ConfigError(f"{section}.{key}", now[section].get(key), allowed)
    return (json.dumps(now | {"data": data}, indent=2) + "\n").encode()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into Interrupted; if Ray Tune handled them, the sweep would look finished."""
    from pipelines.train import sweep_tune

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    statuses = {signal.SIGINT: 130, signal.SIGTERM: EXIT_PREEMPTED}

    sweep_tune.stop_asked.clear()

    def stop(number: int, _: object) -> None:
        sweep_tune.stop_asked.append(statuses[signal.Signals(number)])
        signal.signal(number, before[signal.Signals(number)])  # a second signal ends the process at once

    before = {number: signal.signal(number, stop) for number in statuses}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the search


def confirm(sweep: SweepConfig, tree: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return {"best": rows, "default": rows}: both points trained to the end with several seeds, to show chance."""
    if sweep.repeat_seeds < 2 or not rows or rows[0]["state"] == "failed" or sweep.search == "pbt":
        return {}
    from pipelines.train.sweep_tune import repeat

    seed = int(value_in(tree, "train.seed"))
    seeds = [seed + index for index in range(sweep.repeat_seeds)]
    best = {key: value for key, value in rows[0]["point"].items() if key != "train.seed"}
    points = {"best": best, "default": {}}
    return {name: repeat(sweep, tree, point, seeds, f"seeds of the {name}") for name, point in points.items()}
