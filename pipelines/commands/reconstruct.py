"""`ex4d reconstruct`: what a camera path would see of a video."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d reconstruct`."""
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--size", type=flags.size, help="HxW (default: the video's own)")
    parser.add_argument("--num-frames", type=int, help="default: all")
    parser.add_argument("--save-mesh", nargs="?", const="ply", choices=("ply", "glb"), help="also a mesh a frame")
    flags.path_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do `ex4d reconstruct`; return the exit status."""
    from ex4d import reconstruct_files
    from ex4d.reconstruct import reconstruct

    flags.check_output(Path(args.output))
    view = reconstruct(
        args.video, num_frames=args.num_frames, size=args.size, profile=args.profile or "default", **flags.path(args)
    )
    paths = reconstruct_files.write(view, args.output, args.save_mesh)
    print(f"{view.visible[-1].mean():.0%} of the last frame is visible")
    for path in paths:
        if path.parent.name != "mesh":
            print(path)
    return 0
