"""`ex4d reconstruct`: show what a camera path would see of a video."""

from __future__ import annotations

import argparse

from ex4d.reconstruct_config import ReconstructConfig
from pipelines.commands import flags
from pipelines.runtime.output import writing


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d reconstruct`."""
    parser.add_argument("video", metavar="VIDEO", help="The video to start from, or a folder of JPEG or PNG frames.")
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder to write.")
    parser.add_argument("--size", type=flags.size, help="HEIGHTxWIDTH; default: the video's own.")
    parser.add_argument("--num-frames", type=int, help="Number of frames; default: all.")
    parser.add_argument("--save-mesh", nargs="?", const="ply", choices=("ply", "glb"), help="Write a mesh per frame.")
    flags.add(parser, ReconstructConfig, flags.PATH)


def run(args: argparse.Namespace) -> int:
    """Run `ex4d reconstruct`; return the exit status."""
    from ex4d import reconstruct_files
    from ex4d.reconstruct import reconstruct

    with writing(args.output):
        view = reconstruct(args.video, **flags.path(args, args.video))
        paths = reconstruct_files.write(view, args.output, args.save_mesh)
    motion = view.choices["source_motion"]
    print(f"the source camera's motion is known: {motion}" if motion else "the source camera is assumed to stand still")
    if view.valid_mask is not None:
        print(f"{1 - view.valid_mask.mean():.1%} of the depth is unknown and becomes holes")
    print(f"{view.visible[-1].mean():.0%} of the last frame is visible")
    for path in paths:
        if path.parent.name != "mesh":
            print(path)
    return 0
