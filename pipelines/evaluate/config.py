"""The settings of `ex4d evaluate`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from ex4d.config import checked, setting
from ex4d.depth import ESTIMATORS
from ex4d.geometry.camera import fov_setting
from ex4d.geometry.camera_path import SOURCE_MOTIONS
from ex4d.geometry.profiles import PROFILES
from pipelines.evaluate.stages import CODEC, METHODS, OTHER

CORPUS_SEED = 900_000  # seed of the evaluation scenes; no training corpus may use it
RANGE = re.compile(r"[a-z0-9_-]{1,32}")
RANGES = {"small": ("orbit", 30.0), "large": ("orbit", 60.0), "extreme": ("orbit", 90.0), "full": ("full", 90.0)}
Options = dict[str, float | bool | str]


@dataclass(frozen=True)
class EvaluateConfig:
    """How an adapter is measured."""

    RENAMED: ClassVar[dict[str, str]] = {"corpus_seed": f"was removed: the scenes always have the seed {CORPUS_SEED}"}

    adapter: str = setting("out/run/adapter", "Folder written by `ex4d train`, its file, or a released ex4d.ckpt.")
    base: str | None = setting(None, "Base model: tiny, a folder, or a hub id; null: the adapter's own.")
    output: str = setting("out/evaluation", "Folder or URL of the results.")
    videos: str | None = setting(
        None,
        "Videos on this machine: a folder, glob or list; null: procedural scenes, whose true novel views are known.",
    )
    num_scenes: int = setting(16, "Number of procedural scenes.", ge=1)
    ranges: dict[str, tuple[str, float] | tuple[str, float, Options]] = setting(
        RANGES,
        "{name: [trajectory or pose file, degrees]}, optionally with its options as a third item; default: the paper's "
        "four.",
        not_empty=True,
    )
    methods: tuple[str, ...] | None = setting(
        None,
        "Methods to compare; null: all but other, and codec only where the truth is known.",
        choices=METHODS,
        not_empty=True,
    )
    seed: int = setting(0, "Seed of the sampler's noise.", ge=0)
    num_workers: int = setting(2, "CPU workers, if this command starts Ray itself.", ge=1)
    num_gpus: float = setting(0.0, "Share of a GPU for each worker; 0: on the CPU.", ge=0, le=1)

    depth: str = setting("sidecar", "Depth estimator of videos.", choices=ESTIMATORS, group="Videos and scenes")
    depth_python: str | None = setting(
        None, "Python executable of the environment for depth=da3, video-depth-anything or own."
    )
    depth_path: str | None = setting(None, "Depth file, or weights of a network.")
    depth_fill_px: int = setting(0, "Fill holes of measured depth that are no wider than this, px of the frames.", ge=0)
    fov_deg: float | None = fov_setting()
    cameras: str = setting(
        "auto",
        "Source cameras; auto: those of the depth estimator, if any; none; estimator; parallax: from motion; colmap.",
    )
    source_motion: str = setting(
        "keep",
        "How paths treat the source camera's motion, if known; keep: move with it; remove: fixed in the world; smooth: "
        "move with a stabilised camera.",
        choices=SOURCE_MOTIONS,
    )
    persistent_frames: int = setting(0, "Number of other frames whose static surfaces fill holes.", ge=0)
    profile: str | None = setting(None, "Mesh profile; null: what the adapter was trained with.", choices=PROFILES)
    num_frames: int | None = setting(None, "Frames of a clip, 4k+1; null: what the adapter was trained at.", ge=1)
    size: tuple[int, int] | None = setting(None, "[height, width], px; null: what the adapter was trained at.")

    image_features: str | None = setting(
        None,
        "DINOv2 weights (folder or hub-id[@revision]) for a Fréchet distance of frames; null: not measured.",
        group="Measures and failures",
    )
    video_features: str | None = setting(
        None, "VideoMAE weights (folder or hub-id[@revision]) for a Fréchet distance of videos; null: not measured."
    )
    max_bad_fraction: float = setting(0.1, "Fail if a larger fraction of views fails.", ge=0, le=1)
    max_bugs: int = setting(10, "Stop after more than this many unexpected errors.", ge=0)
    max_attempts: int = setting(3, "Reject a row as worker_crash after it has killed this many processes.", ge=1)

    def __post_init__(self) -> None:
        need = checked(self, "evaluate")
        truth = f"must not hold {CODEC} with evaluate.videos: it needs the true views of scenes"
        need(self.videos is None or CODEC not in (self.methods or ()), "methods", truth)
        named = all(RANGE.fullmatch(name) for name in self.ranges)
        need(named, "ranges", "names must be 1 to 32 of a-z, 0-9, _ and -, each with [trajectory, degrees]")

    @property
    def compared(self) -> tuple[str, ...]:
        """The methods to compare, in the order of METHODS."""
        usual = [name for name in METHODS if name != OTHER and (name != CODEC or self.videos is None)]
        return tuple(name for name in METHODS if name in (self.methods or usual))
