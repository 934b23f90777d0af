"""Novel views of scenes whose truth is known: how much the trained adapter adds, and to what.

Every scene is procedural, so the picture that the new camera would have taken exists exactly. Each method gets the
same condition, seed and steps; frame 0, which is given, is left out of every figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ex4d import synthetic
from ex4d.evaluate.metrics import inpaint, psnr, ssim
from ex4d.generate import GenerateConfig, generate, to_frames, to_pixels
from ex4d.geometry import masks
from ex4d.geometry.camera import Camera
from ex4d.geometry.render import warp_video
from ex4d.geometry.trajectory import build, radius_of
from ex4d.models.adapter import Ex4dModel
from ex4d.models.backbone import Base


@dataclass(frozen=True)
class EvaluateConfig:
    """Which scenes are looked at, and from where; the section `evaluate` of a config file.

    Attributes:
        num_scenes: how many held-out scenes.
        corpus_seed: of the corpus that the scenes are drawn from; no training corpus may use it.
        trajectory, angle_deg: the path of the new camera.
        seed: of the sampler's noise.
    """

    num_scenes: int = 16
    corpus_seed: int = 900_000
    trajectory: str = "orbit"
    angle_deg: float = 45.0
    seed: int = 0


@dataclass(frozen=True)
class View:
    """One held-out clip: source and exact novel view uint8 [T,H,W,3], z_depth [T,H,W], condition and its mask."""

    index: int
    frames: np.ndarray
    z_depth: np.ndarray
    truth: np.ndarray
    cond_video: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True)
class Score:
    """One method, one value a clip: PSNR in dB of the whole frame, inside the holes, and with seen pixels pasted; SSIM
    of the whole frame.
    """

    method: str
    whole: list[float] = field(default_factory=list)
    holes: list[float] = field(default_factory=list)
    whole_pasted: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)


METHODS = (
    "trained adapter",
    "zero adapter",
    "other clip's condition",
    "warp only",
    "OpenCV inpainting",
    "codec ceiling",
)


def make_view(index: int, world: synthetic.SyntheticConfig, config: EvaluateConfig) -> View:
    """Return scene `index` of a corpus with its exact novel view.

    The new camera keeps its pose relative to the source camera of the same frame, as the mesh of each frame does.
    """
    scene, cameras = synthetic.clip_scene(world, index)
    frames, z_depth = synthetic.render_clip(scene, cameras, world.fps, world.supersample)
    K = cameras[0].K
    path = build(config.trajectory, len(frames), config.angle_deg, radius_of(z_depth[0]))
    moved = [Camera(K, step @ camera.w2c, world.size) for step, camera in zip(path, cameras, strict=True)]
    truth, _ = synthetic.render_clip(scene, moved, world.fps, world.supersample)
    cond_video, visible = warp_video(frames, z_depth, K, path)
    return View(index, frames, z_depth, truth, cond_video, visible)


def compare(
    base: Base,
    trained: Ex4dModel,
    untrained: Ex4dModel,
    views: Sequence[View],
    sampler: GenerateConfig,
    seed: int,
    mask_range: Literal["unit", "released"] = "unit",
    on_view: Callable[[int, int], None] | None = None,
) -> tuple[list[Score], list[dict[str, np.ndarray]]]:
    """Return one Score a method, and for each view its videos by method.

    Args:
        trained, untrained: the same model with the trained adapter and with the zero adapter (= the base alone).
        views: at least two; the condition of the next one serves as the wrong condition.
    """
    scores = {name: Score(name) for name in METHODS}
    videos = []
    for index, view in enumerate(views):
        other = views[(index + 1) % len(views)]
        clean = view.cond_video[0]
        made = {
            "trained adapter": generate(base, trained, view.cond_video, view.visible, sampler, seed, mask_range),
            "zero adapter": generate(base, untrained, view.cond_video, view.visible, sampler, seed, mask_range),
            "other clip's condition": generate(
                base, trained, other.cond_video, other.visible, sampler, seed, mask_range, first_frame=clean
            ),
            "warp only": view.cond_video,
            "OpenCV inpainting": inpaint(view.cond_video, view.visible),
            "codec ceiling": to_frames(base.decode_latents(base.encode_video(to_pixels(view.truth, base.device)))),
        }
        seen = masks.erode(view.visible, sampler.erosion_px)
        for name, frames in made.items():
            pasted = np.where(seen[..., None], view.cond_video, frames)
            scores[name].whole.append(psnr(frames[1:], view.truth[1:]))
            scores[name].whole_pasted.append(psnr(pasted[1:], view.truth[1:]))
            scores[name].holes.append(psnr(frames[1:], view.truth[1:], ~seen[1:]))
            scores[name].ssim.append(
                float(np.mean([ssim(*pair) for pair in zip(frames[1:], view.truth[1:], strict=True)]))
            )
        videos.append(made)
        if on_view is not None:
            on_view(index + 1, len(views))
    return list(scores.values()), videos


def spread(values: Sequence[float]) -> str:
    """Return "mean ± standard deviation" with two digits, over the values that are there (a clip may have no hole)."""
    return f"{np.nanmean(values):.2f} ± {np.nanstd(values):.2f}"


def table(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of text: mean ± standard deviation over the clips, in dB; SSIM last."""
    columns = ["method", "whole frame", "in the holes", "whole frame, seen pixels pasted", "SSIM, whole frame"]
    values = [(s.whole, s.holes, s.whole_pasted, s.ssim) for s in scores]
    return columns, [[s.method, *map(spread, row)] for s, row in zip(scores, values, strict=True)]


def margins(scores: Sequence[Score]) -> dict[str, tuple[float, float]]:
    """Return {method: (dB whole frame, dB in holes)}: the trained adapter's lead, mean of paired differences."""
    by_name = {score.method: score for score in scores}
    best = by_name["trained adapter"]
    return {
        name: (
            float(np.nanmean(np.subtract(best.whole, score.whole))),
            float(np.nanmean(np.subtract(best.holes, score.holes))),
        )
        for name, score in by_name.items()
        if name != "trained adapter"
    }
