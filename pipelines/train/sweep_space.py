"""The search space of a sweep: which settings vary, how, and under which condition. A trial trains at one point of it.

train.lr: {log_uniform: [1.0e-5, 1.0e-3]}
train.warmup_steps: {int_uniform: [0, 100, 10]}                  the third number is a step
train.lr_decay: {choice: [none, cosine]}
model.lora_rank: {choice: [16, 32]}
model.lora_alpha: "=model.lora_rank"                             always equal to that setting
train.hole_weight: {uniform: [1, 4], when: {train.lr_decay: [cosine]}}     otherwise the file's own value
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ex4d import config
from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig
from ex4d.train.config import TrainConfig

SECTIONS = {"train": TrainConfig, "model": ModelConfig}
KINDS = ("uniform", "log_uniform", "int_uniform", "log_int_uniform", "choice")
# The sweep itself sets the output and the validation of a trial.
FIXED = (
    *("train.data", "train.output", "train.num_steps", "train.dry_run", "train.launcher", "train.validate_every"),
    *("train.validate_samples", "train.validate_apart", "train.num_processes", "train.min_processes"),
)


@dataclass(frozen=True)
class Axis:
    """One setting that varies.

    Args:
        kind: one of KINDS. values: the choices, or [low, high] or [low, high, step], with both ends included.
        when: {key: values of that setting} for which this one varies.
    """

    key: str
    kind: str
    values: tuple[Any, ...]
    when: Mapping[str, Sequence[Any]]

    def suggest(self, trial: Any) -> Any:
        """Return the value that an Optuna trial suggests."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, self.values)
        low, high, *step = self.values
        log = self.kind.startswith("log_")
        suggest = trial.suggest_int if "int" in self.kind else trial.suggest_float
        return suggest(self.key, low, high, log=log, **({"step": step[0]} if step else {}))

    def distribution(self) -> Any:
        """Return the axis as an Optuna distribution. Raises ValueError for invalid numbers."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.values)
        low, high, *step = self.values
        log = self.kind.startswith("log_")
        if "int" in self.kind:
            return distributions.IntDistribution(low, high, log=log, step=step[0] if step else 1)
        return distributions.FloatDistribution(low, high, log=log, step=step[0] if step else None)

    def holds(self, value: Any) -> bool:
        """Return True if a value lies on the axis."""
        if self.kind == "choice":
            return value in self.values
        low, high, *_ = self.values
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Space:
    """The axes, in the order of the file, and the settings that follow another one: {key: the other's key}."""

    axes: tuple[Axis, ...]
    follows: Mapping[str, str]

    @classmethod
    def of(cls, space: Mapping[str, Any]) -> Space:
        """Parse the setting `sweep.space`. Raises ConfigError if an entry is invalid."""
        axes: dict[str, Axis] = {}
        follows: dict[str, str] = {}
        for key, body in space.items():
            _check_key(key)
            if isinstance(body, str) and body.startswith("="):
                other = body[1:].strip()
                follows[key] = other if "." in other else f"{key.split('.')[0]}.{other}"
                _check_key(follows[key])
                continue
            axes[key] = _axis(key, body, axes)
        if not axes:
            raise ConfigError("sweep.space", dict(space), "must have at least one setting that varies")
        return cls(tuple(axes.values()), follows)

    def active(self, axis: Axis, point: Mapping[str, Any]) -> bool:
        """Return True if an axis varies at a point."""
        return all(point.get(key) in values for key, values in axis.when.items())

    def define(self, trial: Any) -> None:
        """Suggest a value on each active axis (Optuna's define-by-run)."""
        point: dict[str, Any] = {}
        for axis in self.axes:
            if self.active(axis, point):
                point[axis.key] = axis.suggest(trial)

    def whole(self, point: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return a point plus the settings that follow others, whose values may come from the file's own tree."""
        full = {axis.key: point[axis.key] for axis in self.axes if axis.key in point and self.active(axis, point)}
        for key, other in self.follows.items():
            full[key] = full[other] if other in full else value_in(tree, other)
        return full

    def grid(self) -> list[dict[str, Any]]:
        """Return all points of the grid. Raises ConfigError if an axis has no steps."""
        for axis in self.axes:
            countable = "int" in axis.kind or len(axis.values) == 3
            if axis.kind.startswith("log_") or not (axis.kind == "choice" or countable):
                allowed = "choice, or [low, high, step]: sweep.search=grid takes every value"
                raise ConfigError(f"sweep.space.{axis.key}", list(axis.values), allowed)
        points: list[dict[str, Any]] = []
        for values in itertools.product(*(_steps(axis) for axis in self.axes)):
            drawn = dict(zip((axis.key for axis in self.axes), values, strict=True))
            point = {axis.key: drawn[axis.key] for axis in self.axes if self.active(axis, drawn)}
            if point not in points:
                points.append(point)
        return points

    def today(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Return the first point: the file's own values, as far as they lie in the space."""
        values = {axis.key: value_in(tree, axis.key) for axis in self.axes}
        inside = [axis.key for axis in self.axes if axis.holds(values[axis.key]) and self.active(axis, values)]
        return {key: values[key] for key in inside}


def _check_key(key: str) -> None:
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        raise ConfigError("sweep.space", key, "keys must start with train. or model.")
    if key == "train.expert":
        allowed = "cannot vary: the two are measured at different noise; sweep each, with train.expert=high or low"
        raise ConfigError("sweep.space", key, allowed)
    if key in FIXED:
        raise ConfigError("sweep.space", key, "cannot vary: the sweep sets it")
    default = config.to_dict(SECTIONS[section]())
    for part in name.split("."):
        if not isinstance(default, dict) or part not in default:
            raise ConfigError("sweep.space", key, f"not a setting of the section {section}; see `ex4d train --help`")
        default = default[part]


def _axis(key: str, body: Any, before: Mapping[str, Axis]) -> Axis:
    where = f"sweep.space.{key}"
    if not isinstance(body, Mapping):
        raise ConfigError(where, body, '{KIND: [values]} or "=OTHER_KEY"')
    kinds = [kind for kind in body if kind != "when"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        raise ConfigError(where, dict(body), f"must be one of {', '.join(KINDS)}, with [values]")
    (kind,), values, when = kinds, body[kinds[0]], body.get("when") or {}
    if not isinstance(values, list) or not values or (kind != "choice" and len(values) not in (2, 3)):
        raise ConfigError(where, values, "choice takes values, the others [low, high] or [low, high, step]")
    usable = isinstance(when, Mapping) and all(k in before and isinstance(v, list) for k, v in when.items())
    if not usable:
        raise ConfigError(f"{where}.when", when, "must be {KEY: [values]} of earlier settings in sweep.space")
    try:
        if kind in ("uniform", "log_uniform"):
            values = [float(value) for value in values]
        axis = Axis(key, kind, tuple(values), when)
        axis.distribution()
        for value in values if kind == "choice" else values[:2]:
            section, _, name = key.partition(".")
            config.validate(SECTIONS[section], with_values({}, {name: value}), section)  # else every trial would fail
    except (ValueError, TypeError) as error:
        raise ConfigError(where, values, str(error)) from error
    return axis


def _steps(axis: Axis) -> list[Any]:
    if axis.kind == "choice":
        return list(axis.values)
    low, high, *rest = axis.values
    step = rest[0] if rest else 1
    return [low + index * step for index in range(int((high - low) / step + 1e-9) + 1)]


def value_in(tree: Mapping[str, Any], key: str) -> Any:
    """Return a setting's value in a config tree, or its default."""
    section, *parts = key.split(".")
    for node in (tree.get(section) or {}, config.to_dict(SECTIONS[section]())):
        for part in parts:
            node = node.get(part, _MISSING) if isinstance(node, Mapping) else _MISSING
        if node is not _MISSING:
            return node
    raise ConfigError("sweep.space", key, f"a setting of the section {section}")


_MISSING = object()


def with_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config tree with {"section.key": value} applied."""
    copy = json.loads(json.dumps(tree, default=str))  # YAML may contain dates
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = copy
        for parent in parents:
            if not isinstance(node.get(parent), dict):  # a section may be empty
                node[parent] = {}
            node = node[parent]
        node[leaf] = value
    return copy
