"""What several commands on one thing share: flags of depth and camera path, and a check of the output."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ex4d.errors import ConfigError


def path_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `reconstruct`, `generate` and `view` share: how depth is found, and where the camera goes."""
    parser.add_argument("--depth", default="sidecar", help="estimator: sidecar, parallax, … (default: %(default)s)")
    parser.add_argument("--depth-path", help="depth file where it is not beside the video; for a network its weights")
    parser.add_argument("--trajectory", default="orbit", help="a path's name or a file of poses (default: %(default)s)")
    parser.add_argument("--angle-deg", type=float, default=60.0, help="how far the camera goes (default: %(default)s)")
    parser.add_argument(
        *("--trajectory-option", "-t"),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="distance= of a dolly, turns= of a spiral, zoom= of a zoom; scale=, resample=true, camera= of a file",
    )
    parser.add_argument("--source-poses", metavar="FILE", help="poses of the source camera, where it moves")
    parser.add_argument(
        "--source-scale", type=float, help="depth's units for one of --source-poses (1 where plausible)"
    )
    parser.add_argument("--fov-deg", type=float, default=54.0, help="where depth brings no intrinsics (default: 54)")
    parser.add_argument("--profile", help="of the mesh: default, closed, torn, or released for published weights")
    parser.add_argument("--backend", default="auto", choices=("auto", "cpu", "reference", "nvdiffrast"))
    parser.add_argument("--seed", type=int, default=0)


def path(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `reconstruct` that `_path_arguments` read, save the profile."""
    return {
        "trajectory_name": args.trajectory,
        "angle_deg": args.angle_deg,
        "trajectory_options": dict(_option(text) for text in args.trajectory_option),
        "source_poses": args.source_poses,
        "source_scale": args.source_scale,
        "depth": args.depth,
        "depth_path": args.depth_path,
        "fov_deg": args.fov_deg,
        "backend": args.backend,
        "seed": args.seed,
    }


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


def check_output(folder: Path) -> None:
    """Raise ConfigError unless files can be made in `folder`, which may not be there yet: known before the work."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError("output", str(folder), f"{there} is no folder that can be written to")
