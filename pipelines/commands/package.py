"""Package what `ex4d submit` sends to a cluster: the job's settings in one file, and the small files that they name.

A cluster's nodes share storage with each other, but not with this machine. So outputs and datasets must be absolute
paths or URLs. A relative path must be a file on this machine, which is sent along; anything else is an error.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ex4d import config
from ex4d.errors import ConfigError
from ex4d.redact import redacted
from pipelines.commands.jobs import JOBS

FILE = "ex4d_submitted.yaml"
MAX_FILE_MB = 64
# Settings whose paths must be the same for all nodes.
SHARED = {
    "preprocess": ("preprocess.output",),
    "encode": ("encode.data", "encode.output"),
    "train": ("train.data", "train.output"),
    "sweep": ("train.data", "sweep.output"),
    "evaluate": ("evaluate.adapter", "evaluate.output"),
}
# Last components of other settings that may name files; test_submit.py compares them with every setting's help.
NAMES = (
    *("input", "list_root", "cache_dir", "depth_path", "tracker_path", "model", "base", "init_from", "adapter"),
    *("videos", "trajectories", "ranges", "generation", "image_features", "video_features", "lora", "file", "weights"),
)
CODE = ("ex4d", "pipelines")


def settings(job: str, path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the sections that a job reads, validated as by the job itself and adapted to run on a cluster.

    Raises:
        ConfigError: a setting is invalid, is a relative path although it must be shared, or contains a password.
    """
    module = importlib.import_module(JOBS[job])
    chosen = config.load(path, module.SECTIONS, overrides, getattr(module, "OPTIONAL", ()))
    tree = config.merged(path, module.SECTIONS, overrides)
    tree = {name: dict(tree[name] or {}) for name in module.SECTIONS if name in tree}
    if chosen["ray"].address not in (None, "auto"):
        allowed = "must be left out: the job runs on the cluster at --address"
        raise ConfigError("ray.address", chosen["ray"].address, allowed)
    tree["ray"] = {**tree.get("ray", {}), "address": "auto"}
    if job == "train":
        tree["train"] = {**tree.get("train", {}), "launcher": "ray"}
    shared = "must be an absolute path on storage that all nodes share, or a URL; relative, it is a folder here"
    for key in SHARED[job]:
        section, name = key.split(".")
        places = (
            [data.path for data in chosen["train"].datasets]
            if key == "train.data"
            else [getattr(chosen[section], name)]
        )
        for place in places:
            if "://" not in place and not os.path.isabs(place):
                raise ConfigError(key, place, shared)
    for key, text in _texts(tree):
        if "://" in text and urlsplit(text).password:
            allowed = "must have no password, which the cluster would store; give the nodes their own credentials"
            raise ConfigError(key, redacted(text), allowed)
    return tree


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of every text in nested mappings and lists."""
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _texts(child, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _texts(child, key)
    elif isinstance(value, str):
        yield key, value


def files(tree: Mapping[str, Any]) -> list[str]:
    """Return the relative paths of the files that the settings name and that have to be sent along.

    Raises:
        ConfigError: a path is a folder, a large file or outside of the current folder, or a list with files beside it.
    """
    paths = []
    for key, text in _texts(tree):
        if not set(key.split(".")) & set(NAMES):
            continue
        if key == "preprocess.input" and not os.path.exists(text):
            parts = [part.strip() for part in text.split(",")]
        else:
            parts = [text if os.path.exists(text) else text.rpartition(":")[0] or text]  # FILE:SCALE of a LoRA
        relative = [part for part in parts if "://" not in part and not os.path.isabs(part)]
        paths += [path for path in relative if _is_packed(key, path, tree)]
    return sorted(set(paths))


def _is_packed(key: str, path: str, tree: Mapping[str, Any]) -> bool:
    """Return False if a relative path names nothing here, e.g. a hub id. Raises ConfigError, see `files`."""
    is_input = key in ("preprocess.input", "evaluate.videos")
    if not os.path.isfile(path):
        if os.path.isdir(path) or is_input:
            what = "is a folder of this machine" if os.path.isdir(path) else "is relative and no file here"
            raise ConfigError(key, path, f"{what}; give an absolute path on storage that all nodes share, or a URL")
        return False
    if os.path.normpath(path).startswith(".."):
        raise ConfigError(key, path, "lies outside of this folder, so it is not sent; give an absolute path")
    if os.path.getsize(path) > MAX_FILE_MB << 20:
        raise ConfigError(key, path, f"is larger than {MAX_FILE_MB} MB; put it on storage that all nodes share")
    if is_input:
        _check_list(key, path, (tree.get("preprocess") or {}).get("list_root"))
    return True


def _check_list(key: str, path: str, root: str | None) -> None:
    """Raise ConfigError if an input file is not a list, or is a list of files in its own folder."""
    from pipelines.inputs import lists

    if not path.lower().endswith(lists.SUFFIXES):
        raise ConfigError(key, path, "is a file of this machine; put it on storage that all nodes share")
    entries = list(lists.read(os.path.abspath(path)))
    for text in (entry.path for entry in entries if "://" in entry.path):
        if urlsplit(text).password:
            allowed = (
                f"names {redacted(text)} with a password, which would be sent; give the nodes their own credentials"
            )
            raise ConfigError(key, path, allowed)
    if root is not None:
        return
    folder = os.path.dirname(os.path.abspath(path)) + os.sep
    for entry in entries:
        if not entry.reason and entry.path.startswith(folder):
            name = entry.path.removeprefix(folder)
            allowed = f"names {name}, beside itself on this machine; set preprocess.list_root to a shared folder"
            raise ConfigError(key, path, allowed)


def write(tree: Mapping[str, Any], paths: Sequence[str], folder: Path, with_code: bool) -> None:
    """Write what is sent into an empty folder: the settings as FILE, the files, and `with_code` our packages."""
    for path in paths:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for name in CODE if with_code else ():
        source = Path(str(importlib.import_module(name).__path__[0]))
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    config.dump(tree, folder / FILE)
