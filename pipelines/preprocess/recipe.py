"""The stages of a preprocess run, from top to bottom. A stage reads and writes columns of a row; see its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from ex4d.depth import WITHOUT_NETWORK
from ex4d.geometry.tracks import COTRACKER3
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

    The stages from the first to the last that runs a network are one chain in GPU actors, all others are CPU tasks. So
    a clip's frames travel to the actor and back once, through Ray's object store. Several actors may share a GPU
    (`depth_num_gpus` 0.25: four).
    """
    plain = Stages()
    is_pair = "source" in config.members
    of_video, clip = (plain.find_shots_pair, plain.clip_pair) if is_pair else (plain.find_shots, plain.clip)
    if config.scorer is not None:
        before = clip.index(score.FILTER) + 1
        clip = (*clip[:before], own_score.STAGE, *clip[before:])
    places = [place for place, stage in enumerate(clip) if _has_network(stage, config)]
    in_actor = range(places[0], places[-1] + 1) if places else ()
    gpus = [settings.gpu_share(config) if place in in_actor else 0.0 for place in range(len(clip))]
    clip_mb = settings.clip_memory_mb(config)
    return Stages(
        hash=_fetching(plain.hash),
        find_shots=_fetching([replace(stage, memory_mb=settings.WORKER_MB) for stage in of_video]),
        clip=_fetching([replace(s, memory_mb=clip_mb, num_gpus=g) for s, g in zip(clip, gpus, strict=True)]),
        score=_fetching([replace(stage, memory_mb=clip_mb) for stage in plain.score]),
    )


def _has_network(stage: Stage, config: PreprocessConfig) -> bool:
    """Return whether a stage runs a network."""
    if "depth_facts" in stage.writes:
        return config.depth not in WITHOUT_NETWORK or config.depth_num_gpus > 0
    if "caption_facts" in stage.writes:
        return config.captioner is not None
    return stage is own_score.STAGE or (stage is masks.STAGE and config.masks.tracker == COTRACKER3)


def _fetching(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(replace(stage, function=partial(fetch.sidecar_rules, stage.function)) for stage in stages)
