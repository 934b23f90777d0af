"""THE CONTRACT of a latent sample: a clip and its masks, encoded once by the frozen base.

| member | what |
|---|---|
| `camera.json`, `txt` | as in the pixel sample |
| `json` | as there, plus `latents_fingerprint`, of everything that the tensors depend on |
| `latents.safetensors` | see below |

| tensor | what |
|---|---|
| `target` [z,f,h,w] | normalised latents of the clip |
| `condition` [S,2z,f,h,w] | for each mask: latents of the masked colours, then of the mask as a video |
| `hole` float32 [S,1,f,h,w] | masked share of each latent cell, in [0, 1] |
| `kind` uint8 [S] | index into the dataset's mask_kinds |
| `first_index` uint8 [S] | which of the U distinct masked first frames belongs to a mask |
| `first_frame` [U,z,f,h,w] | latents of (masked first frame, then grey); only if the base takes them |
| `source` [z,f,h,w] | latents of the scene from the other camera; only in a dataset of clips from two cameras |
| `image` [U,n,d] | the image encoder's features of the masked first frame; only if the base takes them |

Tensors without a type above are all float32 or all bfloat16 in a dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ex4d.data.members import caption_of, decode_json, encode_json, require_members
from ex4d.data.tensors import STORED, decode_tensors, encode_tensors, store_as, to_float32
from ex4d.errors import ContractError

MEMBER = "latents.safetensors"
MEMBERS = ("camera.json", "json", MEMBER, "txt")
EXACT = ("hole",)  # float32 whatever the dataset stores


@dataclass(frozen=True)
class LatentSpec:
    """Properties that all samples of a latent dataset share; part of the mapping `latents` of dataset.json.

    Args:
        dtype: of the stored tensors, one of tensors.STORED.
        shape: [z, f, h, w] of a latent.
        image: [n, d] of the image encoder's features; () if the base has none.
        first_frame: whether there are first-frame latents.
        num_masks: S.
        source: whether there are latents of the scene from the other camera.
    """

    dtype: str
    shape: tuple[int, int, int, int]
    image: tuple[int, ...]
    first_frame: bool
    num_masks: int
    source: bool = False

    @classmethod
    def of(cls, dataset: Mapping[str, Any]) -> LatentSpec:
        """Return the spec in the contents of a dataset.json. Raises ContractError if there is no valid one."""
        try:
            facts = dataset["latents"]
            spec = cls(
                facts["dtype"],
                tuple(facts["shape"]),
                tuple(facts["image"]),
                facts["first_frame"],
                dataset["sample"]["num_masks"],
                facts.get("source", False),
            )
            if spec.dtype not in STORED or len(spec.shape) != 4 or len(spec.image) not in (0, 2):
                raise ValueError(f"{spec}")
        except (KeyError, TypeError, ValueError) as error:
            raise ContractError(f"dataset.json: latents is not a LatentSpec ({error!r})") from error
        return spec

    def tensors(self, num_first: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return {tensor: (stored type, shape)} of a sample with `num_first` distinct first frames."""
        stored = "uint16" if self.dtype == "bfloat16" else "float32"
        channels, *grid = self.shape
        wanted = {
            "target": (stored, self.shape),
            "condition": (stored, (self.num_masks, 2 * channels, *grid)),
            "hole": ("float32", (self.num_masks, 1, *grid)),
            "kind": ("uint8", (self.num_masks,)),
            "first_index": ("uint8", (self.num_masks,)),
        }
        if self.first_frame:
            wanted["first_frame"] = (stored, (num_first, *self.shape))
        if self.source:
            wanted["source"] = (stored, self.shape)
        if self.image:
            wanted["image"] = (stored, (num_first, *self.image))
        return wanted


def encode(tensors: Mapping[str, np.ndarray], pixel_members: Mapping[str, bytes], fingerprint: str, dtype: str) -> dict:
    """Encode a latent sample as {member: bytes}.

    Args:
        tensors: those of the table above, still in float32 where no type is given.
        pixel_members: members of the pixel sample that was encoded.
        fingerprint: becomes `latents_fingerprint`.
        dtype: one of tensors.STORED.
    """
    facts = decode_json(pixel_members["json"], "json") | {"latents_fingerprint": fingerprint}
    copies = {name: pixel_members[name] for name in ("camera.json", "txt")}
    return {**copies, "json": encode_json(facts), MEMBER: encode_tensors(store_as(dtype, tensors, EXACT))}


def decode_latents(
    members: Mapping[str, bytes], draw: Callable[[int], int], with_source: bool = False
) -> dict[str, Any]:
    """Decode one sample of a latent dataset, with one of its masks; float32 where no other type is given.

    Returns: `latents` [z,f,h,w]; `cond_latents` [2z,f,h,w]; `hole` [1,f,h,w]; `first_frame` [z,f,h,w] and `image`
    [n,d] if the dataset has them; `kind` uint8 []; `mask_index` int64 []; `captions` str; with `with_source`, `source`
    [z,f,h,w].

    Raises:
        ContractError: a member is missing, damaged, or does not fit the others.
    """
    require_members(members, MEMBERS)
    tensors = decode_tensors(members[MEMBER], MEMBER)
    try:
        index = draw(len(tensors["kind"]))
        first = int(tensors["first_index"][index])
        values = {
            "latents": to_float32(tensors["target"]),
            "cond_latents": to_float32(tensors["condition"][index]),
            "hole": tensors["hole"][index],
            "kind": tensors["kind"][index],
            "mask_index": np.int64(index),
            "captions": caption_of(members),
        }
        if with_source:
            values["source"] = to_float32(tensors["source"])
        return values | {name: to_float32(tensors[name][first]) for name in ("first_frame", "image") if name in tensors}
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ContractError(f"{MEMBER}: tensors {sorted(tensors)} do not fit each other ({error!r})") from error


def spec_of(members: Mapping[str, bytes]) -> dict[str, Any]:
    """Return `dtype`, `shape`, `image`, `first_frame` and, if true, `source` of a LatentSpec, from one sample."""
    tensors = decode_tensors(members[MEMBER], MEMBER)
    return {
        "dtype": "bfloat16" if tensors["target"].dtype == np.uint16 else "float32",
        "shape": [*tensors["target"].shape],
        "image": [*tensors["image"].shape[1:]] if "image" in tensors else [],
        "first_frame": "first_frame" in tensors,
        **({"source": True} if "source" in tensors else {}),
    }


def validate(members: Mapping[str, bytes], spec: LatentSpec, num_kinds: int, key: str) -> dict[str, np.ndarray]:
    """Return the tensors of a sample, after checking that it matches its dataset.

    Args:
        num_kinds: number of the dataset's mask_kinds.
        key: the key under which the sample was stored, compared with the one inside.

    Raises:
        ContractError: a member does not match; the message names it and the problem.
    """
    require_members(members, MEMBERS)
    facts = decode_json(members["json"], "json")
    if facts.get("key") != key or not isinstance(facts.get("latents_fingerprint"), str):
        raise ContractError(f"json: key {facts.get('key')!r} inside, stored as {key!r}, or no latents_fingerprint")
    tensors = decode_tensors(members[MEMBER], MEMBER)
    num_first = int(tensors["first_index"].max(initial=0)) + 1 if "first_index" in tensors else 0
    layout = {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
    if layout != spec.tensors(num_first):
        raise ContractError(f"{MEMBER}: tensors {layout}, wanted {spec.tensors(num_first)}")
    if tensors["kind"].max(initial=0) >= num_kinds:
        raise ContractError(f"{MEMBER}: kind {tensors['kind'].tolist()}; wanted values below {num_kinds}")
    for name, array in tensors.items():
        if not np.isfinite(to_float32(array)).all():
            raise ContractError(f"{MEMBER}: {name} is not finite")
    return tensors
