"""Describe every setting of a command in words, for `--help`, `ex4d config` and the reference page."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ex4d.config import format_value
from ex4d.config_settings import allowed_text, nested, rule_of

WIDTH = 100


@dataclass(frozen=True)
class Described:
    """One setting.

    Args:
        key: dotted name, including the section.
        default: as written in a file; None: it must be set, or it is a section that is not null by default.
        allowed: the allowed values, in words.
        help: what it means.
        group: title of its group; "" in the first group, which holds the most used settings.
        is_section: it is a mapping of the settings that follow.
        is_off: it belongs to a mapping that is null by default.
    """

    key: str
    default: str | None
    allowed: str
    help: str
    group: str
    is_section: bool = False
    is_off: bool = False


def describe(cls: type, section: str, is_off: bool = False) -> Iterator[Described]:
    """Yield each setting of a dataclass in the order of its fields; nested settings follow their field."""
    group = ""
    for field in dataclasses.fields(cls):
        rule = rule_of(cls, field.name)
        assert rule is not None, f"{cls.__name__}.{field.name} has no description"
        group = rule.group or group
        key, value = f"{section}.{field.name}", default_of(field)
        inner = nested(cls, field.name)
        text = None if value is dataclasses.MISSING else format_value(value)
        if inner is None:
            yield Described(key, text, allowed_text(cls, field.name), rule.help, group, is_off=is_off)
            continue
        shown = "null" if value is None else None
        yield Described(key, shown, "a mapping", rule.help, group, is_section=True, is_off=is_off)
        for deeper in describe(inner, key, is_off or value is None):
            yield dataclasses.replace(deeper, group=group)


def default_of(field: dataclasses.Field) -> Any:
    """Return a field's default, MISSING if it has none."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def about(cls: type) -> str:
    """Return the first paragraph of a dataclass's docstring, on one line."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def help_text(sections: Mapping[str, type], first: str) -> str:
    """Return text for a terminal with every setting of the sections, the section `first` at the top."""
    lines = ["settings (section.key=value on the command line, or section: {key: value} in the file):"]
    for name in _ordered(sections, first):
        lines += ["", f"{name}: {about(sections[name])}"]
        group = ""
        for one in describe(sections[name], name):
            if one.group != group:
                group = one.group
                lines += ["", f"  {group}"]
            default = "" if one.default is None else f"={one.default}"
            lines.append(f"    {one.key}{default}")
            allowed = "" if one.is_section else f" ({one.allowed})"
            lines += [f"        {line}" for line in _wrapped(one.help + allowed)]
    return "\n".join(lines) + "\n"


def template(sections: Mapping[str, type], first: str, optional: Sequence[str] = ()) -> str:
    """Return a complete commented YAML file; loaded, it equals the defaults.

    Args:
        sections: the sections that the command reads; `first` comes first.
        optional: sections that are commented out, because their presence changes what the file means.
    """
    lines = [f"# ex4d {first}: every setting with its default. Delete those that you do not change."]
    for name in _ordered(sections, first):
        body = [f"{name}:  # {about(sections[name])}", *_yaml(describe(sections[name], name))]
        lines += ["", *(f"# {line}".rstrip() if name in optional else line for line in body)]
    return "\n".join(lines) + "\n"


def _yaml(settings: Iterator[Described]) -> Iterator[str]:
    group = ""
    for one in settings:
        if one.group != group:
            group = one.group
            yield f"\n  # {group}"
        parts = one.key.split(".")
        indent = "  " * (len(parts) - 1)
        allowed = "" if one.is_section else f" ({one.allowed})"
        yield from (f"{indent}# {line}" for line in _wrapped(one.help + allowed))
        value = "" if one.is_section and one.default is None else f" {one.default or 'REQUIRED'}"
        yield f"{indent}{'# ' if one.is_off else ''}{parts[-1]}:{value}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _ordered(sections: Mapping[str, type], first: str) -> list[str]:
    return sorted(sections, key=lambda name: name != first)
