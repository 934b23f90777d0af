"""Create a dataset folder, a random base of the tiny classes and a configuration file in a second or two."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import yaml

from ex4d.data.sample import Sample, encode, hole_share
from ex4d.data.shards import Staged, pack
from ex4d.data.tar import sample_tar

KINDS = ["visibility", "novel_view", "tracking"]
SPEC = {"num_frames": 5, "size": [32, 32], "num_masks": 3, "mask_kinds": KINDS}


def make_sample(index: int, num_frames: int = 5, size: tuple[int, int] = (32, 32)) -> Sample:
    """Return a clip of blocks of noise."""
    rng = np.random.default_rng([5, index])
    height, width = size
    visible = rng.random((3, num_frames, height, width)) > 0.4
    visible[:, 0] = True
    source = hashlib.sha256(f"source {index}".encode()).hexdigest()
    pose = np.tile(np.eye(4), (num_frames, 1, 1))
    provenance = {"source_sha256": source, "source_group": source, "source_path": f"{index}.mp4", "licence": ""}
    provenance |= {"start_pts": 0, "end_pts": 400, "time_base": "1/1000", "start_s": 0.0, "end_s": 0.4}
    provenance |= {"scores": {}, "seeds": {}, "depth": {"estimator": "sidecar", "weights_sha256": ""}}
    return Sample(
        key=f"{source[:12]}-{index:04d}",
        frames=rng.integers(0, 256, (num_frames, height // 2, width // 2, 3), dtype=np.uint8)
        .repeat(2, axis=1)
        .repeat(2, axis=2),
        fps=8.0,
        visible=visible,
        kind=np.arange(3, dtype=np.uint8),
        hole_share=hole_share(visible),
        K=np.array([[40.0, 0, 16], [0, 40.0, 16], [0, 0, 1]]),
        w2c=[pose, pose, None],
        caption=f"clip {index}",
        provenance=provenance | {"versions": {"ex4d": "0"}, "config_fingerprint": "0" * 16},
    )


def make_dataset(
    folder: Path, train: int = 7, val: int = 2, num_frames: int = 5, size: tuple[int, int] = (32, 32), first: int = 0
) -> Path:
    """Write a dataset of `count` clips, numbered from `first`; an odd count makes epochs end inside a batch."""
    staging = folder / "staging"
    staging.mkdir(parents=True)
    staged = []
    for index in range(train + val):
        sample = make_sample(first + index, num_frames, size)
        path = staging / f"{sample.key}.tar"
        path.write_bytes(sample_tar(sample.key, encode(sample)))
        staged.append(Staged(sample.key, "train" if index < train else "val", str(path)))
    counts = {"videos_in": train + val, "videos_split": train + val, "clips_planned": train + val}
    facts = {
        "sample": SPEC | {"num_frames": num_frames, "size": list(size)},
        "counts": counts,
        "config": {"seed": 0},
        "versions": {"ex4d": "0"},
    }
    pack(staged, str(folder / "dataset"), facts, [])
    return folder / "dataset"


def make_base(folder: Path) -> Path:
    """Write an untrained base of one block."""
    import tiny

    codec = tiny.fit_codec(np.stack([make_sample(index).frames for index in range(9)]), z_dim=8, num_shared=4)
    return tiny.build_tiny(folder / "base", codec, tiny.new_transformer(8, num_layers=1))


def make_config(folder: Path, **train: object) -> Path:
    """Write OUTPUT's configuration over the dataset and base in `folder`."""
    model = {"base": str(folder / "base"), "lora_rank": 3, "adapter_hidden": 8}
    defaults = {"data": str(folder / "dataset"), "lr": 1e-3, "wandb_mode": "disabled", "device": "cpu"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": model, "train": {**defaults, **train}}))
    return path
