"""The choices of a preprocess run, what is allowed, and which of them each artifact depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ex4d.config import fingerprint, installed_versions, to_dict
from ex4d.errors import ConfigError
from ex4d.geometry.masks import MaskConfig
from pipelines.preprocess.filters import FilterConfig

PROFILES = ("default", "released")
STAGING = ("all", "current")
NEAR_DUPLICATES = ("group", "filter", "off")
MEMBERS = ("cond", "depth", "source")
METRIC = ("sidecar", "depth-pro", "zoedepth")  # estimators whose unit cameras can share
# Packages whose version may change a sample's bytes.
PACKAGES = ("ex4d-platform", "av", "numpy", "opencv-python-headless", "scenedetect-headless", "numba", "scipy")
VIDEO_CODE, CLIP_CODE = 2, 3  # raised when stages change what they write, so that older staging is not taken


WORKER_MB = 512  # resident memory of a worker and its decoding child at 1080p, without the clip: 230 to 260, measured
CLIP_BYTES_PER_PX = 32  # what a pixel of a clip's frames adds at the peak; 24 measured at 49 × 512 × 512, 4 masks


@dataclass(frozen=True)
class DecodeLimits:
    """What decoding one clip may use in its child process; reading a whole video for cuts gets more by its length.

    Args:
        timeout_s, cpu_s: seconds on the clock and of processor time; 120 s is 50 × what 49 frames of 4K need here.
        memory_mb: address space of the child, libraries included (about 500).
    """

    timeout_s: float = 120.0
    cpu_s: float = 120.0
    memory_mb: int = 6144


@dataclass(frozen=True)
class CaptionerConfig:
    """A network that describes clips without a caption.

    Args:
        model: a BLIP checkpoint: hub-id[@revision] or a local folder.
        prompt: what every caption begins with.
        max_new_tokens: its greatest length.
        num_gpus: share of a GPU, 0 for CPU; it runs in the actor of the depth stage, which gets the larger of both.
    """

    model: str
    prompt: str = ""
    max_new_tokens: int = 40
    num_gpus: float = 0.0


@dataclass(frozen=True)
class PreprocessConfig:
    """From videos to a dataset folder.

    Args:
        output: dataset folder.
        input: file, folder, glob, list (.txt, .csv, .tsv, .parquet), several with commas between, or a list of them, on
            this machine or in a store; None is the synthetic corpus, where the configuration has that section.
        list_root: folder that names in lists start from; None: each list's own.
        follow_links: take what links lead to outside of the folder that is named; else it is counted.
        cache_dir: local folder for copies of remote files; None: one in the system's folder for temporary files.
        cache_mb: its size, beside what is worked with right now.
        num_workers: CPU workers of a Ray that is started here.
        num_frames, size, fit: T, [H, W] px, and crop, pad or squeeze.
        fps: frames a second of a clip; None keeps the source's frames, every `stride`-th.
        clips_per_shot, clips_per_video: most clips of each; None for no limit on a video.
        min_shot_s: shorter shots give no clip.
        crop_bars: black bars around a shot are cut off before `fit`.
        score_only: measure scores and show what each threshold would keep, before depth and masks; no shards.
        depth: estimator; depth_path: its file, folder or weights; depth_num_gpus: share of a GPU for each, 0 for CPU.
        depth_batch_size: frames that a per-frame network sees at once; None is 8 on a GPU and 1 on the CPU.
        fov_deg: field of view over the longer side where the estimator gives no intrinsics.
        profile: "default", or "released" for the mapping of depth that the published weights saw.
        captioner: describes clips that have no caption; None leaves them without.
        masks: how masks are simulated.
        members: what samples hold beside the usual: cond, what a warp with wrong depth shows through visibility masks,
            and depth; or source alone: each video was filmed by a second camera, too, whose video lies beside it
            (`pipelines.preprocess.pairs`), and the one mask and its colours are the true warp from there.
        filters: thresholds on scores.
        limits: of decoding.
        near_duplicates: "group" puts videos that show nearly the same into one split, "filter" takes one of them (the
            largest picture, then the longest), "off" does not look.
        val_fraction: share of sources that go to val.
        shard_size_mb: a shard is closed before it grows over this.
        seed: of everything that is drawn.
        max_bad_fraction: share of bad videos, or of bad clips, above which the run fails and nothing is committed.
            One half: a crawl from the web loses a tenth to damage, and above a half it is the choices that are wrong.
        max_bugs: rows that may end in an unexpected error before the run stops.
        max_attempts: processes that one row may bring down in a run before it is refused as `worker_crash`.
        keep_staging: "all", so that earlier choices come back without work, or "current": after a commit, what other
            choices made of the same videos is deleted from staging; of two cameras, not what other pairs made.
        metrics_port: Prometheus may scrape it while the run lasts; None: nothing is served.
        metrics_host: address of that port; a cluster's Prometheus needs that of the driver's node, or 0.0.0.0.
    """

    output: str
    input: str | list[str] | None = None
    list_root: str | None = None
    follow_links: bool = False
    cache_dir: str | None = None
    cache_mb: int = 20480
    num_workers: int = 2
    num_frames: int = 49
    size: tuple[int, int] = (512, 512)
    fit: str = "crop"
    fps: float | None = None
    stride: int = 1
    clips_per_shot: int = 1
    clips_per_video: int | None = None
    min_shot_s: float = 0.0
    crop_bars: bool = True
    score_only: bool = False
    depth: str = "sidecar"
    depth_path: str | None = None
    depth_num_gpus: float = 0.0
    depth_batch_size: int | None = None
    fov_deg: float = 54.0
    profile: str = "default"
    captioner: CaptionerConfig | None = None
    masks: MaskConfig = field(default_factory=MaskConfig)
    members: tuple[str, ...] = ()
    filters: FilterConfig = field(default_factory=FilterConfig)
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    near_duplicates: str = "group"
    val_fraction: float = 0.02
    shard_size_mb: int = 256
    seed: int = 0
    max_bad_fraction: float = 0.5
    max_bugs: int = 10
    max_attempts: int = 3
    keep_staging: str = "all"
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"


def check(config: PreprocessConfig) -> None:
    """Return nothing where the choices can work. Raises ConfigError naming the first that cannot."""
    from ex4d.depth import ESTIMATORS
    from ex4d.video.resize import MODES

    def need(holds: bool, key: str, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"preprocess.{key}", getattr(config, key.partition(".")[0]), allowed)

    height, width = config.size
    need(bool(config.output), "output", "a folder")
    need(config.num_workers >= 1, "num_workers", "at least 1")
    need(config.num_frames >= 2, "num_frames", "at least 2")
    sides = min(height, width) >= 16 and max(height, width) <= 8192 and height % 2 == width % 2 == 0
    need(sides, "size", "[H, W], both even, from 16 to 8192")
    need(config.fit in MODES, "fit", ", ".join(MODES))
    need(config.fps is None or 0 < config.fps <= 1000, "fps", "null, or more than 0, up to 1000")
    need(config.stride >= 1, "stride", "at least 1")
    need(config.fps is None or config.stride == 1, "stride", "1 where preprocess.fps is given")
    need(config.clips_per_shot >= 1, "clips_per_shot", "at least 1")
    need(config.clips_per_video is None or config.clips_per_video >= 1, "clips_per_video", "null, or at least 1")
    need(config.min_shot_s >= 0, "min_shot_s", "at least 0")
    need(config.depth in ESTIMATORS, "depth", ", ".join(ESTIMATORS))
    need(config.depth_num_gpus >= 0, "depth_num_gpus", "0 for CPU, else a share of a GPU or a whole number")
    need(config.depth_batch_size is None or config.depth_batch_size >= 1, "depth_batch_size", "null, or at least 1")
    need(1 <= config.fov_deg <= 170, "fov_deg", "1 to 170")
    need(config.profile in PROFILES, "profile", ", ".join(PROFILES))
    need(set(config.members) <= set(MEMBERS), "members", f"a list of {', '.join(MEMBERS)}")
    if "source" in config.members:
        need(set(config.members) == {"source"}, "members", "source alone: its warp is the condition")
        need(config.masks.num_masks == 1, "masks.num_masks", "1 with the member source: the warp is the mask")
        need(config.depth in METRIC, "depth", f"{', '.join(METRIC)} with the member source: in the cameras' unit")
    need(config.cache_mb >= 1, "cache_mb", "at least 1")
    need(config.near_duplicates in NEAR_DUPLICATES, "near_duplicates", ", ".join(NEAR_DUPLICATES))
    need(0 <= config.val_fraction <= 1, "val_fraction", "0 to 1")
    need(config.shard_size_mb >= 1, "shard_size_mb", "at least 1")
    need(0 <= config.seed < 2**31, "seed", "0 to 2147483647")
    need(0 <= config.max_bad_fraction <= 1, "max_bad_fraction", "0 to 1")
    need(config.max_bugs >= 0, "max_bugs", "at least 0")
    need(config.max_attempts >= 1, "max_attempts", "at least 1")
    need(config.keep_staging in STAGING, "keep_staging", ", ".join(STAGING))
    need(config.metrics_port is None or 1 <= config.metrics_port <= 65535, "metrics_port", "null, or 1 to 65535")
    if config.captioner is not None:
        sane = config.captioner.max_new_tokens >= 1 and config.captioner.num_gpus >= 0
        need(sane, "captioner", "max_new_tokens at least 1, num_gpus at least 0")
    sample_settings(config)  # weights that are not to be had are known before any work
    limits = config.limits
    need(min(limits.timeout_s, limits.cpu_s) > 0 and limits.memory_mb >= 256, "limits", "seconds > 0, memory_mb >= 256")


def clip_memory_mb(config: PreprocessConfig) -> int:
    """Return the memory that Ray reserves for work on a clip, MB, so that a small machine works on fewer at once."""
    pixels = config.num_frames * config.size[0] * config.size[1]
    return WORKER_MB + (pixels * CLIP_BYTES_PER_PX >> 20)


@cache
def versions() -> dict[str, str]:
    """Return {package: version} of what may change a sample's bytes; "" where it is not installed."""
    return dict.fromkeys(PACKAGES, "") | installed_versions(PACKAGES)


def video_fingerprints(config: PreprocessConfig) -> tuple[str, str]:
    """Return the fingerprints of a video's record and of its refusal; the content hash stands in the name beside."""
    made = ("video", VIDEO_CODE, versions())
    return fingerprint(*made), fingerprint(*made, config.limits)


def clip_fingerprints(config: PreprocessConfig, facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the fingerprints of a clip's sample and of its refusal.

    Args:
        facts: what of the source and of the plan reaches the sample's bytes.
    """
    made = ("clip", CLIP_CODE, versions(), sample_settings(config), dict(facts))
    return fingerprint(*made), fingerprint(*made, config.limits, config.filters)


def score_fingerprint(config: PreprocessConfig, facts: Mapping[str, Any]) -> str:
    """Return the fingerprint of a clip's scores; `facts` as for `clip_fingerprints`."""
    seen = {name: facts[name] for name in ("sha256", "pts", "fps", "box", "shot_scores")}
    return fingerprint("scores", CLIP_CODE, versions(), config.size, config.fit, seen)


def sample_settings(config: PreprocessConfig) -> dict[str, Any]:
    """Return the settings that every sample depends on, whatever its source; no path of this machine is among them."""
    names = ("num_frames", "size", "fit", "fps", "stride", "depth", "fov_deg", "profile", "masks", "seed")
    everything = to_dict(config)
    chosen = {name: everything[name] for name in names}
    chosen["depth_weights"] = "" if config.score_only else _depth_weights(config.depth, config.depth_path)
    chosen["depth_batch_size"] = config.depth_batch_size  # other sums, so perhaps other last digits
    chosen["captioner"] = None
    if config.captioner is not None and not config.score_only:
        made = {name: everything["captioner"][name] for name in ("prompt", "max_new_tokens")}
        chosen["captioner"] = {"weights_sha256": _caption_weights(config.captioner.model), **made}
    chosen["members"] = sorted(set(config.members))
    return chosen


@cache
def _depth_weights(depth: str, depth_path: str | None) -> str:
    """Return what stands for the weights of an estimator by their content; a sidecar is known by the clip's facts."""
    from ex4d import hub
    from ex4d.depth import weight_folders

    folders = weight_folders(depth, depth_path)
    return hub.fingerprint(folders) if folders else ""


@cache
def _caption_weights(model: str) -> str:
    from ex4d import hub
    from ex4d.models.captioner import folder_of

    return hub.fingerprint([folder_of(model)])


def facts(config: PreprocessConfig, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return what dataset.json says of a dataset, but for what packing adds."""
    from ex4d.geometry import masks

    return {
        "sample": {
            "num_frames": config.num_frames,
            "size": list(config.size),
            "num_masks": config.masks.num_masks,
            "mask_kinds": list(masks.KINDS),
        },
        "config": dataset_settings(config),
        "versions": versions(),
        "counts": {name: counts[name] for name in ("videos_in", "videos_split", "clips_planned")},
    }


def dataset_settings(config: PreprocessConfig) -> dict[str, Any]:
    """Return the settings that dataset.json shows: those that decide which samples there are, and how they look."""
    names = (
        "clips_per_shot",
        "clips_per_video",
        "min_shot_s",
        "crop_bars",
        "filters",
        "near_duplicates",
        "val_fraction",
        "shard_size_mb",
    )
    everything = to_dict(config)
    return sample_settings(config) | {name: everything[name] for name in names}
