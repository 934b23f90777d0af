"""What several commands on one thing share: flags of depth and camera path."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from ex4d.config import checked, setting
from ex4d.config_help import default_of
from ex4d.config_settings import choices_of, hints, rule_of
from ex4d.depth import AUTO, CHOICES, DepthRequest
from ex4d.errors import ConfigError
from ex4d.geometry.camera import fov_setting
from ex4d.geometry.camera_path import SOURCE_MOTIONS
from ex4d.geometry.profiles import FIRST_FRAMES, PROFILES
from ex4d.geometry.trajectory import TRAJECTORIES


@dataclass(frozen=True)
class PathFlags:
    """What `reconstruct`, `generate` and `view` share: how depth is found, and where the camera goes."""

    depth: str = setting(
        "sidecar",
        "Depth estimator; sidecar: a depth file beside the video; auto: the first that works of sidecar, "
        "depth-anything-v2, parallax.",
        choices=CHOICES,
    )
    depth_path: str | None = setting(None, "Depth file, if not beside the video; for a network its weights.")
    depth_fill_px: int = setting(0, "Fill holes of measured depth that are no wider than this, px of the frames.", ge=0)
    trajectory: str = setting("orbit", f"Camera path: {', '.join(TRAJECTORIES)}, or a file of poses.")
    angle_deg: float = setting(60.0, "How far the camera goes, degrees.")
    trajectory_option: tuple[str, ...] = setting(
        (),
        "KEY=VALUE, repeatable: distance of a dolly, turns of a spiral, zoom; scale, resample, camera of a file, and "
        "rebase=false, which leaves its poses in the world of --source-poses.",
    )
    cameras: str = setting(
        "auto",
        "Source's cameras; auto: the depth estimator's, if any; none: it stands still; estimator; parallax: found from "
        "motion; or a file of poses, whose unit is found.",
    )
    source_poses: str | None = setting(None, "File with the poses of the source camera, where it moves.")
    source_scale: float | None = setting(
        None, "Units of depth per unit of --source-poses; default: 1 where that is plausible."
    )
    source_motion: str | None = setting(
        None,
        "The source camera's own motion, where it is known; remove: path fixed in the world; keep: path rides on the "
        "source camera; smooth: on a stabilised one. Unset: remove; keep where the released profile is given no poses.",
        choices=SOURCE_MOTIONS,
    )
    persistent_frames: int = setting(0, "Other frames that fill holes with the static surfaces they saw.", ge=0)
    first_frame: str = setting(
        "exact",
        "Frame 0, where its camera is the source's; exact: the source's picture, whole; drawn: with holes, as the "
        "frames after it, so that nothing pops.",
        choices=FIRST_FRAMES,
    )
    fov_deg: float | None = fov_setting()
    profile: str | None = setting(
        None,
        "Mesh profile; released: for published weights. Unset: the adapter's own, or default.",
        choices=PROFILES,
    )
    backend: str = setting("auto", "Renderer.", choices=("auto", "cpu", "reference", "nvdiffrast"))
    seed: int = setting(0, "Seed of everything that is drawn.", ge=0)

    def __post_init__(self) -> None:
        checked(self)


def add(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add a flag for each setting of a dataclass: `--num-frames` for `num_frames`."""
    for field in dataclasses.fields(cls):
        rule, default = rule_of(cls, field.name), default_of(field)
        assert rule is not None
        flag, choices = f"--{field.name.replace('_', '-')}", ", ".join(choices_of(cls, field.name))
        notes = (
            f"one of {choices}" if choices else "",
            "" if default in (None, "", False, ()) else f"default: {default}",
        )
        shown = "; ".join(note for note in notes if note)
        help = f"{rule.help}{f' ({shown})' if shown else ''}".replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=help)
        elif isinstance(default, tuple):
            parser.add_argument(flag, f"-{field.name[0]}", action="append", default=[], metavar="VALUE", help=help)
        else:
            parser.add_argument(flag, type=_type_of(cls, field.name), default=default, help=help)


def read(args: argparse.Namespace, cls: type) -> Any:
    """Return the instance of the dataclass that the flags of `add` say. Raises ConfigError for one out of range."""
    return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})


def _type_of(cls: type, name: str) -> type:
    hint = hints(cls)[name]
    kinds = {int: int, float: float}
    return next((kind for kind in kinds if hint in (kind, kind | None)), str)


def path(args: argparse.Namespace, video_path: str) -> dict[str, Any]:
    """Return the arguments of `reconstruct` for a video that the flags of PathFlags say, except for the profile."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(PathFlags)}
    read(args, PathFlags)
    del values["profile"]
    if args.depth == AUTO:
        from ex4d.depth import auto, places

        request = DepthRequest(video_path, twin=places.twin_of(video_path))
        values["depth"], choice = auto.choose([request], args.depth_path)
        print(choice)
    values["trajectory_name"] = values.pop("trajectory")
    values["trajectory_options"] = dict(_option(text) for text in values.pop("trajectory_option"))
    return values


def _option(text: str) -> tuple[str, float | bool | str]:
    """Return (key, value) of KEY=VALUE: a number, true or false, or the text as it stands."""
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
    """Return (height, width) of HEIGHTxWIDTH. Raises argparse's error for anything else."""
    height, x, width = text.lower().partition("x")
    if not x or not height.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write HEIGHTxWIDTH, e.g. 512x512")
    return int(height), int(width)


def trust(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says whose a dataset is."""
    text = "Whose the dataset is; foreign: decode in a sandbox. Default: own for your folders and buckets."
    parser.add_argument("--trust", choices=("auto", "own", "foreign"), default="auto", help=text)
