"""`ex4d config`: print a complete, commented configuration to start from."""

from __future__ import annotations

import argparse
import importlib

from ex4d.config_help import template
from pipelines.commands import jobs


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d config`."""
    parser.add_argument("job", metavar="JOB", choices=jobs.JOBS, help=f"one of {', '.join(jobs.JOBS)}")


def run(args: argparse.Namespace) -> int:
    """Run `ex4d config`; return the exit status."""
    module = importlib.import_module(jobs.JOBS[args.job])
    print(template(module.SECTIONS, args.job, getattr(module, "OPTIONAL", ())), end="")
    return 0
