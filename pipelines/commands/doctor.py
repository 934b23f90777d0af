"""`ex4d doctor`: report what this machine has, what is missing, and what each item is needed for."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys

from ex4d.config import installed_versions
from ex4d.isolation import sandbox
from ex4d.redact import terminal
from pipelines.commands import cluster_doctor
from pipelines.commands.node_checks import video_works

# Distribution, needed for, and whether the base install must have it.
PACKAGES = (
    ("torch", "everything", True),
    ("diffusers", "the base model", True),
    ("transformers", "text and image encoders, depth networks", True),
    ("peft", "LoRA", True),
    ("deepspeed", "train", True),
    ("ray", "preprocess, sweep, clusters", True),
    ("webdataset", "reading shards elsewhere", True),
    ("wandb", "run tracking", True),
    ("av", "decoding", True),
    ("numba", "rendering on the CPU", True),
    ("decord", "a second decoder (optional)", False),
    ("nvdiffrast", "rendering on a GPU (optional; see README)", False),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d doctor`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    cluster_doctor.arguments(parser)


def facts() -> dict:
    """Return the machine and package facts as a JSON-serializable dict; `missing` lists absent required packages."""
    installed = installed_versions(name for name, _, _ in PACKAGES)
    missing = [name for name, _, required in PACKAGES if required and name not in installed]
    gpus = []
    if "torch" in installed:
        import torch

        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory_bytes / 2**30, 1),
        "disk_free_gb": round(shutil.disk_usage(".").free / 2**30, 1),
        "gpus": gpus,
        "packages": {name: installed.get(name) for name, _, _ in PACKAGES},
        "missing": missing,
        "video_works": video_works(),
        "sandbox_lacks": sandbox.missing(),
        "wandb_key": bool(os.environ.get("WANDB_API_KEY")),
    }


def run(args: argparse.Namespace) -> int:
    """Print the facts; return 1 if something required is missing or broken, else 0."""
    if args.cluster:
        return cluster_doctor.run(args)
    machine = facts()
    if args.json:
        print(json.dumps(machine, indent=2))
        return 0 if machine["video_works"] and not machine["missing"] else 1
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="ex4d doctor", show_header=True)
    for column in ("what", "found", "needed for"):
        table.add_column(column)
    for key in ("python", "platform", "num_cpus", "memory_gb", "disk_free_gb"):
        table.add_row(key, str(machine[key]), "")
    table.add_row("gpus", ", ".join(machine["gpus"]) or "none: the CPU backends are used", "14B training, nvdiffrast")
    for name, purpose, required in PACKAGES:
        version = machine["packages"][name] or ("[red]missing[/red]" if required else "not installed")
        table.add_row(name, version, purpose)
    table.add_row("H.264 round trip", "works" if machine["video_works"] else "[red]fails[/red]", "shards")
    lacking = escape("; ".join(machine["sandbox_lacks"]))
    table.add_row("sandbox", f"[red]lacks {lacking}[/red]" if lacking else "complete", "decoding files from strangers")
    table.add_row("W&B", "key found" if machine["wandb_key"] else "no key: runs are kept offline", "run tracking")
    Console(file=terminal(sys.stdout)).print(table)
    return 0 if machine["video_works"] and not machine["missing"] else 1
