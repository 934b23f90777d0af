"""What each artifact of a preprocess run depends on: the fingerprints in its name, and the settings in dataset.json."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ex4d.config import Digest, fingerprint, installed_versions, to_dict
from ex4d.depth import AUTO, WITHOUT_NETWORK
from ex4d.geometry.tracks import COTRACKER3
from pipelines.preprocess.settings import PreprocessConfig, gpu_share

# Packages whose version may change a sample's bytes.
PACKAGES = ("ex4d-platform", "av", "numpy", "opencv-python-headless", "scenedetect-headless", "numba", "scipy")
VIDEO_CODE, CLIP_CODE = 3, 7  # increment when stages change their output, so that older staging is not reused


@cache
def versions() -> dict[str, str]:
    """Return {package: version} of packages that may change a sample's bytes; "" if a package is not installed."""
    return dict.fromkeys(PACKAGES, "") | installed_versions(PACKAGES)


def video_fingerprints(config: PreprocessConfig) -> tuple[str, str]:
    """Return the fingerprints for the names of a video's record and of its refusal; the content hash is separate."""
    parts = ("video", VIDEO_CODE, versions())
    return fingerprint(*parts), fingerprint(*parts, differing(to_dict(config.limits), to_dict(type(config)().limits)))


class ClipNames:
    """Names a clip's artifacts in the ledger for one configuration, whose part of the digests is computed once."""

    def __init__(self, config: PreprocessConfig):
        usual = type(config)()
        chosen = differing(sample_settings(config), sample_settings(usual))
        limits = differing(to_dict(config.limits), to_dict(usual.limits))
        filters = differing(to_dict(config.filters), to_dict(usual.filters))
        self._made = Digest("clip", CLIP_CODE, versions(), chosen)
        thresholds = (None, None) if config.scorer is None else (config.scorer.min, config.scorer.max)
        self._judged = (limits, filters, *([] if thresholds == (None, None) else [thresholds]))
        self._seen = Digest("scores", CLIP_CODE, versions(), config.size, config.fit)
        self._drawn = Digest(config.seed)

    def of(self, facts: Mapping[str, Any]) -> tuple[str, str, str]:
        """Return the fingerprints of a clip's sample, of its refusal, and of its scores.

        Args:
            facts: everything in the source and the plan that affects the sample's bytes.
        """
        seen = {name: facts[name] for name in ("sha256", "pts", "fps", "box", "shot_scores")}
        sample, refusal = self._made.of(dict(facts)), self._made.of(dict(facts), *self._judged)
        return sample, refusal, self._seen.of(seen)

    def seed(self, key: str) -> int:
        """Return the seed for a clip's random choices."""
        return int(self._drawn.of(key)[:8], 16)


_last: list[tuple[PreprocessConfig, ClipNames]] = []


def clip_names(config: PreprocessConfig) -> ClipNames:
    """Return the ClipNames of a configuration; the last one is cached, since a worker plans video by video."""
    if not _last or _last[0][0] != config:
        _last[:] = [(config, ClipNames(config))]
    return _last[0][1]


def differing(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from their defaults.

    A fingerprint holds only these, so that staged work stays valid when a setting is added. If a default changes,
    increment CLIP_CODE.
    """
    inner = {name: (value, defaults.get(name)) for name, value in values.items() if value != defaults.get(name)}
    return {
        name: differing(value, default) if isinstance(value, dict) and isinstance(default, dict) else value
        for name, (value, default) in inner.items()
    }


def sample_settings(config: PreprocessConfig) -> dict[str, Any]:
    """Return the settings that every sample depends on, regardless of its source; none is a path of this machine."""
    names = (
        *("num_frames", "size", "fit", "fps", "stride", "depth", "cameras"),
        *("source_motion", "persistent_frames", "depth_fill_px", "fov_deg", "profile", "masks", "seed"),
    )
    everything = to_dict(config)
    chosen = {name: everything[name] for name in names}
    without_depth = config.score_only or config.depth == AUTO  # auto: `run` has not chosen yet
    chosen["depth_weights"] = "" if without_depth else _depth_weights(config.depth, config.depth_path)
    chosen["depth_batch_size"] = config.depth_batch_size  # another summation order may change the last digits
    chosen["captioner"] = None
    if config.captioner is not None and not config.score_only:
        made = {name: everything["captioner"][name] for name in ("prompt", "max_new_tokens")}
        chosen["captioner"] = {"weights_sha256": _caption_weights(config.captioner.model), **made}
    chosen["members"] = sorted(set(config.members))
    simulated = config.masks.tracking > 0 and "source" not in config.members and not config.score_only
    tracked = config.masks.tracker == COTRACKER3 and simulated
    chosen["masks"]["tracker_path"] = _tracker_weights(config.masks.tracker_path) if tracked else None
    if config.persistent_frames:
        chosen["moving_bodies"] = "flow"  # how moving bodies are found if the depth estimator does not report them
    if config.cameras == "colmap":
        from ex4d.depth import colmap

        colmap.check()
        chosen |= installed_versions((colmap.PACKAGE,))
    if config.scorer is not None and not config.score_only:
        chosen["scorer"] = _scorer(config.scorer.file, config.scorer.weights)
    if on_gpu := _on_gpu(config):
        chosen["on_gpu"] = on_gpu
    return chosen


def _on_gpu(config: PreprocessConfig) -> list[str]:
    """Return which networks work on a GPU, in half precision: their numbers differ from those of a CPU."""
    if config.score_only:
        return []
    found = {
        "depth": config.depth_num_gpus > 0 and config.depth not in WITHOUT_NETWORK,
        "captioner": config.captioner is not None and config.captioner.num_gpus > 0,
        "scorer": config.scorer is not None and config.scorer.num_gpus > 0,
        "tracker": config.masks.tracker == COTRACKER3 and gpu_share(config) > 0,
    }
    return [name for name, is_there in found.items() if is_there]


@cache
def _tracker_weights(folder: str | None) -> str:
    from ex4d import hub
    from ex4d.geometry.cotracker import checkpoint_of

    return hub.file_sha256(checkpoint_of(folder))


@cache
def _scorer(file: str, weights: str | None) -> str:
    from ex4d.quality import own

    return own.identity(file, weights)


@cache
def _depth_weights(depth: str, depth_path: str | None) -> str:
    """Return the content hash of an estimator's weights; the hash of a sidecar is among the clip's facts."""
    from ex4d import hub
    from ex4d.depth import FOREIGN, weight_folders

    if depth in FOREIGN:
        from ex4d.depth import foreign

        return foreign.identity(depth, depth_path)
    folders = weight_folders(depth, depth_path)
    return hub.fingerprint(folders) if folders else ""


@cache
def _caption_weights(model: str) -> str:
    from ex4d import hub
    from ex4d.models.captioner import folder_of

    return hub.fingerprint([folder_of(model)])


def facts(config: PreprocessConfig, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the contents of dataset.json, except for what packing adds."""
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
    """Return the settings in dataset.json: those that decide which samples there are, and what is in them."""
    names = (
        *("clips_per_shot", "clips_per_video", "min_shot_s", "crop_bars"),
        *("filters", "near_duplicates", "val_fraction", "shard_size_mb"),
    )
    everything = to_dict(config)
    scorer = {"scorer": everything["scorer"]} if config.scorer is not None else {}
    made = sample_settings(config)
    if scorer:  # thresholds and content identity; no path of this machine
        scorer["scorer"] = {**{name: scorer["scorer"][name] for name in ("min", "max")}, "identity": made["scorer"]}
    return made | {name: everything[name] for name in names} | scorer
