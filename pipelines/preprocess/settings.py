"""The settings of a preprocess run."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from ex4d.config import checked, setting
from ex4d.depth import CHOICES, FOREIGN
from ex4d.geometry.camera import fov_setting
from ex4d.geometry.masks import MaskConfig
from ex4d.video.pictures import MAX_FPS
from pipelines.preprocess.filters import FilterConfig, ScorerConfig

METRIC = ("sidecar", "depth-pro", "zoedepth")  # estimators whose depth is in a unit that cameras can share
WORKER_MB = 512  # resident memory of a worker and its decoding child at 1080p, without the clip; measured: 230 to 260
CLIP_BYTES_PER_PX = 32  # peak memory per pixel of a clip's frames; measured: 24 at 49 × 512 × 512 with 4 masks


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of decoding one clip of a video in its child process; reading a whole video for cuts gets more.

    Depth files have fixed limits (see depth/sidecar.py).
    """

    timeout_s: float = setting(120.0, "Wall-clock limit, seconds; 49 frames of 4K need about 2.5.", gt=0)
    cpu_s: float = setting(120.0, "CPU time limit, seconds.", gt=0)
    memory_mb: int = setting(
        6144, "Limit on the address space of the child process, MB; its libraries take about 500.", ge=256
    )

    def __post_init__(self) -> None:
        checked(self, "preprocess.limits")


@dataclass(frozen=True)
class CaptionerConfig:
    """A network that describes clips without a caption. It runs in the actor of the depth stage."""

    model: str = setting(
        MISSING,
        "Vision-language model of transformers (BLIP, LLaVA, Qwen-VL …): hub-id[@revision] or a local folder.",
        not_empty=True,
    )
    prompt: str = setting(
        "",
        "BLIP: text that every caption starts with; other models: the question; empty: a request to describe the "
        "picture.",
    )
    max_new_tokens: int = setting(40, "Longest caption, in tokens.", ge=1)
    num_gpus: float = setting(
        0.0,
        "Share of a GPU; 0: on the CPU. The actor gets the largest share of scorer, depth network and captioner.",
        ge=0,
        le=1,
    )

    def __post_init__(self) -> None:
        checked(self, "preprocess.captioner")


@dataclass(frozen=True)
class PreprocessConfig:
    """From videos to a dataset folder."""

    input: str | list[str] | None = setting(
        None,
        "Videos: a file, folder, glob or list (.txt, .csv, .tsv, .parquet, .json, .jsonl), local or remote, or several "
        "of them; null: the section `synthetic`.",
    )
    output: str = setting(
        "out/dataset", "Dataset folder to write; run the same command again to resume.", not_empty=True
    )
    num_workers: int = setting(2, "CPU workers, if this command starts Ray itself.", ge=1)
    num_frames: int = setting(49, "Frames of a clip.", ge=2)
    size: tuple[int, int] = setting((512, 512), "[height, width] of a clip, px.", ge=16, le=8192, multiple_of=2)
    fit: Literal["crop", "pad", "squeeze"] = setting(
        "crop", "How to fit a video of another aspect ratio into this size."
    )
    fps: float | None = setting(None, "Frames per second of a clip; null: the video's own.", gt=0, le=1000)
    depth: str = setting(
        "sidecar",
        "Depth estimator; sidecar: a depth file beside each video; auto: the first that works of sidecar, "
        "depth-anything-v2, parallax.",
        choices=CHOICES,
    )
    score_only: bool = setting(
        False, "Only measure scores and report what each filter would keep; no depth, masks or shards."
    )
    val_fraction: float = setting(0.02, "Fraction of sources that go to the validation split.", ge=0, le=1)
    seed: int = setting(
        0, "Seed of all random choices in clips; the split depends only on the videos.", ge=0, le=2**31 - 1
    )

    list_root: str | None = setting(
        None, "Folder that file names in lists are relative to; null: the folder of each list.", group="Input and cache"
    )
    image_fps: float | None = setting(
        None,
        "Read each folder of JPEG or PNG files as a video with this frame rate; null: pictures are not videos.",
        gt=0,
        le=MAX_FPS,
    )
    follow_links: bool = setting(False, "Follow links that lead out of the input folder; false: count and skip them.")
    cache_dir: str | None = setting(
        None, "Local folder for copies of remote videos and folders of pictures; null: a temporary folder."
    )
    cache_mb: int = setting(20480, "Maximum size of that cache, MB, not counting the videos in use.", ge=1)
    max_file_mb: int = setting(
        65536, "Reject remote videos and folders of pictures larger than this, MB, as file_too_large.", ge=1
    )
    allow_private_hosts: bool = setting(
        False, "Also fetch videos from this machine or its local network; false: reject them as private_host."
    )
    near_duplicates: Literal["group", "filter", "off"] = setting(
        "group",
        "Near-duplicate videos: group puts them into one split, filter keeps the largest, off disables the search.",
    )

    stride: int = setting(1, "Take every N-th frame of the video, if fps is null.", ge=1, group="Clips")
    clips_per_shot: int = setting(1, "Maximum number of clips per shot.", ge=1)
    clips_per_video: int | None = setting(None, "Maximum number of clips per video; null: no limit.", ge=1)
    min_shot_s: float = setting(0.0, "Skip shots shorter than this many seconds.", ge=0)
    crop_bars: bool = setting(True, "Crop black bars before resizing.")
    filters: FilterConfig = setting(FilterConfig(), "Thresholds on scores that decide which clips are kept.")
    scorer: ScorerConfig | None = setting(None, "A score of your own that filters clips before depth; null: none.")
    captioner: CaptionerConfig | None = setting(None, "Network that describes clips without a caption; null: none.")

    depth_python: str | None = setting(
        None, "Python executable of the environment for depth=da3, video-depth-anything or own."
    )
    depth_path: str | None = setting(
        None,
        "Depth file or folder for sidecar; weights (hub-id[@revision] or folder) for a network.",
        group="Depth and masks",
    )
    depth_fill_px: int = setting(
        0, "Fill holes of measured depth that are no wider than this, px of the clip; wider ones stay holes.", ge=0
    )
    depth_num_gpus: float = setting(0.0, "Share of a GPU for each depth network; 0: on the CPU.", ge=0, le=1)
    depth_batch_size: int | None = setting(
        None, "Frames that a per-frame network processes at once; null: 8 on a GPU (depth-pro: 2), 1 on the CPU.", ge=1
    )
    fov_deg: float | None = fov_setting()
    cameras: Literal["auto", "none", "estimator", "parallax", "colmap"] = setting(
        "auto",
        "Source cameras; auto: those of the depth estimator, if any; none: the camera stands still; estimator: reject "
        "clips without any; parallax or colmap: from motion.",
    )
    source_motion: Literal["remove", "keep", "smooth"] = setting(
        "keep",
        "How mask paths treat the source camera's motion, if known; keep: move with it; remove: fixed in the world, as "
        "in generate; smooth: stabilised.",
    )
    persistent_frames: int = setting(
        0,
        "Number of other frames whose static surfaces stay visible in masks if the path sees them, as in generate.",
        ge=0,
    )
    profile: Literal["default", "released"] = setting(
        "default",
        "How relative depth becomes z-depth and, for two cameras, how meshes are built; released: as for the published "
        "weights. Masks always use the default mesh.",
    )
    masks: MaskConfig = setting(MaskConfig(), "How masks are simulated.")
    members: tuple[Literal["cond", "depth", "source"], ...] = setting(
        (),
        "Extra members of samples: cond (warp with imperfect depth), depth, or source alone (videos of two cameras).",
    )

    shard_size_mb: int = setting(
        256, "Start a new shard before the current one exceeds this size.", ge=1, group="Shards and runs"
    )
    limits: DecodeLimits = setting(DecodeLimits(), "Resources that decoding may use.")
    max_bad_fraction: float = setting(
        0.5, "Fail, and commit nothing, if a larger fraction of videos or of clips is bad.", ge=0, le=1
    )
    max_bugs: int = setting(10, "Stop after more than this many unexpected errors.", ge=0)
    max_attempts: int = setting(3, "Reject a row as worker_crash after it has killed this many processes.", ge=1)
    keep_staging: Literal["all", "current", "none"] = setting(
        "all",
        "After a commit: all keeps the work of earlier settings for reuse, current deletes it, none also deletes the "
        "samples that shards hold.",
    )
    metrics_port: int | None = setting(
        None, "Serve Prometheus metrics on this port while the run lasts; null: off.", ge=1, le=65535
    )
    metrics_host: str = setting(
        "127.0.0.1",
        "Address of that port; for a Prometheus on another machine, the address of the driver's node, or 0.0.0.0.",
    )

    def __post_init__(self) -> None:
        need = checked(self, "preprocess")
        has_python = self.depth not in FOREIGN or self.depth_python is not None
        need(has_python, "depth_python", f"must be the Python executable of an environment for depth={self.depth}")
        need(self.fps is None or self.stride == 1, "stride", "must be 1 if preprocess.fps is set")
        pairs = "source" in self.members
        # Otherwise nothing measures the score, and the filter would keep every clip.
        need(
            pairs or self.filters.max_warp_error is None,
            "filters.max_warp_error",
            "must be null without source in members",
        )
        moves = self.cameras in ("parallax", "colmap") and (self.cameras, self.depth) != ("parallax", "parallax")
        allowed = "must be null unless cameras is parallax (with another depth) or colmap"
        need(moves or self.filters.max_camera_depth_error is None, "filters.max_camera_depth_error", allowed)
        if pairs:
            alone = "must be [source]: samples of two cameras have no other extra members"
            need(set(self.members) == {"source"}, "members", alone)
            need(self.masks.num_masks == 1, "masks.num_masks", "must be 1 with members=[source]")
            metric = f"must be one of {', '.join(METRIC)} with members=[source]: cameras need its unit"
            need(self.depth in METRIC, "depth", metric)


def gpu_share(config: PreprocessConfig) -> float:
    """Return the share of a GPU that an actor reserves: the largest of the depth's, captioner's and scorer's."""
    others = [one.num_gpus for one in (config.captioner, config.scorer) if one is not None]
    return max(config.depth_num_gpus, *others, 0.0)


def clip_memory_mb(config: PreprocessConfig) -> int:
    """Return the memory, MB, that Ray reserves per clip, so that a small machine works on fewer clips at a time."""
    pixels = config.num_frames * config.size[0] * config.size[1]
    return WORKER_MB + (pixels * CLIP_BYTES_PER_PX >> 20)
