"""`ex4d preprocess`: videos to training shards. Plan → work on each clip → pack; the ledger is the staging folder.

Three passes, each over what the ledger lacks: hash every file; find the shots of every new content; make a sample of
every planned clip. A pass runs on Ray or in this process; the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ex4d import config as config_file
from ex4d import storage
from ex4d.depth import AUTO, auto
from ex4d.errors import ConfigError
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines import inputs
from pipelines.preprocess import fetch, pages, pairs, settings
from pipelines.preprocess.job import Job
from pipelines.preprocess.recipe import Stages, stages_of
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.runtime import runner
from pipelines.runtime.cluster import check_output
from pipelines.runtime.ledger import Attempts
from pipelines.runtime.output import exclusive, outside_datasets
from pipelines.runtime.passes import Passes, TooManyBugs
from pipelines.runtime.progress import Progress
from pipelines.runtime.result import Result, logged
from pipelines.runtime.runner import RayConfig

__all__ = ["OPTIONAL", "SECTIONS", "PreprocessConfig", "RayConfig", "Result", "Stages", "run", "stages_of"]

SECTIONS = {"preprocess": PreprocessConfig, "ray": RayConfig, "synthetic": SyntheticConfig}
OPTIONAL = ("synthetic",)  # who does not ask for a corpus gets none


def command(config_path: str, overrides: Sequence[str]) -> int:
    """Do `ex4d preprocess`; return the exit status."""
    chosen = config_file.load(config_path, SECTIONS, overrides, OPTIONAL)
    check_output("preprocess.output", chosen["preprocess"].output)
    result = run(chosen["preprocess"], chosen["ray"], chosen["synthetic"])
    print(result.table())
    return result.exit_code


def run(
    config: PreprocessConfig,
    ray_config: RayConfig | None = None,
    synthetic_config: SyntheticConfig | None = None,
    runner_name: str = "ray",
    stages: Stages | None = None,
    sources: Sequence[inputs.Source] | None = None,
    retry: Sequence[str] = (),
) -> Result:
    """Return what happened, after bringing the dataset folder `config.output` up to date with the input.

    Run again, it goes on with what is missing. Its `exit_code` is 1, and nothing is committed, where too much was bad.

    Args:
        synthetic_config: the corpus that stands in where `config.input` is None; written to `OUTPUT/source`.
        runner_name: "ray", or "inline": in this process, row after row, where unexpected errors propagate.
        stages: instead of the usual ones.
        sources: instead of all that `config.input` names.
        retry: reasons; refusals of this input and these choices that have one of them are forgotten and tried again.

    Raises:
        ConfigError: a choice is invalid; before any work.
        ContractError: an artifact in the folder is not what it claims to be.
    """
    outside_datasets("preprocess.output", config.output, own="clips")
    settings.check(config)
    if sources is None:
        sources = find_sources(config, synthetic_config)
    config = with_depth(config, sources)
    bugs: list[dict[str, Any]] = []
    how = {"runner": runner_name, "num_workers": config.num_workers}
    shown = Progress(config.output, config.metrics_port, config.metrics_host)
    attempts = Attempts(config.output, config.max_attempts)
    with (
        exclusive(config.output),
        shown.serving(),
        runner.runner(runner_name, ray_config or RayConfig(), config.num_workers, attempts) as execute,
        logged(config.output, shown.tallies, bugs, how) as end,
    ):
        passes = Passes("preprocess", execute, shown, config.max_bugs, bugs=bugs)
        job = Job(config, passes, stages or stages_of(config), frozenset(retry))
        job.ledger.write_config({"preprocess": config, "ray": ray_config, "synthetic": synthetic_config})
        try:
            job.work(sources)
        except TooManyBugs as error:
            job.problems.append(str(error))
        else:
            job.judge()
        result = job.finish()
        result = replace(result, report=pages.write(config, job.scored, result))
        end(result)
    return result


def with_depth(config: PreprocessConfig, sources: Sequence[inputs.Source]) -> PreprocessConfig:
    """Return the configuration with an estimator in place of `depth: auto`, and say which in one line."""
    if config.depth != AUTO or config.score_only:  # scores need no depth
        return config
    videos = (source for source in sources if source.is_video)
    requests = (fetch.depth_request(vars(source), config, source.path) for source in videos)
    with fetch.reach(config):
        depth, choice = auto.choose(requests, config.depth_path)
    print(choice)
    return replace(config, depth=depth)


def find_sources(config: PreprocessConfig, synthetic_config: SyntheticConfig | None) -> list[inputs.Source]:
    """Return every input file; where `config.input` is None, of a synthetic corpus that is written first."""
    if config.input is not None:
        with fetch.reach(config):
            found = inputs.expand(config.input, config.output, config.list_root, config.follow_links)
        return pairs.without_sources(found) if "source" in config.members else found
    if synthetic_config is None:
        raise ConfigError("preprocess.input", None, "a file, folder, glob or list; or a section `synthetic` beside it")
    if not storage.is_local(config.output):
        raise ConfigError("preprocess.input", None, "videos must be named where the output is an object store")
    if "source" in config.members and synthetic_config.second_camera_deg is None:
        raise ConfigError("synthetic.second_camera_deg", None, "degrees, for a dataset with the member source")
    paths = write_corpus(storage.local_path(config.output) / "source", synthetic_config)
    return inputs.expand([str(path) for path in paths])
