"""Load configuration: one YAML file, one section per command, frozen dataclasses. The project's only YAML reader.

A dataclass lives beside the code that reads it; its fields are declared by `setting`. `load` fills it from the YAML
section of the same name, applies `section.key=value` overrides from the command line, and validates once: keys, types
and ranges. There is no interpolation and there are no import strings; `None` (YAML `null`) means off.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ex4d import storage, text
from ex4d.config_settings import check_keys, checked, keys, must_be, nested, setting
from ex4d.errors import ConfigError
from ex4d.redact import SECRET, without_secrets

__all__ = ["checked", "dump", "fingerprint", "load", "merged", "read_yaml", "setting", "to_dict", "validate"]

MAX_BYTES, MAX_VALUES = 2**20, 100_000  # of a configuration file

# Every section that a file may have. A command reads some of them; a misspelt section is an error in every command.
SECTIONS = ("ray", "synthetic", "preprocess", "encode", "model", "train", "generate", "evaluate", "sweep", "plan")


def load(
    path: str | Path, sections: Mapping[str, type], overrides: Sequence[str] = (), optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Load {section: validated dataclass} for the given sections of the YAML file at `path`.

    Args:
        path: YAML file; a mapping of section names (see SECTIONS) to mappings.
        sections: {"train": TrainConfig, ...}: what this command reads. A section missing in the file takes defaults.
        overrides: "section.key=value" strings, values parsed as YAML; the section must be one that this command reads.
        optional: sections that are None in the result if neither the file nor an override has them.

    Raises:
        ConfigError: unreadable file, unknown section or key, wrong type or value. Names key, value, what is allowed.
    """
    tree = merged(path, sections, overrides)
    known = [key for name, cls in sections.items() for key in keys(cls, name)]
    for name, cls in sections.items():
        check_keys(cls, tree.get(name) or {}, name, known)
    return {
        name: None if name in optional and name not in tree else validate(cls, tree.get(name) or {}, name)
        for name, cls in sections.items()
    }


def merged(path: str | Path, sections: Iterable[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the YAML file at `path` as a mapping with overrides applied; sections are checked, their keys are not.

    Raises:
        ConfigError: an unreadable file, an unknown section, or an override of a section that is not in `sections`.
    """
    tree = read_yaml(path)
    for name, body in tree.items():
        if name not in SECTIONS:
            raise ConfigError(str(name), body, f"unknown section in {path}{nearest(str(name), SECTIONS)}")
        if body is not None and not isinstance(body, dict):
            raise ConfigError(str(name), body, f"a section of {path} must be a mapping of keys to values")
    for override in overrides:
        _apply_override(tree, override, allowed=tuple(sections))
    _check_kept({name: tree.get(name) for name in sections})
    return tree


def _check_kept(tree: Any, path: str = "") -> None:
    """Raise ConfigError for a URL whose secret was removed when a run saved its settings, and for NUL in text."""
    if isinstance(tree, dict):
        for name, child in tree.items():
            _check_kept(child, f"{path}.{name}".removeprefix("."))
    elif "\0" in str(tree):
        raise ConfigError(path, tree, "text without the character NUL")
    elif SECRET in str(tree):  # an override replaces a list as a whole
        raise ConfigError(path, tree, f"its password or signature was not kept; give the URL again, as {path}=…")


def nearest(word: str, allowed: Sequence[str]) -> str:
    """Return the end of an error message: the allowed word that is most like `word`, or all of them."""
    close = difflib.get_close_matches(word, allowed, 1)
    return f". Did you mean {close[0]}?" if close else f"; allowed: {', '.join(allowed)}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file as a mapping. Raises ConfigError if it is missing, too large, not YAML, or not a mapping."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError("config", str(path), f"cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise ConfigError("config", str(path), f"is larger than {MAX_BYTES} bytes")
    try:
        tree = _parse(text.decode(data))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError("config", str(path), f"is not valid YAML: {_in_one_line(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("config", str(path), "must hold a mapping of sections")
    return tree


def _in_one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
    return " ".join(problem.split()) + (f", line {mark.line + 1}" if mark else "")


class _Loader(yaml.SafeLoader):
    """Load only YAML's plain types. Only `true` and `false` are booleans; no key may appear twice in a mapping."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            keys.add(str(key.value))
        return node


# YAML 1.1 also reads on, off, yes and no as booleans, 12:00:00 as a number in base 60 and 2026-11-26 as a date: a word
# such as preprocess.near_duplicates=off, a time limit or a name would not be text. A boolean setting still accepts
# these words, because validation converts them.
_PLAIN = {
    "bool": ("^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": ("^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$", "-+0123456789"),
    "float": (
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}
_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in (*_PLAIN, "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))


def _parse(text: str) -> Any:
    """Parse YAML. Raises YAMLError, ValueError (an invalid number, too many values) or RecursionError."""
    tree = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    # A few lines of nested aliases can stand for billions of values, an alias of itself for infinitely many.
    open_nodes, count = [tree], 0
    while open_nodes:
        node = open_nodes.pop()
        count += 1
        if count > MAX_VALUES:
            raise ValueError(f"its aliases expand to more than {MAX_VALUES} values")
        if isinstance(node, dict | list):
            open_nodes.extend(node.values() if isinstance(node, dict) else node)
    return tree


def validate(cls: type, values: Mapping[str, Any], section: str) -> Any:
    """Build an instance of the dataclass `cls` from plain values.

    Raises:
        ConfigError: an unknown key, a wrong type, or a value out of its range.
    """
    check_keys(cls, values, section)
    try:
        return _adapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        raise _type_error(cls, section, first["loc"], values, first["msg"]) from None


def _type_error(cls: type, prefix: str, loc: Sequence[Any], values: Any, message: str) -> ConfigError:
    """Return the error for the setting at `loc`, pydantic's path to it, which also has a step for a union's member."""
    name, *rest = loc or ("",)
    if name not in {field.name for field in dataclasses.fields(cls)}:
        return ConfigError(prefix, values, message)
    inner, value = nested(cls, name), values.get(name)
    if inner is not None and rest and isinstance(value, Mapping):
        while rest and rest[0] not in {field.name for field in dataclasses.fields(inner)}:
            rest = rest[1:]
        return _type_error(inner, f"{prefix}.{name}", rest, value, message)
    if name not in values:
        return ConfigError(f"{prefix}.{name}", None, f"is required: {must_be(cls, name)}")
    return ConfigError(f"{prefix}.{name}", value, must_be(cls, name, value))


@cache
def _adapter(cls: type) -> TypeAdapter:
    return TypeAdapter(cls)


def _apply_override(tree: dict[str, Any], override: str, allowed: tuple[str, ...]) -> None:
    key, equals, text = override.partition("=")
    section, dot, rest = key.partition(".")
    if not equals or not dot or not rest:
        raise ConfigError("override", override, "write section.key=value, e.g. train.num_steps=20")
    if section not in allowed:
        raise ConfigError(key, text, f"this command reads no section {section!r}{nearest(section, allowed)}")
    value = parse_value(text, key)
    node = tree[section] = dict(tree.get(section) or {})
    *parents, leaf = rest.split(".")
    for parent in parents:
        child = node.get(parent)
        node[parent] = dict(child) if isinstance(child, dict) else {}
        node = node[parent]
    node[leaf] = value


def parse_value(text: str, key: str = "value") -> Any:
    """Parse a value from one line of YAML. Raises ConfigError if it is not YAML."""
    try:
        return _parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(key, text, f"is not a YAML value: {_in_one_line(error)}") from error


def format_value(value: Any) -> str:
    """Format a value as one line of YAML, which `parse_value` reads back."""
    text = yaml.safe_dump(to_plain(value), default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def to_plain(value: Any) -> Any:
    """Convert to JSON-serialisable values: tuples become lists, unknown types text."""
    return json.loads(json.dumps(value, default=str))


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to plain JSON-serialisable values."""
    return to_plain(dataclasses.asdict(config))


def fingerprint(*parts: Any) -> str:
    """Return 16 hex digits that identify the parts (JSON-serialisable values or dataclasses): equal for equal parts."""
    return Digest().of(*parts)


class Digest:
    """Fingerprints with the same first parts: `Digest(a).of(b) == fingerprint(a, b)`, but `a` is serialised once."""

    def __init__(self, *parts: Any):
        self._begun = "[" + "".join(f"{_plain_json(part)}," for part in parts)

    def of(self, *parts: Any) -> str:
        """Return the fingerprint of all parts."""
        text = self._begun + "".join(f"{_plain_json(part)}," for part in parts)
        return hashlib.sha256(f"{text.removesuffix(',')}]".encode()).hexdigest()[:16]


def _plain_json(part: Any) -> str:
    if isinstance(part, str):  # the same text as below, faster
        return encode_basestring_ascii(part)
    plain = to_dict(part) if dataclasses.is_dataclass(part) and not isinstance(part, type) else part
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), default=str)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return {package: version} of the packages that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def dump(config: Mapping[str, Any], path: str | Path) -> None:
    """Write {section: dataclass or mapping} as YAML that `load` reads back, without the secrets of URLs."""
    plain = {name: to_dict(body) if dataclasses.is_dataclass(body) else body for name, body in config.items()}
    storage.write_bytes(path, to_yaml(without_secrets(plain)).encode())


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Format plain values as YAML, keeping the order of keys."""
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
