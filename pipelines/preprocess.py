"""`ex4d preprocess`: videos to training shards. Plan → work on each clip → pack; the ledger is the staging folder.

Three passes, each over what the ledger lacks: hash every file; find the shots of every new content; make a sample of
every planned clip. A pass runs on Ray or in this process; the bytes are the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ex4d import storage
from ex4d.errors import ConfigError
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines import inputs, pages, pairs, runner, settings
from pipelines.job import Job, TooManyBugs
from pipelines.ledger import Attempts, exclusive
from pipelines.progress import Progress
from pipelines.report import Result, log_run
from pipelines.runner import RayConfig
from pipelines.settings import PreprocessConfig
from pipelines.stage import Stage
from pipelines.stages import caption, commit, condition, decode, depth, identify, masks, pair, probe, qc, score, shots

__all__ = ["OPTIONAL", "SECTIONS", "PreprocessConfig", "RayConfig", "Result", "Stages", "run", "stages_of"]

SECTIONS = {"preprocess": PreprocessConfig, "ray": RayConfig, "synthetic": SyntheticConfig}
OPTIONAL = ("synthetic",)  # who does not ask for a corpus gets none


@dataclass(frozen=True)
class Stages:
    """The whole pipeline, top to bottom: three passes over rows."""

    hash: tuple[Stage, ...] = (identify.STAGE,)
    # on the driver: two files of one content are one video
    split: tuple[Stage, ...] = (probe.STAGE, shots.STAGE, commit.RECORD_VIDEO)
    # on the driver: clips.plan
    clip: tuple[Stage, ...] = (
        decode.STAGE,
        score.MEASURE,
        score.STAGE,
        depth.STAGE,
        caption.STAGE,
        qc.DEPTH,
        masks.STAGE,
        condition.STAGE,
        qc.MASKS,
        commit.STAGE_SAMPLE,
        commit.RECORD_REFUSAL,
    )
    # with the member `source`, in place of `split` and `clip`: depth is the other camera's, the mask is its warp's
    split_pair: tuple[Stage, ...] = (
        probe.STAGE,
        shots.STAGE,
        pair.NEED,
        probe.STAGE.over(pair.OTHER, "other_probe"),
        shots.STAGE.over(pair.OTHER, "other_shots"),
        pair.CHECK,
        commit.RECORD_PAIR,
    )
    clip_pair: tuple[Stage, ...] = (
        decode.STAGE,
        score.MEASURE,
        score.STAGE,
        pair.CAMERAS,
        decode.STAGE.over(pair.OTHER, "other_decode"),
        depth.STAGE.over(pair.OTHER),
        caption.STAGE,
        qc.DEPTH.over(pair.OTHER),
        pair.WARP,
        qc.PAIR,
        commit.STAGE_PAIR,
        commit.RECORD_REFUSAL,
    )
    # on the driver: shards.pack
    # with `score_only`, in place of `clip`
    score: tuple[Stage, ...] = (decode.STAGE, score.MEASURE, commit.RECORD_SCORES, commit.RECORD_REFUSAL)


def stages_of(config: PreprocessConfig) -> Stages:
    """Return the stages with the resources that the configuration gives them.

    From the first stage on a GPU on, a clip stays in one actor: its frames travel once and never back. Several actors
    share a GPU (`depth_num_gpus` 0.25: four), so that it works for one while others draw masks.
    """
    plain = Stages()
    split, clip = (plain.split_pair, plain.clip_pair) if "source" in config.members else (plain.split, plain.clip)
    on_gpu = next(position for position, stage in enumerate(clip) if "depth_facts" in stage.writes)
    share = max(config.depth_num_gpus, config.captioner.num_gpus if config.captioner else 0.0)
    gpus = [share if position >= on_gpu else 0.0 for position in range(len(clip))]
    clip_mb = settings.clip_memory_mb(config)
    return Stages(
        split=tuple(replace(stage, memory_mb=settings.WORKER_MB) for stage in split),
        clip=tuple(replace(s, memory_mb=clip_mb, num_gpus=g) for s, g in zip(clip, gpus, strict=True)),
        score=tuple(replace(stage, memory_mb=clip_mb) for stage in plain.score),
    )


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
    settings.check(config)
    if sources is None:
        sources = find_sources(config, synthetic_config)
    started = time.time()
    shown = Progress(config.output, config.metrics_port)
    attempts = Attempts(config.output, config.max_attempts)
    with (
        exclusive(config.output),
        shown.serving(),
        runner.runner(runner_name, ray_config or RayConfig(), config.num_workers, attempts) as execute,
    ):
        job = Job(config, execute, stages or stages_of(config), shown, frozenset(retry))
        job.ledger.write_config({"preprocess": config, "ray": ray_config, "synthetic": synthetic_config})
        try:
            job.work(sources)
        except TooManyBugs as error:
            job.problems.append(str(error))
        else:
            job.judge()
        result = job.finish()
        result = replace(result, report=pages.write(config, job.scored, result))
        log_run(result, started, job.bugs, {"runner": runner_name, "num_workers": config.num_workers})
    return result


def find_sources(config: PreprocessConfig, synthetic_config: SyntheticConfig | None) -> list[inputs.Source]:
    """Return every input file; where `config.input` is None, of a synthetic corpus that is written first."""
    if config.input is not None:
        found = inputs.expand(config.input, config.output, config.list_root)
        return pairs.without_sources(found) if "source" in config.members else found
    if synthetic_config is None:
        raise ConfigError("preprocess.input", None, "a file, folder, glob or list; or a section `synthetic` beside it")
    if not storage.is_local(config.output):
        raise ConfigError("preprocess.input", None, "videos must be named where the output is an object store")
    if "source" in config.members and synthetic_config.second_camera_deg is None:
        raise ConfigError("synthetic.second_camera_deg", None, "degrees, for a dataset with the member source")
    paths = write_corpus(storage.local_path(config.output) / "source", synthetic_config)
    return inputs.expand([str(path) for path in paths])
