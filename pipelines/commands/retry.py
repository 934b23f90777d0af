"""`ex4d retry`: retry what a preprocess run rejected for the given reasons, and do any other missing work."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ex4d import config, storage
from ex4d.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.runtime.result import Result


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d retry`."""
    parser.add_argument("dataset", metavar="OUT", help="folder written by `ex4d preprocess`")
    parser.add_argument(
        "--reason", action="append", required=True, help="reason to retry, e.g. decode_timeout; repeatable"
    )
    parser.add_argument("--config", metavar="CONFIG.yaml", help="default: the settings of the last run in that folder")


def run(args: argparse.Namespace) -> int:
    """Run `ex4d retry`; return the exit status."""
    result = retry(args.dataset, args.reason, args.config)
    print(result.table(), summary(result), sep="\n")
    return result.exit_code


def retry(output: str, reasons: Sequence[str], config_path: str | None = None, runner_name: str = "ray") -> Result:
    """Retry the rejected rows of `output` that have one of these reasons; return the result.

    The last run's settings are read from the folder. Work that is missing for other reasons is done too.

    Args:
        output: dataset folder.
        reasons: e.g. "decode_timeout"; they are listed in the table at the end of a run and in rejects.parquet.
        config_path: take the settings from this YAML file instead, e.g. with more time in `preprocess.limits`.
        runner_name: see `preprocess.run`.

    Raises:
        ConfigError: no reason is given, or there is no run to resume.
    """
    from pipelines.preprocess import run as preprocess
    from pipelines.runtime.ledger import Ledger

    if not reasons:
        raise ConfigError("reason", None, "must have at least one, e.g. --reason decode_timeout")
    output = str(storage.local_path(output).absolute()) if storage.is_local(output) else output
    if config_path is None:
        folder, settings = Ledger(output).read_config()
        sections = {
            name: config.validate(cls, settings.get(name, {}), name) for name, cls in preprocess.SECTIONS.items()
        }
    else:
        folder, sections = os.getcwd(), config.load(Path(config_path), preprocess.SECTIONS, (), preprocess.OPTIONAL)
    choices = replace(sections["preprocess"], output=output)
    if not os.path.isdir(folder):
        raise ConfigError("OUT", output, f"the run started in {folder}, which does not exist; set --config")
    with contextlib.chdir(folder):
        return preprocess.run(choices, sections["ray"], sections["synthetic"], runner_name, retry=reasons)


def summary(result: Result) -> str:
    """Return a line with the number of retried rows, and a line for each kind of outcome."""
    fates = Counter(result.retried.values())
    lines = [f"tried again: {len(result.retried)}"]
    lines += [f"  {before} -> {now or 'not tried'}: {count}" for (before, now), count in sorted(fates.items())]
    return "\n".join(lines)
