"""The `ex4d` command: one table of subcommands. Work is done elsewhere and imported only when it is asked for.

Jobs with an experiment behind them read a YAML file: `ex4d COMMAND CONFIG.yaml [section.key=value …]`.
Commands on one thing take flags. Exit status: 0 done, 1 failed, 2 invalid choice, 75 stopped with a checkpoint.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ex4d.errors import BadSample, ConfigError, ContractError


@dataclass(frozen=True)
class Command:
    """One subcommand: its help line and its module.

    A job's module has `command(config_path, overrides) -> exit status` and `SECTIONS`, the sections that it reads. The
    module of a command on one thing has `arguments(parser)` and `run(args) -> exit status`.
    """

    help: str
    module: str
    is_job: bool = False


COMMANDS = {
    "demo": Command("the whole way on a synthetic corpus, with a page of results", "pipelines.commands.demo"),
    "preprocess": Command("videos to training shards", "pipelines.preprocess.run", is_job=True),
    "plan": Command("what preprocessing will cost, measured on a few videos", "pipelines.preprocess.cost", is_job=True),
    "encode": Command("clips to latents, so that training loads no encoder", "pipelines.encode.job", is_job=True),
    "train": Command("shards to an adapter", "pipelines.train.launch", is_job=True),
    "sweep": Command("many short trainings, the best configuration", "pipelines.train.sweep", is_job=True),
    "evaluate": Command("how good an adapter is, by figures and side by side", "pipelines.evaluate.job", is_job=True),
    "reconstruct": Command("what a camera path would see of a video", "pipelines.commands.reconstruct"),
    "generate": Command("a video seen from the side", "pipelines.commands.generate"),
    "view": Command("a page of a dataset's samples, or of a video's mesh and cameras", "pipelines.commands.view"),
    "export": Command("an adapter for other programs, and back", "pipelines.commands.export"),
    "verify": Command("check a dataset to the last byte", "pipelines.commands.verify"),
    "retry": Command("try again what preprocess refused for a reason", "pipelines.commands.retry"),
    "cluster": Command("the token of Ray clusters", "pipelines.commands.cluster"),
    "doctor": Command("what this machine has and what is missing", "pipelines.commands.doctor"),
}


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="one experiment; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file's values")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="ex4d", description="EX-4D: from ordinary videos to novel views.")
    top.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        below = subparsers.add_parser(name, help=command.help, description=command.help)
        if command.is_job:
            _job_arguments(below)
        else:
            importlib.import_module(command.module).arguments(below)
    return top


def _run(args: argparse.Namespace) -> int:
    command = COMMANDS[args.command]
    module = importlib.import_module(command.module)
    return module.command(args.config, args.overrides) if command.is_job else module.run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 failed, 2 the choice was invalid."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=args.log_level, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.command in ("demo", "encode", "evaluate"):
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for each file of a model, in every worker; read at import
    try:
        return _run(args)
    except ConfigError as error:
        print(f"ex4d {args.command}: {error}", file=sys.stderr)
        return 2
    except BadSample as error:
        named = [getattr(args, name) for name in ("video", "thing") if name in args]  # reasons themselves name no paths
        print(f"ex4d {args.command}: {': '.join([*named, str(error)])}", file=sys.stderr)
        return 1
    except (ContractError, OSError) as error:  # OSError: a disk that is full, a folder that may not be written to
        logging.getLogger(__name__).debug("where it was raised", exc_info=True)
        print(f"ex4d {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
