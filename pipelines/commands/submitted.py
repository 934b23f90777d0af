"""`ex4d jobs`: list, follow or stop the jobs that were submitted to a cluster."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from ex4d.errors import ConfigError
from ex4d.redact import printable, terminal
from pipelines.commands import job_server


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ex4d jobs`."""
    parser.add_argument("id", nargs="?", metavar="ID", help="the job; default: list all jobs")
    parser.add_argument("--address", metavar="URL", help=job_server.HELP)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--follow", action="store_true", help="print its log until it ends")
    what.add_argument("--stop", action="store_true", help="stop it: SIGTERM, and SIGKILL after three minutes")


def run(args: argparse.Namespace) -> int:
    """Run `ex4d jobs`; return the exit status: that of the job with --follow."""
    if args.id is None and (args.follow or args.stop):
        raise ConfigError("ID", None, "name the job; `ex4d jobs` lists them")
    client, address = job_server.connect(args.address)
    with job_server.answers(address):
        jobs = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
        if args.id not in (None, *jobs):
            raise ConfigError("ID", args.id, f"allowed: {', '.join(sorted(jobs)) or 'none: no job was submitted here'}")
        if args.follow:
            return job_server.follow(client, args.id, address)
        if args.stop:
            was_running = client.stop_job(args.id)
            print(f"{args.id} is being stopped" if was_running else f"{args.id} had ended")
            return 0
        _print_table(list(jobs.values()) if args.id is None else [jobs[args.id]])
    return 0


def _print_table(jobs: list[Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("id", "job", "state", "started", "message")
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        label = job.metadata or {}
        what = f"{label.get('job', '')} {label.get('config', '')}".strip() or job.entrypoint
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.start_time or 0) / 1000))
        message = (job.message or "").strip().split("\n")[0]
        cells = (job.submission_id, what, str(job.status.value), started, message)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    Console(file=terminal(sys.stdout), width=None if sys.stdout.isatty() else 160).print(table)
