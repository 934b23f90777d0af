"""The `ex4d` command: one table of subcommands. Work is done elsewhere and imported only when it is asked for.

Jobs with an experiment behind them read a YAML file: `ex4d COMMAND CONFIG.yaml [section.key=value …]`.
Commands on one thing take flags. Exit status: 0 done, 1 failed, 2 the choice was invalid.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ex4d.errors import BadSample, ConfigError, ContractError
from pipelines import commands


@dataclass(frozen=True)
class Command:
    """One subcommand: its help line, what adds its arguments, and what runs it (the exit status comes back)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="one experiment; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file's values")


def _preprocess(args: argparse.Namespace) -> int:
    from ex4d import config
    from pipelines import preprocess

    sections = config.load(args.config, preprocess.SECTIONS, args.overrides, preprocess.OPTIONAL)
    result = preprocess.run(sections["preprocess"], sections["ray"], sections["synthetic"])
    print(result.table())
    return result.exit_code


def _encode(args: argparse.Namespace) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for each file of a model, in every worker
    from ex4d import config
    from pipelines import encode

    sections = config.load(args.config, encode.SECTIONS, args.overrides)
    result = encode.run(sections["encode"], sections["model"], sections["ray"])
    print(result.table(), encode.throughput(result), sep="\n")
    return result.exit_code


def _plan(args: argparse.Namespace) -> int:
    from ex4d import config
    from pipelines import plan

    made, earlier = plan.main(config.load(args.config, plan.SECTIONS, args.overrides, plan.OPTIONAL))
    print(made.table(), plan.judgement(earlier), sep="\n")
    return 0


def _train(args: argparse.Namespace) -> int:
    from pipelines import train

    return train.main([args.config, *args.overrides])


def _evaluate(args: argparse.Namespace) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")
    from ex4d import config
    from pipelines import evaluate

    sections = config.load(args.config, evaluate.SECTIONS, args.overrides)
    report = evaluate.run(sections["evaluate"], sections["generate"], sections["synthetic"], sections["ray"])
    print(report.table())
    return report.exit_code


def _sweep(args: argparse.Namespace) -> int:
    from pipelines import sweep

    return sweep.main(args.config, args.overrides)


COMMANDS = {
    "demo": Command(
        "the whole way on a synthetic corpus, with a page of results", commands.demo_arguments, commands.run_demo
    ),
    "preprocess": Command("videos to training shards", _job_arguments, _preprocess),
    "plan": Command("what preprocessing will cost, measured on a few videos", _job_arguments, _plan),
    "encode": Command("clips to latents, so that training loads no encoder", _job_arguments, _encode),
    "train": Command("shards to an adapter", _job_arguments, _train),
    "sweep": Command("many short trainings, the best configuration", _job_arguments, _sweep),
    "evaluate": Command("how good an adapter is, by figures and side by side", _job_arguments, _evaluate),
    "reconstruct": Command(
        "what a camera path would see of a video", commands.reconstruct_arguments, commands.run_reconstruct
    ),
    "generate": Command("a video seen from the side", commands.generate_arguments, commands.run_generate),
    "view": Command(
        "a page of a dataset's samples, or of a video's mesh and cameras", commands.view_arguments, commands.run_view
    ),
    "export": Command("an adapter for other programs, and back", commands.export_arguments, commands.run_export),
    "verify": Command("check a dataset to the last byte", commands.verify_arguments, commands.run_verify),
    "retry": Command("try again what preprocess refused for a reason", commands.retry_arguments, commands.run_retry),
    "doctor": Command("what this machine has and what is missing", commands.doctor_arguments, commands.run_doctor),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="ex4d", description="EX-4D: from ordinary videos to novel views.")
    top.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(subparsers.add_parser(name, help=command.help, description=command.help))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 failed, 2 the choice was invalid."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=args.log_level, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return COMMANDS[args.command].run(args)
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
