"""Declare settings: fields of frozen dataclasses, each with its description and allowed range.

Validation, `--help`, `ex4d config`, the reference pages and the flags of commands all read these fields.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ex4d.errors import ConfigError

KEY = "setting"  # key in a field's metadata


@dataclass(frozen=True)
class Setting:
    """The description and rules of a field. The bounds of a list apply to each of its items.

    Args:
        help: one plain line.
        ge, gt, le, lt: bounds of a number: at least, greater than, at most, less than.
        multiple_of: the number must be a multiple of this.
        not_empty: text, a list or a mapping must not be empty.
        choices: the allowed words, if a table defines them; words that are defined nowhere else are a Literal type.
        group: title of the group of settings that starts here, for help pages.
    """

    help: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int | None = None
    not_empty: bool = False
    choices: Iterable[str] = ()
    group: str | None = None

    def accepts(self, value: Any, words: Sequence[str] = ()) -> bool:
        """Return whether a value of the right type is in range; text must be one of `words`, if there are any.

        None is always accepted here: the type decides whether it is allowed.
        """
        if value is None or isinstance(value, bool):
            return True
        if isinstance(value, int | float):
            return math.isfinite(value) and all(
                (
                    self.ge is None or value >= self.ge,
                    self.gt is None or value > self.gt,
                    self.le is None or value <= self.le,
                    self.lt is None or value < self.lt,
                    self.multiple_of is None or value % self.multiple_of == 0,
                )
            )
        if self.not_empty and isinstance(value, str | list | tuple | dict) and not value:
            return False
        if isinstance(value, list | tuple):
            return all(self.accepts(item, words) for item in value)
        return not words or not isinstance(value, str) or value in words

    @property
    def range(self) -> str:
        """The allowed range in words, "" if there is none."""
        bounds = {"at least": self.ge, "greater than": self.gt, "at most": self.le, "less than": self.lt}
        words = " and ".join(f"{word} {_plain(bound)}" for word, bound in bounds.items() if bound is not None)
        if self.ge is not None and self.le is not None:
            words = f"from {_plain(self.ge)} to {_plain(self.le)}"
        multiple = f"a multiple of {self.multiple_of}" if self.multiple_of else ""
        return ", ".join(part for part in (words, multiple, "not empty" if self.not_empty else "") if part)


def setting(default: Any, help: str, **rules: Any) -> Any:
    """Declare a dataclass field with a default, a description and the rules of `Setting`.

    Args:
        default: MISSING if the setting is required; each instance gets its own copy of a list or mapping.
        help: one plain line.
        rules: other arguments of `Setting`.
    """
    metadata = {KEY: Setting(help, **rules)}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


Need = Callable[[bool, str, str], None]


def checked(config: Any, section: str = "") -> Need:
    """Check each setting of a dataclass against its own range, and return a function for the rules between settings.

    Args:
        config: the dataclass; call this from its `__post_init__`.
        section: dotted name of its mapping in a file, such as "train" or "train.loader"; "" for flags of a command.

    Returns:
        need(holds, name, allowed), which raises a ConfigError that names the setting `name` (dotted if nested)
        unless `holds`.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def need(holds: bool, name: str, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{section}.{name}".removeprefix("."), operator.attrgetter(name)(config), allowed)

    for field in dataclasses.fields(config):
        rule = field.metadata.get(KEY)
        value = getattr(config, field.name)
        if rule is not None and not rule.accepts(value, choices_of(type(config), field.name)):
            need(False, field.name, must_be(type(config), field.name, value))
    return need


def must_be(cls: type, name: str, value: Any = None) -> str:
    """Return what the setting `name` must be, with the nearest choice if `value` is a misspelt one."""
    allowed = f"must be {allowed_text(cls, name)}"
    close = difflib.get_close_matches(value, choices_of(cls, name), 1) if isinstance(value, str) else []
    return f"{allowed}. Did you mean {close[0]}?" if close else allowed


def allowed_text(cls: type, name: str) -> str:
    """Return the allowed values of a setting in words, such as "an integer, at least 1, or null"."""
    hint, rule = hints(cls)[name], rule_of(cls, name)
    choices = tuple(rule.choices) if rule is not None else ()
    words = [_type_text(part, choices) for part in _members(hint) if part is not type(None)]
    parts = [" or ".join(dict.fromkeys(words))]
    if rule is not None and rule.range:
        parts.append(rule.range)
    if type(None) in _members(hint):
        parts.append("or null")
    return ", ".join(parts)


def rule_of(cls: type, name: str) -> Setting | None:
    """Return a field's Setting, None if it has none."""
    return next(field.metadata.get(KEY) for field in dataclasses.fields(cls) if field.name == name)


@cache
def hints(cls: type) -> dict[str, Any]:
    """Return {field: type} of a dataclass."""
    return typing.get_type_hints(cls)


def nested(cls: type, name: str) -> type | None:
    """Return the dataclass type of a field, optional or not; None if it holds plain values."""
    members = _members(hints(cls)[name])
    return next((part for part in members if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


def choices_of(cls: type, name: str) -> tuple[str, ...]:
    """Return the allowed words of a setting, or of its items; () if it is not restricted."""
    rule = rule_of(cls, name)
    if rule is not None and rule.choices:
        return tuple(rule.choices)
    parts = [deep for part in _members(hints(cls)[name]) for deep in (part, *typing.get_args(part))]
    return tuple(str(word) for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part))


def keys(cls: type, prefix: str) -> Iterator[str]:
    """Yield the dotted name of every setting below `prefix`, including nested dataclasses."""
    for field in dataclasses.fields(cls):
        yield f"{prefix}.{field.name}"
        inner = nested(cls, field.name)
        if inner is not None:
            yield from keys(inner, f"{prefix}.{field.name}")


def check_keys(cls: type, values: Mapping[Any, Any], prefix: str, known: Iterable[str] = ()) -> None:
    """Raise ConfigError for the first unknown key in `values`; the message names the nearest known one.

    Args:
        prefix: dotted name of the mapping, for messages.
        known: dotted names of all settings that the command reads; if empty, those below `prefix`.
    """
    known = tuple(known) or tuple(keys(cls, prefix))
    names = {field.name for field in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in names:
            raise ConfigError(f"{prefix}.{name}", value, _unknown(cls, str(name), value, prefix, known))
        inner = nested(cls, name)
        if inner is not None and isinstance(value, Mapping):
            check_keys(inner, value, f"{prefix}.{name}", known)


def _unknown(cls: type, name: str, value: Any, prefix: str, known: Iterable[str]) -> str:
    """Return a message that says what to write instead of an unknown key."""
    renamed = getattr(cls, "RENAMED", {}).get(name)
    if renamed is not None:
        return renamed
    siblings = [field.name for field in dataclasses.fields(cls)]
    close = difflib.get_close_matches(name, siblings, 1)
    if close:
        words = difflib.get_close_matches(value, choices_of(cls, close[0]), 1) if isinstance(value, str) else []
        return f"unknown setting. Did you mean {prefix}.{close[0]}{f'={words[0]}' if words else ''}?"
    leaves = {key.rpartition(".")[2]: key for key in known}
    elsewhere = difflib.get_close_matches(name, leaves, 1)
    if elsewhere:
        return f"unknown setting. Did you mean {leaves[elsewhere[0]]}?"
    return f"unknown setting; allowed in {prefix}: {', '.join(siblings)}"


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _type_text(hint: Any, choices: tuple[str, ...] = ()) -> str:
    plain = {int: "an integer", float: "a number", str: "text", bool: "true or false", Any: "any value"}
    if choices and hint is str:
        return f"one of {', '.join(choices)}"
    if hint in plain:
        return plain[hint]
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(str(word) for word in inner)}" if len(inner) > 1 else str(inner[0])
    if origin is tuple and Ellipsis not in inner:
        return f"[{', '.join(_type_text(item).removeprefix('an ').removeprefix('a ') for item in inner)}]"
    if origin in (tuple, list):
        words = {int: "integers", float: "numbers", str: "texts"}
        plural = None if choices else words.get(inner[0])
        return f"a list of {plural or _type_text(inner[0], choices).removeprefix('one of ')}"
    return "a mapping"


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)
