"""`ex4d submit`: run a job on a running Ray cluster, through its job server."""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from ex4d.config import installed_versions
from pipelines.commands import job_server, package

# Variables that change what a job does. Nothing else of this machine's environment is sent, in particular no keys.
PASSED = ("EX4D_CODECS", "HF_HUB_OFFLINE", "WANDB_MODE")
STOP_S = 180  # between SIGTERM and SIGKILL when a job is stopped; Ray's default of 3 s is too short for a checkpoint


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ex4d submit`."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings of the job; its own --help lists them")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="overrides of the file's settings"
    )
    parser.add_argument("--job", required=True, metavar="JOB", choices=package.SHARED, help="what to run")
    parser.add_argument("--address", metavar="URL", help=job_server.HELP)
    parser.add_argument(
        "--with-code", action="store_true", help="run the ex4d of this machine instead of the one on the nodes"
    )
    parser.add_argument("--detach", action="store_true", help="do not follow the log")


def run(args: argparse.Namespace) -> int:
    """Run `ex4d submit`; return the job's exit status, 0 with --detach, 130 after Ctrl-C."""
    tree = package.settings(args.job, args.config, args.overrides)
    paths = package.files(tree)
    client, address = job_server.connect(args.address)
    with tempfile.TemporaryDirectory(prefix="ex4d-submit-") as folder:
        package.write(tree, paths, Path(folder), args.with_code)
        label = {"job": args.job, "config": Path(args.config).name}
        job_id = start(client, f"ex4d {args.job} {package.FILE}", label, folder)
    print(f"submitted {job_id} to {address}. {job_server.how_to(job_id, address)}", flush=True)
    return 0 if args.detach else job_server.follow(client, job_id, address)


def start(client: Any, entrypoint: str, label: dict[str, str], folder: str | None = None) -> str:
    """Submit a job and return its id.

    Args:
        label: job and config, which `ex4d jobs` shows.
        folder: working directory to send; None: none.
    """
    job_id = f"{label['job']}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    environment: dict[str, Any] = {"env_vars": {**passed, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}}
    if folder is not None:
        environment["working_dir"] = folder
    version = installed_versions(["ex4d-platform"]).get("ex4d-platform", "")
    return job_server.submit(
        client,
        entrypoint=entrypoint,
        submission_id=job_id,
        runtime_env=environment,
        metadata={**label, "submitted_by_ex4d": version},
    )
