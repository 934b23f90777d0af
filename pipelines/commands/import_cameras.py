"""`ex4d import`: arrange scenes that several cameras filmed as pairs for `preprocess.members=[source]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

from ex4d.errors import ConfigError, ContractError
from pipelines.runtime.output import writing


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d import`."""
    parser.add_argument(
        "folder", metavar="FOLDER", help="MultiCamVideo-Dataset or SynCamVideo-Dataset, or a part of it"
    )
    parser.add_argument("--output", required=True, metavar="F", help="folder for the pairs, on the same disk as FOLDER")
    parser.add_argument("--pairs-per-scene", type=int, default=10, help="camera pairs per scene (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the pairs (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run `ex4d import`; return the exit status."""
    from pipelines.inputs import multi_camera

    folder, output = Path(args.folder), Path(args.output)
    if not folder.is_dir():
        raise ConfigError("FOLDER", args.folder, "must be a folder")
    if args.pairs_per_scene < 1:
        raise ConfigError("--pairs-per-scene", args.pairs_per_scene, "must be at least 1")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError("--output", args.output, "must lie outside of FOLDER, which is searched for scenes")
    found = skipped = pairs = 0
    with writing(args.output):
        for scene in multi_camera.scenes(folder):
            found += 1
            name = scene.relative_to(folder)
            try:
                draw = Random(f"{args.seed} {name.as_posix()}")
                pairs += multi_camera.import_scene(scene, output / name, args.pairs_per_scene, draw)
            except ContractError as error:
                skipped += 1
                print(f"skipped: {error}", file=sys.stderr)
        if not pairs:
            what = f"must hold a scene with videos/camNN.mp4 and {multi_camera.EXTRINSICS}; {found} were found"
            raise ConfigError("FOLDER", args.folder, f"{what}, {skipped} cannot be used")
    print(f"{pairs} pairs of {found - skipped} scenes, {skipped} skipped: {output}")
    members = "preprocess.members=[source] preprocess.masks.num_masks=1"
    print(f"next: ex4d preprocess CONFIG.yaml preprocess.input={output} {members}")
    return 0
