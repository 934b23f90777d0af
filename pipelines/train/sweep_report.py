"""Report the results of a sweep: a table, sweep.json, best.yaml and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ex4d import config, storage
from pipelines.train.sweep_board import short
from pipelines.train.sweep_config import SweepConfig
from pipelines.train.sweep_space import Space, value_in, with_values


def ranked(rows: Sequence[Mapping[str, Any]], sweep: SweepConfig, tree: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the trials, best first: by the furthest step, then the lowest value; failed trials come last.

    Values at different steps cannot be compared, since they differ by training time and not only by the settings.
    """
    space, last = Space.of(sweep.space), int(tree["train"]["num_steps"])
    result = []
    for row in rows:
        bad = row["error"] is not None or row["value"] is None or not math.isfinite(row["value"])
        ended = "failed" if bad else "finished" if row["step"] >= last else "stopped"
        state = ended if row["ended"] else "interrupted"
        metrics = {name: row["metrics"].get(name) for name in sweep.report}
        facts = {key: row[key] for key in ("value", "step", "error", "curve", "folder")}
        result.append({"point": space.whole(row["drawn"], tree), "state": state, **facts, "metrics": metrics})
    result.sort(key=lambda row: (row["state"] == "failed", -(row["step"] or 0), row["value"] or 0.0))
    return result


def importance(rows: Sequence[Mapping[str, Any]], sweep: SweepConfig) -> dict[str, float]:
    """Return the importance of each setting, by PED-ANOVA over the trials; {} for fewer than four trials."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = Space.of(sweep.space)
    study = optuna.create_study()
    usable = [row for row in rows if row["state"] != "failed"]
    axes = [axis for axis in space.axes if all(axis.key in row["point"] for row in usable)]
    if len(usable) < 4 or not axes:
        return {}
    for row in usable:
        params = {axis.key: row["point"][axis.key] for axis in axes}
        ranges = {axis.key: axis.distribution() for axis in axes}
        # Rank, not value: values of different steps cannot be compared.
        value = float(usable.index(row))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))
    shares = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {key: 0.0 if math.isnan(value) else float(value) for key, value in shares.items()}


def verdict(noise: Mapping[str, Sequence[Mapping[str, Any]]], sweep: SweepConfig) -> str:
    """Return one sentence: whether the best point beats the file's own values by more than chance."""
    values = {name: [row["value"] for row in rows if row["value"] is not None] for name, rows in noise.items()}
    if any(not numbers for numbers in values.values()) or not values:
        return "Not repeated with other seeds, so it is unknown how much of the difference is chance."
    best, default = values["best"], values["default"]
    gain = sum(default) / len(default) - sum(best) / len(best)
    spread = max(max(numbers) - min(numbers) for numbers in (best, default))
    means = f"{sum(best) / len(best):.5f} against {sum(default) / len(default):.5f}"
    figures = f"{sweep.metric} {means}, spread {spread:.5f}"
    if gain > spread:
        return f"Better than the file's own values by more than the spread of {len(best)} seeds ({figures})."
    return f"Not better than the file's own values by more than the spread of {len(best)} seeds ({figures})."


def write(
    rows: list[dict[str, Any]],
    noise: Mapping[str, Sequence[Mapping[str, Any]]],
    tree: dict[str, Any],
    sweep: SweepConfig,
) -> int:
    """Print the table; write sweep.json, best.yaml and the page; return 1 if all trials failed, else 0."""
    output = Path(sweep.output)
    output.mkdir(parents=True, exist_ok=True)
    note = verdict(noise, sweep)
    write_json(rows, noise, note, sweep)
    _print_table(rows, sweep)
    if not rows or rows[0]["state"] == "failed":
        print(f"every trial failed; see train.log in the folders of {output / 'trials'}")
        return 1
    best = with_values(tree, {**rows[0]["point"], "train.output": str(output / "best")})
    best = with_values(best, {"train.seed": value_in(best, "train.seed")})
    furthest = [row for row in rows if row["state"] != "failed" and row["step"] == rows[0]["step"]]
    reason = (
        f"# Lowest {sweep.metric} ({rows[0]['value']:.6g}) of the {len(furthest)} of {len(rows)} trials that reached "
        f"step {rows[0]['step']}; train.seed={best['train']['seed']}.\n# {note}\n"
    )
    storage.write_bytes(output / "best.yaml", (reason + config.to_yaml(best)).encode())
    page = write_page(rows, noise, note, sweep)
    print(f"best configuration: {output / 'best.yaml'}\n{note}\npage: {page}")
    return 0


def write_json(
    rows: Sequence[Mapping[str, Any]], noise: Mapping[str, Sequence[Mapping[str, Any]]], note: str, sweep: SweepConfig
) -> None:
    """Write OUTPUT/sweep.json: the trials, best first, the repetitions with other seeds, and the verdict."""
    repeats = {
        name: [{"value": row["value"], "step": row["step"]} for row in results] for name, results in noise.items()
    }
    whole = {"metric": sweep.metric, "trials": rows, "repeats": repeats, "verdict": note}
    storage.write_bytes(Path(sweep.output) / "sweep.json", (json.dumps(whole, indent=2) + "\n").encode())


def _print_table(rows: Sequence[Mapping[str, Any]], sweep: SweepConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"sweep: {sweep.metric}, the furthest first")
    keys = list(sweep.space)
    for column in (*keys, sweep.metric, "step", "state"):
        table.add_column(column)
    for row in rows:
        value = "-" if row["value"] is None else f"{row['value']:.5f}"
        cells = (short(row["point"].get(key, "-")) for key in keys)
        table.add_row(*cells, value, str(row["step"] or "-"), row["state"])
    Console(force_terminal=False, markup=False).print(table)
    for row in rows:
        if row["state"] == "failed":
            point = ", ".join(f"{key}={short(value)}" for key, value in row["point"].items())
            print(f"failed: {point}: {row['error'] or 'its value is not a finite number'}")


def write_page(
    rows: Sequence[Mapping[str, Any]], noise: Mapping[str, Sequence[Mapping[str, Any]]], note: str, sweep: SweepConfig
) -> Path:
    """Write OUTPUT/report/index.html and return its path."""
    from ex4d.viewer import sweep_page

    keys = [axis.key for axis in Space.of(sweep.space).axes]
    path = Path(sweep.output) / "report" / "index.html"
    values = {name: [row["value"] for row in results if row["value"] is not None] for name, results in noise.items()}
    storage.write_bytes(path, sweep_page.sweep_page(sweep.metric, keys, rows, importance(rows, sweep), values, note))
    return path
