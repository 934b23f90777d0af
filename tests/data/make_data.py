"""Create small samples and datasets without using any other part of the project."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from ex4d.data.sample import Sample, encode, hole_share
from ex4d.data.shards import Staged
from ex4d.data.tar import sample_tar

KINDS = ("visibility", "novel_view", "tracking")
SPEC = {"num_frames": 5, "size": [32, 36], "num_masks": 3, "mask_kinds": list(KINDS)}  # 36: masks end inside a byte


def make_sample(index: int, spec: dict = SPEC, seed: int = 0) -> Sample:
    """A clip of drifting noise with the three kinds of masks."""
    rng = np.random.default_rng([seed, index])
    (height, width), frames, masks = spec["size"], spec["num_frames"], spec["num_masks"]
    coarse = rng.integers(0, 256, (frames, height // 4, width // 4, 3), dtype=np.uint8)
    visible = rng.random((masks, frames, height, width)) > rng.uniform(0.1, 0.9)
    visible[:, 0] = True
    kind = (np.arange(masks) % len(KINDS)).astype(np.uint8)
    source = hashlib.sha256(f"source {index // 2}".encode()).hexdigest()
    return Sample(
        key=f"{source[:12]}-{index:04d}",
        frames=coarse.repeat(4, axis=1).repeat(4, axis=2),
        fps=8.0,
        visible=visible,
        kind=kind,
        hole_share=hole_share(visible),
        K=np.array([[40.0, 0, width / 2], [0, 40.0, height / 2], [0, 0, 1]]),
        w2c=[None if KINDS[k] == "tracking" else np.tile(np.eye(4), (frames, 1, 1)) for k in kind],
        caption=f"drifting noise, number {index}" if index % 3 else "",
        provenance={
            "source_sha256": source,
            "source_group": source,
            "source_path": f"videos/{index // 2}.mp4",
            "licence": "",
            "start_pts": 1000 * index,
            "end_pts": 1000 * index + 900,
            "time_base": "1/12800",
            "start_s": 0.5 * index,
            "end_s": 0.5 * index + 0.4,
            "scores": {"motion": float(index), "sharpness": 1.0},
            "seeds": {"masks": index},
            "depth": {"estimator": "sidecar", "weights_sha256": ""},
            "versions": {"ex4d": "0.1.0"},
            "config_fingerprint": "0" * 16,
        },
    )


def stage(folder: Path, count: int, spec: dict = SPEC) -> list[Staged]:
    """Staged samples on disk; every source has two clips and stays in one split."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = []
    for index in range(count):
        sample = make_sample(index, spec)
        path = folder / f"{sample.key}.tar"
        path.write_bytes(sample_tar(sample.key, encode(sample)))
        staged.append(Staged(sample.key, "val" if index // 2 % 4 == 3 else "train", str(path)))
    return staged


REJECTS = [
    dict(key="v-broken", unit="video", fate="bad", stage="probe", reason="no_video", message="no video stream"),
    dict(key="c-still", unit="clip", fate="filtered", stage="filter", reason="motion", message="score 0, threshold 1"),
    dict(key="c-static", unit="clip", fate="bad", stage="depth", reason="no_parallax", message="static camera"),
]


def facts(count: int, spec: dict = SPEC) -> dict:
    videos = -(-count // 2)
    counts = {"videos_in": videos + 1, "videos_split": videos, "clips_planned": count + 2}
    return {"sample": spec, "counts": counts, "config": {"seed": 0}, "versions": {"ex4d": "0.1.0"}}
