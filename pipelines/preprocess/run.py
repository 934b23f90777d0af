"""`ex4d preprocess`: turn videos into training shards; the staging folder is the ledger of finished work.

Hash every new or changed file, find the shots of new content, and make a sample of every clip. The three run side by
side, each only where the ledger lacks results, on Ray or in this process, with identical bytes. Then decide across all
videos, redo what these decisions change, and pack.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from ex4d import config as config_file
from ex4d import storage
from ex4d.depth import AUTO, auto
from ex4d.errors import ConfigError
from ex4d.synthetic import SyntheticConfig, write_corpus
from ex4d.video.pictures import SUFFIXES
from pipelines import inputs
from pipelines.preprocess import fetch, fingerprints, pages, pairs
from pipelines.preprocess.job import Job
from pipelines.preprocess.recipe import Stages, stages_of
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.runtime.cluster import check_output
from pipelines.runtime.job import complete, opened
from pipelines.runtime.output import outside_datasets
from pipelines.runtime.result import Result
from pipelines.runtime.runner import RayConfig

logger = logging.getLogger(__name__)

SECTIONS = {"preprocess": PreprocessConfig, "ray": RayConfig, "synthetic": SyntheticConfig}
OPTIONAL = ("synthetic",)  # no synthetic corpus by default


def command(config_path: str, overrides: Sequence[str]) -> int:
    """Run `ex4d preprocess`; return the exit status."""
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
    sources: inputs.AnySources | None = None,
    retry: Sequence[str] = (),
) -> Result:
    """Update the dataset folder `config.output` to match the input and return the result.

    Running it again resumes. `exit_code` is 1, and nothing is committed, if too many videos or clips are bad.

    Args:
        synthetic_config: the corpus to use if `config.input` is None; it is written to `OUTPUT/source`.
        runner_name: "ray", or "inline": row by row in this process, where unexpected errors propagate.
        stages: replaces `stages_of(config)`.
        sources: replaces the sources that `config.input` names.
        retry: rejects with one of these reasons are retried, for this input and these settings.

    Raises:
        ConfigError: a setting is invalid; raised before any work.
        ContractError: a file in the folder is damaged or of another kind.
    """
    outside_datasets("preprocess.output", config.output, own="clips")
    fingerprints.sample_settings(config)  # raises if weights are missing and cannot be fetched
    if sources is None:
        sources = find_sources(config, synthetic_config)
    config = with_depth(config, sources)
    with opened("preprocess", config, ray_config, runner_name) as (passes, end):
        job = Job(config, passes, stages or stages_of(config), sources, frozenset(retry))
        job.ledger.write_config({"preprocess": config, "ray": ray_config, "synthetic": synthetic_config})
        try:
            result = complete(job, job.work)
        finally:
            job.ledger.flush()
        result = replace(result, report=pages.write(config, job.tables.scored(), result))
        end(result)
    return result


def with_depth(config: PreprocessConfig, sources: inputs.AnySources) -> PreprocessConfig:
    """Resolve `depth: auto` to an estimator, and print the choice in one line."""
    if config.depth != AUTO or config.score_only:  # scores need no depth
        return config
    videos = (source for source in sources if source.is_video)
    requests = (fetch.depth_request(source._asdict(), config, source.path) for source in videos)
    with fetch.reach(config):
        depth, choice = auto.choose(requests, config.depth_path)
    print(choice)
    return replace(config, depth=depth)


def find_sources(config: PreprocessConfig, synthetic_config: SyntheticConfig | None) -> inputs.AnySources:
    """Return every input file; if `config.input` is None, write a synthetic corpus and return its files."""
    if config.input is not None:
        with fetch.reach(config):
            place = (config.output, config.list_root, config.follow_links, config.image_fps is not None)
            found = inputs.expand(config.input, *place)
        is_pictures = not found.num_videos and any(source.name.lower().endswith(SUFFIXES) for source in found)
        if is_pictures and config.image_fps is None:
            logger.warning("no videos found, but pictures; preprocess.image_fps=24 reads folders of pictures as videos")
        return inputs.Sources(pairs.without_sources(found)) if "source" in config.members else found
    if synthetic_config is None:
        raise ConfigError("preprocess.input", None, "must be set, or there must be a section `synthetic`")
    if not storage.is_local(config.output):
        raise ConfigError("preprocess.input", None, "must be set if the output is an object store")
    if "source" in config.members and synthetic_config.second_camera_deg is None:
        raise ConfigError("synthetic.second_camera_deg", None, "must be set for the member source")
    paths = write_corpus(storage.local_path(config.output) / "source", synthetic_config)
    return inputs.expand([str(path) for path in paths])
