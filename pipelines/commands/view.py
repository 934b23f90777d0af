"""`ex4d view`: write a page of a dataset's samples, or of a video's mesh and cameras."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ex4d.errors import ConfigError
from ex4d.reconstruct_config import ReconstructConfig
from pipelines.commands import flags
from pipelines.runtime.output import writing

MAX_VIEW_FRAMES = 49  # maximum frames of an interactive 3D page: about 10 MB


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d view`."""
    parser.add_argument(
        "thing", metavar="THING", help="A dataset written by `ex4d preprocess`, a video, or a folder of frames."
    )
    parser.add_argument("--output", required=True, metavar="PAGE.html", help="The page to write.")
    parser.add_argument("--key", action="append", default=[], help="Dataset: show this sample; repeatable.")
    parser.add_argument("--samples", type=int, default=8, help="Dataset: number of samples (default: %(default)s).")
    parser.add_argument("--size", type=flags.size, help="Video: HEIGHTxWIDTH; default: its own.")
    parser.add_argument("--num-frames", type=int, help=f"Video: frames; default: all, up to {MAX_VIEW_FRAMES}.")
    flags.trust(parser)
    flags.add(parser, ReconstructConfig, flags.PATH)


def run(args: argparse.Namespace) -> int:
    """Run `ex4d view`; return the exit status."""
    if Path(args.output).suffix.lower() != ".html":
        raise ConfigError("output", args.output, "must be the name of an .html file")
    with writing(args.output, is_file=True):
        return _write(args)


def _write(args: argparse.Namespace) -> int:
    from ex4d import storage

    if storage.exists(storage.join(args.thing, "dataset.json")):
        from ex4d.viewer import page, sample_page

        if args.samples < 1:
            raise ConfigError("samples", args.samples, "must be at least 1")
        print(page.write(sample_page.samples_page(args.thing, args.key, args.samples, args.trust), args.output))
        return 0
    from ex4d.reconstruct import reconstruct
    from ex4d.viewer import scene_page

    if args.num_frames is None:
        args.num_frames = min(MAX_VIEW_FRAMES, _num_frames(args.thing))
    view = reconstruct(args.thing, **flags.path(args, args.thing))
    title = os.fsencode(Path(args.thing).name).decode("utf-8", "backslashreplace")
    print(scene_page.write(view, args.output, title))
    return 0


def _num_frames(video: str) -> int:
    from ex4d import isolation
    from ex4d.video import pictures

    if not Path(video).is_dir():
        return len(isolation.run("frame_pts", (isolation.File(video),))[0])
    if not pictures.chosen(os.listdir(video)):
        raise ConfigError(
            "THING",
            video,
            "must be a video, a folder of JPEG or PNG frames, or a finished dataset (it has no dataset.json)",
        )
    return len(pictures.names_in(video))
