"""Write a base of random weights in diffusers' layout and a dataset of random latents, to time a real training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ex4d.data import latents, tensors, texts
from ex4d.data.members import encode_json
from ex4d.data.shards import Staged, pack, sample_tar
from ex4d.models import backbone
from ex4d.models.encoders import TEXT_LENGTH

SHARD_BYTES = 2 * 10**9
KIND = "novel_view"
WEIGHTS = "diffusion_pytorch_model"


def write_base(folder: Path, shape: Mapping[str, Any], device: torch.device) -> int:
    """Write FOLDER/transformer with random bfloat16 weights, drawn on the device; return their size in bytes."""
    from safetensors.torch import save_file

    target = folder / "transformer"
    target.mkdir(parents=True)
    names, number, total = {}, 0, 0
    for number, shard in enumerate(_shards(shape, device), start=1):
        save_file(shard, target / f"{number:05d}.safetensors", metadata={"format": "pt"})
        names |= dict.fromkeys(shard, number)
        total += sum(value.nbytes for value in shard.values())
    file_of = {n: f"{WEIGHTS}-{n:05d}-of-{number:05d}.safetensors" for n in range(1, number + 1)}
    for n, file in file_of.items():
        (target / f"{n:05d}.safetensors").rename(target / file)
    index = {"metadata": {"total_size": total}, "weight_map": {name: file_of[n] for name, n in names.items()}}
    (target / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (target / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **shape}), encoding="utf-8")
    return total


def _shards(shape: Mapping[str, Any], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield {name: bfloat16 tensor on the CPU} of the transformer, about SHARD_BYTES at a time."""
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, Tensor] = {}
    for name, like in backbone.meta_transformer(shape).state_dict().items():
        values = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
        if like.ndim > 1:
            values.normal_(0.0, 0.02, generator=generator)
        else:
            values.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        shard[name] = values.cpu()
        if sum(value.nbytes for value in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_dataset(folder: Path, shape: Mapping[str, Any], size: tuple[int, int, int], num_samples: int = 8) -> None:
    """Write a finished latent dataset of random numbers for a base of this shape, as `ex4d encode` would.

    Args:
        size: (f, h, w) of the latents.
    """
    staging = folder.with_name(f"{folder.name}-staging")
    staging.mkdir(parents=True)
    staged = []
    for number in range(num_samples):
        key = f"random-{number:04d}"
        path = staging / f"{key}.tar"
        path.write_bytes(sample_tar(key, _members(key, shape, size, number)))
        staged.append(Staged(key, "train", str(path)))
    text = staging / "text.safetensors"
    embeds = np.random.default_rng(1).standard_normal((8, shape["text_dim"]), np.float32)
    text.write_bytes(
        tensors.encode_tensors(tensors.store_as("bfloat16", {"embeds": embeds, "text": np.zeros(0, np.uint8)}))
    )
    counts = {"videos_in": num_samples, "videos_split": num_samples, "clips_planned": num_samples}
    pixels = (4 * (size[0] - 1) + 1, [8 * size[1], 8 * size[2]])
    spec = latents.spec_of(_members("random-0000", shape, size, 0))
    facts = {
        "sample": {"num_frames": pixels[0], "size": pixels[1], "num_masks": 1, "mask_kinds": [KIND]},
        "latents": spec
        | {"mask_range": "unit", "base": "random", "revision": "", "models": {}, "captions": False, "computed": {}}
        | {"text_dim": shape["text_dim"], "text_length": TEXT_LENGTH},
        "counts": counts,
        "config": {"seed": 0},
        "versions": {},
    }
    write_more = partial(texts.write, staged={texts.text_key(""): str(text)}, file_size_bytes=2**30)
    pack(staged, str(folder), facts, [], write_more=write_more)


def _members(key: str, shape: Mapping[str, Any], size: tuple[int, int, int], seed: int) -> dict[str, bytes]:
    rng = np.random.default_rng([2, seed])
    z = shape["out_channels"]

    def draw(*of: int) -> np.ndarray:
        return rng.standard_normal(of, np.float32)

    made = {"target": draw(z, *size), "condition": draw(1, 2 * z, *size), "hole": np.abs(draw(1, 1, *size)).clip(0, 1)}
    made |= {"kind": np.zeros(1, np.uint8), "first_index": np.zeros(1, np.uint8)}
    if shape["in_channels"] > z:
        made["first_frame"] = draw(1, z, *size)
    if shape["image_dim"]:
        made["image"] = draw(1, 257, shape["image_dim"])
    digest = hashlib.sha256(key.encode()).hexdigest()
    facts = {
        **{"key": key, "fps": 16.0, "source_sha256": digest, "source_group": digest, "source_path": f"{key}.mp4"},
        **{"licence": "", "start_pts": 0, "end_pts": 48, "time_base": "1/16", "start_s": 0.0, "end_s": 3.0},
        **{"scores": {}, "seeds": {}, "depth": {"estimator": "none", "weights_sha256": ""}, "versions": {}},
        "config_fingerprint": "0" * 16,
    }
    own = {"camera.json": b"{}", "txt": b"", "json": encode_json(facts)}
    return latents.encode(made, own, "0" * 16, "bfloat16")
