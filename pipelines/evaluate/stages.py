"""Render one view of one clip with each method, and measure it. The model stays loaded between rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d.errors import BadSample
from pipelines.runtime.ledger import Ledger
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from ex4d.evaluate.views import View
    from ex4d.generate import GenerateConfig
    from ex4d.models.adapter import Ex4dModel
    from ex4d.models.encoders import Base
    from ex4d.models.experts import Experts
    from ex4d.reconstruct import Clip
    from ex4d.synthetic import SyntheticConfig

ADAPTER, BASE, OTHER, WARP, INPAINT, CODEC = "adapter", "base", "other", "warp", "inpaint", "codec"
METHODS = {
    ADAPTER: "trained adapter",
    BASE: "base alone (zero adapter)",
    OTHER: "trained adapter, condition of another clip",
    WARP: "warp only",
    INPAINT: "OpenCV inpainting",
    CODEC: "VAE reconstruction of the true view",
}


@dataclass(frozen=True)
class Evaluation:
    """The settings that all rows are evaluated with.

    Args:
        output: folder of the results.
        adapter, base: see `generate.load`. model: content hashes of both.
        sampler: settings of the sampler. seed: seed of the noise.
        methods: keys of METHODS.
        world: settings of the procedural scenes; None for videos.
        reconstruct: settings of ReconstructConfig for videos: depth, size, num_frames, profile, …
        image_features, video_features: weights of the feature networks; None: not measured.
        mask_range, source_video: as the adapter was trained.
        device: cuda or cpu.
        source_motion, persistent_frames, backend: see `ex4d.evaluate.views.along`.
    """

    output: str
    adapter: str
    base: str | None
    model: str
    sampler: GenerateConfig
    seed: int
    methods: tuple[str, ...]
    world: SyntheticConfig | None
    reconstruct: Mapping[str, Any]
    image_features: str | None
    video_features: str | None
    mask_range: Any
    device: str
    source_video: bool = False
    source_motion: str = "keep"
    persistent_frames: int = 0
    backend: str = "cpu"


@lru_cache(maxsize=1)
def loaded(
    adapter: str, base: str | None, model: str, device: str, sampler: GenerateConfig
) -> tuple[Base, Ex4dModel | Experts]:
    """Load the base and its adapter; this process caches them until others are requested.

    Args:
        model: content hashes of both, so that a replaced file is loaded again.
    """
    import torch

    from ex4d.generate import load

    if device == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads, and rows run in parallel
    return load(adapter, base, device, sampler)


def _loaded(context: Evaluation) -> tuple[Base, Ex4dModel | Experts]:
    return loaded(context.adapter, context.base, context.model, context.device, context.sampler)


def load_model(row: Row, context: Evaluation) -> dict[str, Any]:
    """Load the model, once per process; a stage of its own, so that the time is not attributed to a view."""
    _loaded(context)
    return {}


@lru_cache(maxsize=2)
def _scene(index: int, world: SyntheticConfig, profile: str) -> Clip:
    from ex4d.evaluate import views

    return views.scene_clip(index, world, profile)


@lru_cache(maxsize=2)
def _video(path: str, content: tuple[str, ...], device: str, choices: tuple[tuple[str, Any], ...]) -> Clip:
    from ex4d.reconstruct import read
    from ex4d.reconstruct_config import ReconstructConfig

    return read(path, ReconstructConfig(device=device, **dict(choices)))


def view_of(row: Row, which: str, context: Evaluation) -> View:
    """Return a view along the row's path of its `case`, or of `other`; the clip is cached for the next path."""
    from ex4d.evaluate import views

    case, path = row[which], row["path"]
    if context.world is not None:
        clip = _scene(case["index"], context.world, context.reconstruct["profile"])
    else:
        choices = tuple(sorted(context.reconstruct.items()))
        clip = _video(case["path"], tuple(case["content"]), context.device, choices)
    how = (context.source_motion, context.persistent_frames, context.backend)
    return views.along(clip, views.Path(path["name"], path["angle_deg"], path["options"]), *how)


def make_view(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return `view`: the clip, its warp along the path, and the true novel view if it is known."""
    from ex4d.evaluate import views

    view = view_of(row, "case", context)
    return {"view": view if context.world is None else views.with_truth(view, row["case"]["index"], context.world)}


def make_videos(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return `made`: {method: frames uint8 [T, H, W, 3]}, and `seen`: the eroded mask that all methods used.

    Methods that cannot run are omitted: OTHER, if the other clip is bad.
    """
    from ex4d.evaluate.metrics import inpaint
    from ex4d.generate import generate, to_frames, to_pixels
    from ex4d.geometry import masks

    view = row["view"]
    base, model = _loaded(context)
    visible = masks.erode(view.visible, context.sampler.erosion_px)
    cond_video = view.cond_video * visible[..., None]
    source = view.clip.frames if context.source_video else None

    def sampled(condition: View, source: np.ndarray | None) -> np.ndarray:
        asked = (condition.cond_video, condition.visible, context.sampler, context.seed, context.mask_range)
        return generate(base, model, *asked, first_frame=view.cond_video[0], source=source)

    def alone() -> np.ndarray:
        with model.base_alone():
            return sampled(view, None)

    def other() -> np.ndarray | None:
        try:
            return sampled(view_of(row, "other", context), source)
        except BadSample:
            return None

    makers: dict[str, Callable[[], np.ndarray | None]] = {
        ADAPTER: lambda: sampled(view, source),
        BASE: alone,
        OTHER: other,
        WARP: lambda: cond_video,
        INPAINT: lambda: inpaint(cond_video, visible),
        CODEC: lambda: to_frames(base.decode_latents(base.encode_video(to_pixels(view.truth, base.device)))),
    }
    videos = {method: makers[method]() for method in context.methods}
    return {"made": {method: frames for method, frames in videos.items() if frames is not None}, "seen": visible}


def measure(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return `figures`: {method: {key of evaluate.measures.MEASURES: figure or None}}."""
    from ex4d.evaluate import measures

    figures = {method: measures.measure(row["view"], frames, row["seen"]) for method, frames in row["made"].items()}
    return {"figures": {method: figures.get(method, measures.NOTHING) for method in context.methods}}


def measure_features(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return `features`: {"METHOD.image" or "METHOD.video": float32 [N, D]}, and the same for "real".

    "real" is the true novel view if it is known, else the source.
    """
    from ex4d.models import features

    view = row["view"]
    vectors = {}
    for name, frames in {"real": view.clip.frames if view.truth is None else view.truth, **row["made"]}.items():
        if context.image_features is not None:
            vectors[f"{name}.image"] = features.image_features(frames[1:], context.image_features, context.device)
        if context.video_features is not None:
            vectors[f"{name}.video"] = features.video_features(frames[1:], context.video_features, context.device)
    return {"features": vectors}


def write_view(row: Row, context: Evaluation) -> dict[str, Any]:
    """Write figures, features and videos to staging atomically; return the size and hash of the written file."""
    from ex4d import video
    from ex4d.data.tar import sample_tar
    from ex4d.data.tensors import encode_tensors
    from ex4d.viewer.page import depth_colours

    view = row["view"]
    clip = view.clip
    shown = {"source": clip.frames, "depth": depth_colours(clip.z_depth), "condition": view.cond_video, **row["made"]}
    if view.truth is not None:
        shown["truth"] = view.truth
    members = {f"{name}.mp4": video.encode(frames, clip.fps) for name, frames in shown.items()}
    facts = {"fps": clip.fps, "visible_share": float(view.visible[1:].mean()), "figures": row["figures"]}
    members["json"] = json.dumps(facts, sort_keys=True).encode()
    if row["features"]:
        members["features.safetensors"] = encode_tensors(row["features"])
    return {"staged": Ledger(context.output).write_sample(row["artifact"], sample_tar(row["key"], members))}


STAGES = (
    Stage("load_model", load_model, reads=(), writes=()),
    Stage("make_view", make_view, reads=("case", "path"), writes=("view",)),
    Stage("make_videos", make_videos, reads=("view", "other", "path"), writes=("made", "seen")),
    Stage("measure", measure, reads=("view", "made", "seen"), writes=("figures",)),
    Stage("features", measure_features, reads=("view", "made"), writes=("features",)),
    Stage(
        "write_view",
        write_view,
        reads=("key", "artifact", "view", "made", "figures", "features"),
        writes=("staged",),
    ),
)


def stages(num_gpus: float) -> tuple[Stage, ...]:
    """Return the stages, all with the same share of a GPU, so that one process runs a whole row."""
    return tuple(replace(stage, num_gpus=num_gpus) for stage in STAGES)
