"""`ex4d generate`: generate a video as seen along another camera path."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ex4d.errors import ConfigError
from ex4d.generate_config import GenerateConfig
from ex4d.geometry.trajectory import TRAJECTORIES, has_angle
from ex4d.reconstruct_config import ReconstructConfig
from pipelines.commands import flags
from pipelines.runtime.output import writing


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d generate`."""
    parser.add_argument("--video", required=True, help="The video to start from, or a folder of JPEG or PNG frames.")
    parser.add_argument(
        "--adapter",
        required=True,
        help="Folder written by `ex4d train` (its adapter/), a folder with the trainings of two experts, high and low, "
        "or the published ex4d.ckpt.",
    )
    parser.add_argument("--output", required=True, metavar="OUT.mp4", help="The video to write.")
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="TRAJECTORY[:DEGREES]",
        help="Another path over the same depth and model, repeatable; its video is OUT.TRAJECTORY.mp4.",
    )
    parser.add_argument("--base", help="Base model: tiny, a folder, or a hub id; default: the adapter's own.")
    parser.add_argument(
        "--size", type=flags.size, help="HEIGHTxWIDTH; default: the size that the adapter was trained at."
    )
    parser.add_argument(
        "--num-frames", type=int, help="Number of frames, 4k+1; default: the number that the adapter was trained at."
    )
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one.")
    flags.add(parser, GenerateConfig)
    flags.add(parser, ReconstructConfig, flags.PATH)


def run(args: argparse.Namespace) -> int:
    """Run `ex4d generate`; return the exit status."""
    from ex4d import generate

    sampler = flags.read(args, GenerateConfig)
    output = Path(args.output)
    if output.suffix.lower() != ".mp4" or output.is_dir():
        raise ConfigError("output", args.output, "must be the name of an .mp4 file")
    if output.exists() and Path(args.video).exists() and output.samefile(args.video):
        raise ConfigError("output", args.output, "must not be the input video, which would be overwritten")
    paths: dict[Path, dict[str, Any]] = {output: {}} | dict(_further(output, text) for text in args.also)
    if len(paths) <= len(args.also):
        raise ConfigError("also", args.also, "must name each path once")
    with writing(output, is_file=True):
        views = generate.novel_views(
            args.video,
            args.adapter,
            list(paths.values()),
            base=args.base,
            config=sampler,
            device=args.device,
            **flags.path(args, args.video),
        )
        for place, view in zip(paths, views, strict=True):
            for path in view.write(place):
                print(path)
    return 0


def _further(output: Path, text: str) -> tuple[Path, dict[str, Any]]:
    """Return (output file, changed settings) of an additional path, TRAJECTORY or TRAJECTORY:DEGREES."""
    trajectory, colon, degrees = text.rpartition(":")
    if not colon or Path(text).is_file():
        trajectory, degrees = text, ""
    change: dict[str, Any] = {"trajectory": trajectory, "trajectory_options": {}}
    if degrees:
        if Path(trajectory).is_file() or (trajectory in TRAJECTORIES and not has_angle(trajectory)):
            raise ConfigError("also", text, f"must have no degrees: {trajectory} has no angle")
        try:
            change["angle_deg"] = float(degrees)
        except ValueError:
            raise ConfigError("also", text, "must be TRAJECTORY or TRAJECTORY:DEGREES") from None
    name = "-".join(part for part in (Path(trajectory).stem, degrees) if part)
    return output.with_name(f"{output.stem}.{name}{output.suffix}"), change
