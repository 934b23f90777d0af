"""Flags that several commands share: depth and camera path."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ex4d.config_help import default_of
from ex4d.config_settings import choices_of, hints, rule_of
from ex4d.depth import AUTO, DepthRequest
from ex4d.errors import ConfigError
from ex4d.reconstruct_config import ReconstructConfig

# The settings of ReconstructConfig that are flags of `reconstruct`, `generate` and `view`.
PATH = (
    *("depth", "depth_path", "depth_python", "depth_fill_px", "trajectory", "angle_deg", "trajectory_options"),
    *("cameras", "source_poses", "source_scale", "source_motion", "first_frame", "persistent_frames"),
    *("image_fps", "fov_deg", "profile", "backend", "seed"),
)


def add(parser: argparse.ArgumentParser, cls: type, names: Collection[str] = ()) -> None:
    """Add a flag for each setting of a dataclass, or for those in `names`: `--num-frames` for `num_frames`.

    A list or mapping becomes a repeatable flag; for a mapping `xs` it is `--x KEY=VALUE`.
    """
    for field in dataclasses.fields(cls):
        if names and field.name not in names:
            continue
        rule, default = rule_of(cls, field.name), default_of(field)
        assert rule is not None
        flag, choices = f"--{field.name.replace('_', '-')}", ", ".join(choices_of(cls, field.name))
        notes = (
            f"one of {choices}" if choices else "",
            "" if default in (None, "", False, (), {}) else f"default: {default}",
        )
        shown = "; ".join(note for note in notes if note)
        # Omitting a flag corresponds to null in a file.
        help = f"{rule.help.replace('null:', 'default:')}{f' ({shown})' if shown else ''}".replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=help)
        elif isinstance(default, tuple | Mapping):
            flag = flag.removesuffix("s") if isinstance(default, Mapping) else flag
            names_of_flag = (flag, f"-{field.name[0]}")
            parser.add_argument(
                *names_of_flag, action="append", default=[], dest=field.name, metavar="VALUE", help=help
            )
        else:
            hint = hints(cls)[field.name]
            kind = next((kind for kind in (int, float) if hint in (kind, kind | None)), str)
            parser.add_argument(flag, type=kind, default=default, help=help)


def read(args: argparse.Namespace, cls: type) -> Any:
    """Build the dataclass instance from the flags of `add`. Raises ConfigError for a value out of range."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def path(args: argparse.Namespace, video_path: str) -> dict[str, Any]:
    """Return the settings of ReconstructConfig from the flags of PATH, `--size` and `--num-frames`.

    Prints which estimator `--depth auto` chose for this video. Raises ConfigError for a value out of range.
    """
    values = {name: getattr(args, name) for name in (*PATH, "size", "num_frames")}
    values["trajectory_options"] = dict(_option(text) for text in args.trajectory_options)
    ReconstructConfig(**values)
    if args.depth == AUTO:
        from ex4d.depth import auto, places

        request = DepthRequest(video_path, twin=places.twin_of(video_path))
        values["depth"], choice = auto.choose([request], args.depth_path)
        print(choice)
    return values


def _option(text: str) -> tuple[str, float | bool | str]:
    """Parse KEY=VALUE to (key, value): a number, a boolean, or else the text itself."""
    key, equals, value = text.partition("=")
    if not key or not equals or not value:
        raise ConfigError("trajectory-option", text, "KEY=VALUE, e.g. zoom=3")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    try:
        return key, float(value)
    except ValueError:
        return key, value


def size(text: str) -> tuple[int, int]:
    """Parse HEIGHTxWIDTH to (height, width). Raises argparse's error for anything else."""
    height, x, width = text.lower().partition("x")
    if not x or not height.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write HEIGHTxWIDTH, e.g. 512x512")
    return int(height), int(width)


def trust(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--trust`, which says whether a dataset is foreign."""
    text = "Origin of the dataset; foreign: decode in a sandbox; auto: own for your folders and buckets, else foreign."
    parser.add_argument("--trust", choices=("auto", "own", "foreign"), default="auto", help=text)
