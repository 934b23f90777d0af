"""`ex4d generate`: a video seen from another camera path."""

from __future__ import annotations

import argparse
from pathlib import Path

from ex4d.errors import ConfigError
from ex4d.generate_config import GenerateConfig
from ex4d.reconstruct_config import ReconstructConfig
from pipelines.commands import flags
from pipelines.runtime.output import writing


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d generate`."""
    parser.add_argument("--video", required=True, help="The video to start from.")
    parser.add_argument(
        "--adapter",
        required=True,
        help="Folder written by `ex4d train` (its adapter/), or one with two experts' trainings, high and low.",
    )
    parser.add_argument("--output", required=True, metavar="OUT.mp4", help="The video to write.")
    parser.add_argument("--base", help="Base model: tiny, a folder, or a hub id; default: the adapter's own.")
    parser.add_argument("--size", type=flags.size, help="HEIGHTxWIDTH; default: what the adapter was trained at.")
    parser.add_argument("--num-frames", type=int, help="4k+1; default: what the adapter was trained at.")
    parser.add_argument("--device", help="cuda or cpu; default: cuda where there is one.")
    flags.add(parser, GenerateConfig)
    flags.add(parser, ReconstructConfig, flags.PATH)


def run(args: argparse.Namespace) -> int:
    """Do `ex4d generate`; return the exit status."""
    from ex4d import generate

    sampler = flags.read(args, GenerateConfig)
    output = Path(args.output)
    if output.suffix.lower() != ".mp4" or output.is_dir():
        raise ConfigError("output", args.output, "must be the name of an .mp4 file")
    if output.exists() and Path(args.video).exists() and output.samefile(args.video):
        raise ConfigError("output", args.output, "must not be the input video, which would be overwritten")
    with writing(output, is_file=True):
        view = generate.novel_view(
            video_path=args.video,
            adapter_path=args.adapter,
            base=args.base,
            config=sampler,
            device=args.device,
            **flags.path(args, args.video),
        )
        for path in view.write(args.output):
            print(path)
    return 0
