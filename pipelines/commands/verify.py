"""`ex4d verify`: check every byte of a dataset."""

from __future__ import annotations

import argparse
import sys

from pipelines.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d verify`."""
    parser.add_argument("dataset", help="folder written by `ex4d preprocess`")
    parser.add_argument("--quick", action="store_true", help="hashes and counts only, no decoding")
    flags.trust(parser)


def run(args: argparse.Namespace) -> int:
    """Run `ex4d verify`; return the exit status."""
    from ex4d.data.verify import verify

    report = verify(args.dataset, full=not args.quick, trust=args.trust)
    print(str(report), file=sys.stdout if report.ok else sys.stderr)
    return 0 if report.ok else 1
