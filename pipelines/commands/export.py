"""`ex4d export`: convert an adapter to the formats of other programs, and back."""

from __future__ import annotations

import argparse

from pipelines.runtime.output import writing


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d export`."""
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="folder written by `ex4d train`, its file, or an ex4d.ckpt; or a folder of two experts, high and low",
    )
    parser.add_argument("--style", required=True, choices=("ex4d", "released", "kohya", "comfyui", "diffusers"))
    parser.add_argument("--output", required=True, metavar="F", help="file to write; with --style ex4d, a folder")
    parser.add_argument("--from", dest="lora", metavar="LORA", help="take the LoRA from this file of another program")


def run(args: argparse.Namespace) -> int:
    """Run `ex4d export`; return the exit status."""
    from ex4d.models.export import export

    with writing(args.output, is_file=args.style != "ex4d"):
        for path in export(args.adapter, args.style, args.output, args.lora):
            print(path)
    return 0
