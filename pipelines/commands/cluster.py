"""`ex4d cluster`: what scripts that start a Ray by themselves need."""

from __future__ import annotations

import argparse
import os

from pipelines.runtime.cluster import require_token


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `ex4d cluster`."""
    below = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    below.add_parser(
        "token",
        help="create the token of this user's Rays where there is none, and print what a shell must export: "
        'eval "$(ex4d cluster token)"',
    )


def run(args: argparse.Namespace) -> int:
    """Do `ex4d cluster token`; the token itself is not printed."""
    require_token()
    print(f"export RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}")
    return 0
