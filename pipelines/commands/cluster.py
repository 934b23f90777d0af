"""`ex4d cluster`: create this user's Ray token, and render the files that start a cluster."""

from __future__ import annotations

import argparse
import os
import shlex

from ex4d import config
from pipelines.commands.cluster_config import ClusterConfig
from pipelines.commands.cluster_render import KINDS, render
from pipelines.runtime.cluster import require_private_folder, require_token


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `ex4d cluster`."""
    from ex4d.config_help import describe

    below = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    below.add_parser(
        "token",
        help="create this user's Ray token and a private folder for Ray if there is none, and print what a shell must "
        'export: token=$(ex4d cluster token) && eval "$token"',
    )
    writer = below.add_parser("render", help="print a file that starts a cluster: a KubeRay manifest, a SLURM script …")
    writer.add_argument("kind", choices=sorted(KINDS), help="kind of file to print")
    defaults = (f"{one.key.removeprefix('cluster.')}={one.default}" for one in describe(ClusterConfig, "cluster"))
    text = f"settings with their defaults: {', '.join(defaults)}"
    writer.add_argument("settings", nargs="*", default=[], metavar="KEY=VALUE", help=text)


def run(args: argparse.Namespace) -> int:
    """Run `ex4d cluster token` or `ex4d cluster render`; the token itself is not printed."""
    if args.what == "token":
        require_token()
        require_private_folder()
        names = ("RAY_AUTH_MODE", "RAY_TMPDIR")
        print("export", *(f"{name}={shlex.quote(os.environ[name])}" for name in names))
        return 0
    pairs = [word.partition("=") for word in args.settings]
    values = {key: config.parse_value(text, key) for key, _, text in pairs}
    print(render(args.kind, config.validate(ClusterConfig, values, "cluster")), end="")
    return 0
