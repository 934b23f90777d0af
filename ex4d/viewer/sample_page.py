"""Build a page of a dataset's samples: the clip, the other camera's video if any, and the clip under each mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ex4d import storage, video
from ex4d.data import decoding, foreign, manifest, sample
from ex4d.data.tar import read_sample
from ex4d.errors import ConfigError, ContractError
from ex4d.redact import redacted
from ex4d.viewer import page

HATCH = (255, 0, 160)  # rare in pictures


def samples_page(dataset: str, keys: Sequence[str] = (), count: int = 8, trust: str = "auto") -> page.Page:
    """Return a page of samples of a dataset of clips, with embedded videos.

    Args:
        dataset: folder or URL of a finished dataset.
        trust: "auto", "own" or "foreign"; foreign samples are decoded in a sandbox (`ex4d.data.foreign`).
        keys: which samples; (): `count` of them, evenly spread over the manifest.

    Raises:
        ConfigError: the dataset holds latents, or does not have a key.
        ContractError: the dataset is not finished, or a sample is damaged.
    """
    facts = manifest.read_dataset(dataset)
    if "latents" in facts:
        raise ConfigError("THING", dataset, "must be a dataset of clips; this one holds latents, which cannot be shown")
    foreign.spec_of(facts)
    table = manifest.read_manifest(dataset, facts["sha256"].get(manifest.MANIFEST, ""))
    places = [pa.compute.index(table["key"], key).as_py() for key in keys]
    if -1 in places:
        raise ConfigError("key", keys[places.index(-1)], f"a key of {dataset}'s manifest.parquet")
    spread = np.linspace(0, len(table) - 1, min(count, len(table))).astype(int)
    chosen = table.take(places or spread.tolist()).to_pylist()
    counts = facts["counts"]
    return page.Page(
        title=f"Samples of {redacted(dataset).rstrip('/').rpartition('/')[2]}",
        summary=(
            f"{len(chosen)} of {counts['samples']} samples. Left: the clip, which the model learns to reconstruct. "
            "Beside it: the clip under each mask, with its share of holes (hatched here, black in training).",
        ),
        rows=[_row(dataset, fields, facts, foreign.is_foreign(dataset, trust)) for fields in chosen],
        facts={name: str(value) for name, value in {**facts["sample"], **counts}.items()},
    )


def hatched(frames: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return uint8 [T, H, W, 3] with holes drawn black and hatched, to tell them from dark surfaces.

    Args:
        frames: uint8 [T, H, W, 3]. visible: bool [T, H, W].
    """
    height, width = visible.shape[1:]
    line = (np.arange(height)[:, None] + np.arange(width)) % max(12, min(height, width) // 16) < max(1, width // 256)
    return np.where(visible[..., None], frames, (line[..., None] * np.array(HATCH)).astype(np.uint8))


def _row(dataset: str, fields: dict, facts: Mapping[str, Any], is_foreign: bool) -> page.Row:
    kinds = facts["sample"]["mask_kinds"]
    data = storage.read_bytes(storage.join(dataset, fields["shard"]), fields["offset"], fields["length"])
    members = read_sample(data, fields["key"])
    clip = foreign.sample_of(facts, members, is_foreign)
    if clip.kind.max(initial=0) >= len(kinds):
        raise ContractError(f"sample {fields['key']}: kind {clip.kind.tolist()} where there are {len(kinds)} kinds")
    is_visibility = np.array([kinds[kind] == sample.VISIBILITY for kind in clip.kind])
    clips = [page.Clip("the clip", page.embedded(members["mp4"]))]
    if "source.mp4" in members:
        clips.append(page.Clip("the other camera", page.embedded(members["source.mp4"])))
    for index, visible in enumerate(clip.visible):
        colours = hatched(decoding.shown(clip.frames, clip.cond, is_visibility, index), visible)
        label = f"{kinds[clip.kind[index]]}, {clip.hole_share[index].mean():.0%} holes"
        clips.append(page.Clip(label, page.embedded(video.encode(colours, clip.fps))))
    texts = [fields["key"], clip.provenance["source_path"], fields["split"], clip.caption.strip()]
    return page.Row(" · ".join(part for part in texts if part), clips)
