"""The stages of a preprocess run, from top to bottom. A stage reads and writes columns of a row; see its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipelines.preprocess import fetch, settings, units
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.stages import (
    caption,
    commit,
    condition,
    decode,
    depth,
    identify,
    masks,
    own_score,
    pair,
    probe,
    qc,
    score,
    shots,
)
from pipelines.runtime.stage import Stage


@dataclass(frozen=True)
class Stages:
    """The whole pipeline, from top to bottom: the stages for each file, for each new content, and for each clip."""

    hash: tuple[Stage, ...] = (identify.STAGE,)
    # On the driver: files with the same content become one video.
    find_shots: tuple[Stage, ...] = (probe.STAGE, shots.STAGE, commit.RECORD_VIDEO, units.FIRST_CLIPS)
    clip: tuple[Stage, ...] = (
        decode.STAGE,
        score.MEASURE,
        score.FILTER,
        depth.STAGE,
        caption.STAGE,
        qc.DEPTH,
        masks.STAGE,
        condition.STAGE,
        qc.MASKS,
        commit.STAGE_SAMPLE,
    )
    # With the member `source`, these replace `find_shots` and `clip`: depth is the other camera's, the mask its warp's.
    find_shots_pair: tuple[Stage, ...] = (
        probe.STAGE,
        shots.STAGE,
        pair.NEED,
        probe.STAGE.over(pair.OTHER, "other_probe"),
        shots.STAGE.over(pair.OTHER, "other_shots"),
        pair.CHECK,
        commit.RECORD_PAIR,
        units.FIRST_CLIPS,
    )
    clip_pair: tuple[Stage, ...] = (
        decode.STAGE,
        score.MEASURE,
        score.FILTER,
        pair.CAMERAS,
        decode.STAGE.over(pair.OTHER, "other_decode"),
        depth.STAGE.over(pair.OTHER),
        caption.STAGE,
        qc.DEPTH.over(pair.OTHER),
        pair.WARP,
        qc.PAIR,
        commit.STAGE_PAIR,
    )
    # Then packing.Packing: workers build the shards, the driver writes the tables.
    # With `score_only`, in place of `clip`:
    score: tuple[Stage, ...] = (decode.STAGE, score.MEASURE)


def stages_of(config: PreprocessConfig) -> Stages:
    """Return the stages with the resources that the configuration assigns to them.

    Depth, captions and a user's score run in GPU actors, everything else in CPU tasks. A clip's frames travel to the
    actor and back through Ray's object store. Several actors may share a GPU (`depth_num_gpus` 0.25: four).
    """
    plain = Stages()
    is_pair = "source" in config.members
    of_video, clip = (plain.find_shots_pair, plain.clip_pair) if is_pair else (plain.find_shots, plain.clip)
    if config.scorer is not None:
        before = clip.index(score.FILTER) + 1
        clip = (*clip[:before], own_score.STAGE, *clip[before:])
    on_gpu = {"depth_facts", "caption_facts"}
    chosen = (config.captioner, config.scorer)
    share = max(config.depth_num_gpus, *(one.num_gpus for one in chosen if one is not None), 0.0)
    gpus = [share if on_gpu & set(stage.writes) or stage is own_score.STAGE else 0.0 for stage in clip]
    clip_mb = settings.clip_memory_mb(config)
    return Stages(
        hash=_fetching(plain.hash),
        find_shots=_fetching([replace(stage, memory_mb=settings.WORKER_MB) for stage in of_video]),
        clip=_fetching([replace(s, memory_mb=clip_mb, num_gpus=g) for s, g in zip(clip, gpus, strict=True)]),
        score=_fetching([replace(stage, memory_mb=clip_mb) for stage in plain.score]),
    )


def _fetching(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(replace(stage, function=partial(fetch.sidecar_rules, stage.function)) for stage in stages)
