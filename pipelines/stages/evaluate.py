"""One view of one clip: what each method makes of it, and how good that is. The model stays loaded between rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.ledger import Ledger
from pipelines.stage import Row, Stage

if TYPE_CHECKING:
    from ex4d.evaluate.views import View
    from ex4d.generate import GenerateConfig
    from ex4d.models.adapter import Ex4dModel
    from ex4d.models.encoders import Base
    from ex4d.synthetic import SyntheticConfig

ADAPTER, BASE, OTHER, WARP, INPAINT, CODEC = "adapter", "base", "other", "warp", "inpaint", "codec"
METHODS = {
    ADAPTER: "trained adapter",
    BASE: "zero adapter: the base alone",
    OTHER: "trained, another clip's condition",
    WARP: "warp only",
    INPAINT: "OpenCV inpainting",
    CODEC: "the codec's own reconstruction",
}


@dataclass(frozen=True)
class Evaluation:
    """What every row is evaluated with.

    Args:
        output: folder that the results lie in.
        adapter, base: as `generate.load` takes them.
        sampler: how videos are sampled; seed: of the noise.
        methods: keys of METHODS.
        world: of the procedural scenes; None where videos are looked at.
        reconstruct: what else `reconstruct` takes for videos: depth, size, num_frames, profile, …
        image_features, video_features: weights of networks; None for none.
        mask_range: what the adapter was trained with.
        device: cuda or cpu.
    """

    output: str
    adapter: str
    base: str | None
    sampler: GenerateConfig
    seed: int
    methods: tuple[str, ...]
    world: SyntheticConfig | None
    reconstruct: Mapping[str, Any]
    image_features: str | None
    video_features: str | None
    mask_range: Any
    device: str


@lru_cache(maxsize=1)
def loaded(adapter: str, base: str | None, device: str, sampler: GenerateConfig) -> tuple[Base, Ex4dModel]:
    """Return the base and its adapter, kept by this process."""
    import torch

    from ex4d.generate import load

    if device == "cpu":
        torch.set_num_threads(1)  # sums depend on the number of threads; rows run side by side
    return load(adapter, base, device, sampler)


def load_model(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return nothing; the model is loaded: once a process, so that its time is not the first view's."""
    loaded(context.adapter, context.base, context.device, context.sampler)
    return {}


def view_of(case: Mapping[str, Any], path: Mapping[str, Any], context: Evaluation) -> View:
    """Return a case seen along a path.

    Args:
        case: `index` of a scene, or `path` of a video. path: `trajectory` and `angle_deg`.
    """
    from ex4d.evaluate import views

    if context.world is not None:
        along = (path["trajectory"], path["angle_deg"], context.reconstruct["profile"])
        return views.of_scene(case["index"], context.world, *along)
    return views.of_video(
        case["path"],
        trajectory_name=path["trajectory"],
        angle_deg=path["angle_deg"],
        device=context.device,
        **context.reconstruct,
    )


def make_view(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return `view`: the clip, its warp along the path, and the truth where it is known."""
    return {"view": view_of(row["case"], row["path"], context)}


def make_videos(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return `made`: {method: frames uint8 [T, H, W, 3]}, and `seen`: the mask that all of them were given."""
    from ex4d.evaluate.metrics import inpaint
    from ex4d.generate import generate, to_frames, to_pixels
    from ex4d.geometry import masks

    view = row["view"]
    base, model = loaded(context.adapter, context.base, context.device, context.sampler)

    def sampled(condition: View) -> np.ndarray:
        given = (condition.cond_video, condition.visible, context.sampler, context.seed, context.mask_range)
        return generate(base, model, *given, first_frame=view.cond_video[0])

    def alone() -> np.ndarray:
        with model.base_alone():
            return sampled(view)

    def codec() -> np.ndarray:
        return to_frames(base.decode_latents(base.encode_video(to_pixels(view.truth, base.device))))

    makers = {
        ADAPTER: lambda: sampled(view),
        BASE: alone,
        OTHER: lambda: sampled(view_of(row["other"], row["path"], context)),
        WARP: lambda: view.cond_video,
        INPAINT: lambda: inpaint(view.cond_video, view.visible),
        CODEC: codec,
    }
    return {
        "made": {method: makers[method]() for method in context.methods},
        "seen": masks.erode(view.visible, context.sampler.erosion_px),
    }


def measure(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return `figures`: {method: {key of evaluate.measures.MEASURES: figure or None}}."""
    from ex4d.evaluate import measures

    figures = {method: measures.measure(row["view"], made, row["seen"]) for method, made in row["made"].items()}
    return {"figures": figures}


def measure_features(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return `features`: {"METHOD.image" or "METHOD.video": float32 [N, D]}, with those of "real" beside them.

    Real is the true novel view where it is known, else the source.
    """
    from ex4d.models import features

    view = row["view"]
    found = {}
    for name, frames in {"real": view.frames if view.truth is None else view.truth, **row["made"]}.items():
        if context.image_features is not None:
            found[f"{name}.image"] = features.image_features(frames[1:], context.image_features, context.device)
        if context.video_features is not None:
            found[f"{name}.video"] = features.video_features(frames, context.video_features, context.device)
    return {"features": found}


def write_view(row: Row, context: Evaluation) -> dict[str, Any]:
    """Return nothing; figures, features and videos lie in staging afterwards, written atomically."""
    from ex4d import video
    from ex4d.data.tar import sample_tar
    from ex4d.data.tensors import encode_tensors
    from ex4d.viewer.page import depth_colours

    view = row["view"]
    shown = {"source": view.frames, "depth": depth_colours(view.z_depth), "condition": view.cond_video, **row["made"]}
    if view.truth is not None:
        shown["truth"] = view.truth
    members = {f"{name}.mp4": video.encode(frames, view.fps) for name, frames in shown.items()}
    facts = {"fps": view.fps, "visible_share": float(view.visible[1:].mean()), "figures": row["figures"]}
    members["json"] = json.dumps(facts, sort_keys=True).encode()
    if row["features"]:
        members["features.safetensors"] = encode_tensors(row["features"])
    Ledger(context.output).write_sample(row["artifact"], sample_tar(row["key"], members))
    return {}


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
        writes=(),
    ),
)


def stages(num_gpus: float) -> tuple[Stage, ...]:
    """Return the stages with a share of a GPU each: one process does a row, so that no picture travels."""
    return tuple(replace(stage, num_gpus=num_gpus) for stage in STAGES)
