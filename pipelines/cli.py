"""The `ex4d` command: a table of subcommands, each of which imports its implementation only when it is called.

Jobs, which run an experiment, read a YAML file: `ex4d COMMAND CONFIG.yaml [section.key=value …]`. The other commands
work on a single video, dataset or adapter and take flags. Exit status: 0 success, 1 failure, 2 invalid argument or
setting, 75 stopped after writing a checkpoint, 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ex4d.errors import BadSample, ConfigError, ContractError, Filtered
from ex4d.redact import shown, shown_output, without_secrets
from pipelines.commands.jobs import JOBS

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True)
class Command:
    """One subcommand: its help text and its module.

    The module of a job (see `commands.jobs`) has `command(config_path, overrides) -> exit status` and `SECTIONS`. The
    module of any other command has `arguments(parser)` and `run(args) -> exit status`.
    """

    help: str
    module: str


COMMANDS = {
    "demo": Command("run every step on a synthetic corpus and write a page of results", "pipelines.commands.demo"),
    "preprocess": Command("turn videos into training shards", JOBS["preprocess"]),
    "plan": Command("estimate what preprocessing will cost, from a few videos", JOBS["plan"]),
    "encode": Command("encode clips into latents, so that training loads no encoder", JOBS["encode"]),
    "train": Command("train an adapter on shards", JOBS["train"]),
    "sweep": Command("run many short trainings and find the best settings", JOBS["sweep"]),
    "evaluate": Command("evaluate an adapter and write a side-by-side page", JOBS["evaluate"]),
    "reconstruct": Command("render what a new camera path sees of a video", "pipelines.commands.reconstruct"),
    "generate": Command("generate a video along a new camera path", "pipelines.commands.generate"),
    "view": Command("write a page of a dataset's samples, or of a video's mesh", "pipelines.commands.view"),
    "export": Command("convert an adapter for other programs, and back", "pipelines.commands.export"),
    "import": Command("arrange MultiCamVideo or SynCamVideo as pairs of cameras", "pipelines.commands.import_cameras"),
    "verify": Command("check every byte and sample of a dataset", "pipelines.commands.verify"),
    "retry": Command(
        "retry the videos and clips that preprocess rejected for a given reason", "pipelines.commands.retry"
    ),
    "submit": Command("run a job on a running Ray cluster and follow its log", "pipelines.commands.submit"),
    "jobs": Command("list, follow or stop the jobs that were submitted to a cluster", "pipelines.commands.submitted"),
    "cluster": Command("write the files that start a cluster, or create its token", "pipelines.commands.cluster"),
    "config": Command("print a complete, commented configuration of a job", "pipelines.commands.config"),
    "doctor": Command("report what this machine has and what is missing", "pipelines.commands.doctor"),
}


class JobParser(argparse.ArgumentParser):
    """The parser of a job. Its help lists every setting, and only the help imports the job's module."""

    job = ""

    def format_help(self) -> str:
        """Return the usage text followed by every setting of the sections that the job reads."""
        from ex4d.config_help import help_text

        return f"{super().format_help()}\n{help_text(importlib.import_module(JOBS[self.job]).SECTIONS, self.job)}"


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser for the arguments after `ex4d NAME`."""
    command = COMMANDS[name]
    kind = JobParser if name in JOBS else argparse.ArgumentParser
    below = kind(prog=f"ex4d {name}", description=f"{command.help[0].upper()}{command.help[1:]}.")
    if isinstance(below, JobParser):
        below.job = name
        below.add_argument("config", metavar="CONFIG.yaml", help="settings of this run; see configs/ and `ex4d config`")
        below.add_argument(
            "overrides", nargs="*", default=[], metavar="section.key=value", help="overrides of the file's settings"
        )
    else:
        importlib.import_module(command.module).arguments(below)
    return below


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `command` of the result is a key of COMMANDS. Exit as argparse does on errors."""
    from ex4d.config import installed_versions, nearest  # late, so that `main` can catch a Ctrl-C as early as possible

    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items())
    top = argparse.ArgumentParser(
        prog="ex4d",
        description="EX-4D: from ordinary videos to novel views.",
        epilog=f"commands:\n{commands}\n\n`ex4d COMMAND --help` lists the arguments and settings of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = installed_versions(["ex4d-platform"]).get("ex4d-platform", "not installed")
    top.add_argument("--version", action="version", version=f"ex4d {version}")
    top.add_argument("--log-level", default="WARNING", choices=LEVELS, help="least severe messages that are printed")
    top.add_argument("command", metavar="COMMAND", nargs="?", help="see below")
    top.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the command")
    args = top.parse_args(argv)
    if args.command is None:
        top.print_help(sys.stderr)
        raise SystemExit(2)
    if args.command not in COMMANDS:
        top.error(f"{args.command!r} is not a command{nearest(args.command, list(COMMANDS))}")
    below = command_parser(args.command)
    below.add_argument(
        "--log-level", default=args.log_level, choices=LEVELS, help="least severe messages that are printed"
    )
    if below._subparsers:
        return below.parse_args(args.arguments, args)
    for word in args.arguments:  # argparse would report missing arguments and not the misspelt option
        flag = word.partition("=")[0]
        if " " in flag:  # to argparse a value, such as a prompt
            continue
        if flag.startswith("--") and not any(known.startswith(flag) for known in below._option_string_actions):
            known = nearest(flag, list(below._option_string_actions))
            below.error(f"{flag} is not an option{'; write section.key=value' if args.command in JOBS else known}")
    return below.parse_intermixed_args(args.arguments, args)  # options may stand between positional arguments


class Lines(logging.Formatter):
    """Format log lines without control characters and passwords, which file names and messages may contain."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the formatted line."""
        return shown(super().format(record))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see the module's docstring for its values."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # e.g. ASCII output shows \u2026 for a character that it lacks
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _print_traceback
    with shown_output():
        return _main(argv)


def _print_traceback(*error: Any) -> None:
    """Print the traceback of an unexpected error as all other output: its message may hold untrusted text."""
    with shown_output():
        traceback.print_exception(*error)


def _main(argv: Sequence[str] | None) -> int:
    args = argparse.Namespace(command="")
    try:
        args = parse(argv)
        sys.argv[1:] = [without_secrets(word) for word in sys.argv[1:]]  # W&B records the command line
        logging.basicConfig(level=args.log_level)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(Lines("%(levelname)s %(name)s: %(message)s"))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if args.command in ("demo", "encode", "evaluate"):
            os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bar for each file of a model
        module = importlib.import_module(COMMANDS[args.command].module)
        return module.command(args.config, args.overrides) if args.command in JOBS else module.run(args)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from there" if args.command in JOBS else ""
        status, message = 130, f"interrupted{goes_on}"
    except ConfigError as error:
        status, message = 2, str(error)
    except (BadSample, Filtered) as error:
        named = [getattr(args, name) for name in ("video", "thing") if name in args]  # reasons do not include the path
        status, message = 1, ": ".join([*named, str(error)])
    except (ContractError, OSError) as error:  # OSError: e.g. a full disk or a read-only folder
        logging.getLogger(__name__).debug("where it was raised", exc_info=True)
        status, message = 1, str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            message = f"the disk is full{where}: free some space, then run the same command again"
    print(f"{f'ex4d {args.command}'.strip()}: {message}", file=sys.stderr)
    return status


def script() -> None:
    """Run one command and exit with its status; a Ctrl-C after the command has finished does not change the status."""
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # After a Ctrl-C inside an exec (dataclasses use it), Python 3.11 ends by SIGINT unless another exec succeeds.
    exec("")
    sys.exit(status)


if __name__ == "__main__":
    script()
