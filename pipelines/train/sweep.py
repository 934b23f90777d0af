"""Many short trainings through Ray Tune: ASHA stops the weak ones, Optuna proposes the next.

A trial is the same `ex4d train` that a user runs, in processes of its own; its metrics.jsonl is read as it grows. So a
trial can be repeated by hand from its folder, and a crash in one costs that one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ex4d import config
from ex4d.config import checked, setting
from ex4d.data import manifest
from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig
from ex4d.train.config import TrainConfig
from pipelines.runtime.cluster import check_output, connected
from pipelines.runtime.runner import RayConfig


@dataclass(frozen=True)
class SweepConfig:
    """Many short trainings."""

    output: str = setting("out/sweep", "Folder of the trials, the table and best.yaml.")
    space: dict[str, dict[str, list[Any]]] = setting(
        {"train.lr": {"log_uniform": [1e-4, 1e-2]}},
        "{setting: {kind: values}}; kinds: uniform, log_uniform, int_uniform [low, high], choice [values].",
    )
    num_trials: int = setting(4, "Number of trials.", ge=1)
    max_concurrent: int = setting(1, "Trials that run at a time.", ge=1)
    metric: str = setting("loss", "Key of metrics.jsonl to minimise.")
    window: int = setting(10, "Average the metric over this many last steps.", ge=1)
    grace_steps: int = setting(10, "ASHA stops no trial before this step.", ge=1)
    reduction_factor: int = setting(2, "1 of this many trials survives each rung of ASHA.", ge=2)
    cpus_per_trial: float = setting(1.0, "CPUs reserved for each trial.", ge=0)
    gpus_per_trial: float = setting(0.0, "GPUs reserved for each trial.", ge=0)
    group: str = setting("sweep", "Weights & Biases group of all trials.")
    seed: int = setting(0, "Seed of the proposals.", ge=0)

    def __post_init__(self) -> None:
        checked(self, "sweep")


KINDS = ("uniform", "log_uniform", "int_uniform", "choice")


def search_space(space: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, Any]:
    """Return Ray Tune's search space; ConfigError where a key or kind is not understood."""
    from ray import tune

    makers = {
        "uniform": lambda values: tune.uniform(*values),
        "log_uniform": lambda values: tune.loguniform(*values),
        "int_uniform": lambda values: tune.randint(*values),
        "choice": lambda values: tune.choice(values),
    }
    built = {}
    for key, kind_values in space.items():
        if not key.startswith(("train.", "model.")):
            raise ConfigError("sweep.space", key, "keys start with train. or model.")
        if len(kind_values) != 1 or next(iter(kind_values)) not in KINDS:
            raise ConfigError(f"sweep.space.{key}", dict(kind_values), f"one of {', '.join(KINDS)}: [values]")
        (kind, values), *_ = kind_values.items()
        if not values or (kind != "choice" and len(values) != 2):
            raise ConfigError(f"sweep.space.{key}", values, "choice takes values, the others [low, high]")
        try:
            built[key] = makers[kind]([float(v) if "uniform" in kind and kind != "int_uniform" else v for v in values])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"sweep.space.{key}", values, str(error)) from error
    return built


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config tree with {"section.key": value} put in."""
    copy = json.loads(json.dumps(tree, default=str))  # YAML has dates
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = copy
        for parent in parents:
            if not isinstance(node.get(parent), dict):  # a section may stand there empty
                node[parent] = {}
            node = node[parent]
        node[leaf] = value
    return copy


def follow(path: Path, process: subprocess.Popen, poll_s: float = 0.5) -> Iterator[dict[str, Any]]:
    """Yield each JSON object of a growing file until the process that writes it has ended."""
    offset = 0
    while True:
        ended = process.poll() is not None
        if path.exists():
            with open(path, "rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written: read again from here
                    offset += len(line)
                    yield json.loads(line)
        if ended:
            return
        time.sleep(poll_s)


def run_trial(point: dict[str, Any], tree: dict[str, Any], sweep: SweepConfig) -> None:
    """Train one configuration and report the metric's running mean after each step (runs inside a Ray worker)."""
    from ray import tune

    folder = Path(tune.get_context().get_trial_dir()).resolve()
    output = folder / "train"
    settings = with_values(tree, {**point, "train.output": str(output)})
    config.dump(settings, folder / "config.yaml")
    command = [sys.executable, "-m", "pipelines.cli", "train", str(folder / "config.yaml")]
    with open(folder / "train.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        values: list[float] = []
        try:
            for record in follow(output / "metrics.jsonl", process):
                values.append(float(record[sweep.metric]))
                mean = sum(values[-sweep.window :]) / len(values[-sweep.window :])
                tune.report({"value": mean, "step": record["step"]})
        finally:
            # ASHA ends a trial by ending this function: its training must not outlive it.
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if process.returncode != 0:
        tail = (folder / "train.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"training ended with {process.returncode}; the end of its log:\n{tail}")


SECTIONS = {"sweep": SweepConfig, "ray": RayConfig, "train": TrainConfig, "model": ModelConfig}


def command(path: str, overrides: Sequence[str]) -> int:
    """Do `ex4d sweep`: run the sweep of a config file; write its table and best.yaml; return the exit status."""
    loaded = config.load(path, SECTIONS, overrides)
    sweep, train = loaded["sweep"], loaded["train"]
    check_output("sweep.output", sweep.output)
    search_space(sweep.space)
    manifest.read_dataset(train.data)  # or each trial would find out for itself that there is none
    tree = config.read_yaml(path)
    for override in (o for o in overrides if o.startswith(("train.", "model."))):
        key, _, text = override.partition("=")
        tree = with_values(tree, {key: config.parse_value(text)})
    tree = with_values(tree, {"train.data": train.data, "train.num_steps": train.num_steps})
    results = run(sweep, loaded["ray"].address, {name: tree.get(name) or {} for name in ("model", "train")})
    return report(results, tree, sweep)


def run(sweep: SweepConfig, address: str | None, tree: dict[str, Any]) -> Any:
    """Return Ray Tune's ResultGrid of the sweep."""
    import functools

    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    num_steps = int(tree["train"]["num_steps"])
    tree = with_values(tree, {"train.wandb_group": sweep.group})
    tree = with_values(tree, {"train.data": str(Path(tree["train"]["data"]).resolve())})
    space = search_space(sweep.space)
    tuner = tune.Tuner(
        tune.with_resources(
            functools.partial(run_trial, tree=tree, sweep=sweep),
            {"cpu": sweep.cpus_per_trial, "gpu": sweep.gpus_per_trial},
        ),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="value",
            mode="min",
            num_samples=sweep.num_trials,
            max_concurrent_trials=sweep.max_concurrent,
            search_alg=OptunaSearch(seed=sweep.seed),
            scheduler=ASHAScheduler(
                time_attr="step",
                max_t=num_steps,
                grace_period=min(sweep.grace_steps, num_steps),
                reduction_factor=sweep.reduction_factor,
            ),
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(Path(sweep.output).resolve()),
            verbose=0,
            failure_config=tune.FailureConfig(),
        ),
    )
    with connected(address):
        return tuner.fit()


def report(results: Any, tree: dict[str, Any], sweep: SweepConfig) -> int:
    """Print the trials as a table, write sweep.json and best.yaml; return 1 where every trial failed."""
    from rich.console import Console
    from rich.table import Table

    rows: list[dict[str, Any]] = []
    for result in results:
        point = {key: value for key, value in (result.config or {}).items() if key in sweep.space}
        metrics = result.metrics or {}
        state = "failed" if result.error else "done"
        rows.append({"point": point, "value": metrics.get("value"), "step": metrics.get("step"), "state": state})
    rows.sort(key=lambda row: float("inf") if row["value"] is None or row["state"] == "failed" else row["value"])
    table = Table(title=f"sweep: {sweep.metric}, mean of the last {sweep.window} steps")
    for column in (*sweep.space, sweep.metric, "steps", "state"):
        table.add_column(column)
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:.5f}"
        table.add_row(*(f"{row['point'].get(key)!s:.10}" for key in sweep.space), value, str(row["step"]), row["state"])
    Console().print(table)
    output = Path(sweep.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n")
    if not rows or rows[0]["state"] == "failed" or rows[0]["value"] is None:
        print("every trial failed; see train.log in each trial's folder")
        return 1
    best = with_values(tree, {**rows[0]["point"], "train.output": str(output / "best")})
    config.dump(best, output / "best.yaml")
    print(f"best configuration: {output / 'best.yaml'}")
    return 0
