"""Decode one sample for training, with one of its masks, from a dataset of pixels or of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ex4d.data.latents import LatentSpec, decode_latents
from ex4d.data.members import caption_of, decode_frames, decode_masks, require_members, unpack_bits
from ex4d.data.sample import MEMBERS, OPTIONAL, VISIBILITY
from ex4d.errors import ContractError

Draw = Callable[[int], int]  # number of masks -> the one to take
Decode = Callable[..., dict[str, Any]]  # ({member: bytes}, draw) -> values of one sample


def decode_pixels(
    members: Mapping[str, bytes],
    draw: Draw,
    mask_kinds: Sequence[str] = (VISIBILITY,),
    with_source: bool = False,
    into: np.ndarray | None = None,
) -> dict[str, Any]:
    """Decode one sample of a pixel dataset, with one of its masks.

    Returns: `frames` uint8 [T,H,W,3] RGB; `visible` bool [T,H,W], True where seen; `kind` uint8 []; `mask_index`
    int64 []; `captions` str; if the sample has a cond.mp4, `shown` uint8 [T,H,W,3]: the colours that the mask uncovers
    in place of `frames`; with `with_source`, `source` uint8 [T,H,W,3].

    Args:
        draw: number of masks -> index of the one to use.
        mask_kinds: names of the values of `kind`.
        with_source: also return the scene from the other camera.
        into: [T,H,W,3], where to decode the frames: their place in a batch, which saves a copy.

    Raises:
        ContractError: a member is missing, damaged, or does not fit the others.
    """
    require_members(members, (*MEMBERS, "source.mp4") if with_source else MEMBERS, optional=OPTIONAL)
    frames = decode_frames(members["mp4"], into=into)
    packed, kind, _ = decode_masks(members["masks.npz"], frames.shape[:3])
    if packed.shape[1:3] != frames.shape[:2] or not len(kind):
        raise ContractError(f"masks.npz: [S,T,H] = {[*packed.shape[:3]]} for frames {[*frames.shape]}")
    index = draw(len(kind))
    colours = {}
    if "cond.mp4" in members:
        limit = (max(1, len(kind)) * len(frames), *frames.shape[1:3])
        cond = decode_frames(members["cond.mp4"], "cond.mp4", limit=limit)
        is_visibility = np.isin(kind, [place for place, name in enumerate(mask_kinds) if name == VISIBILITY])
        if cond.shape != (max(1, int(is_visibility.sum())) * len(frames), *frames.shape[1:]):
            raise ContractError(f"cond.mp4: {[*cond.shape]} for frames {[*frames.shape]}, kind {kind.tolist()}")
        colours["shown"] = shown(frames, cond, is_visibility, index)
    if with_source:
        colours["source"] = decode_frames(members["source.mp4"], "source.mp4", limit=frames.shape[:3])
        if colours["source"].shape != frames.shape:
            raise ContractError(f"source.mp4: {[*colours['source'].shape]} for frames {[*frames.shape]}")
    return colours | {
        "frames": frames,
        "visible": unpack_bits(packed[index], frames.shape[2]),
        "kind": kind[index],
        "mask_index": np.int64(index),
        "captions": caption_of(members),
    }


def decoder_of(dataset: Mapping[str, Any], with_source: bool = False) -> Decode:
    """Return the decoder for a dataset's samples, chosen by the contents of its dataset.json: latents or pixels.

    Args:
        with_source: also decode the scene from the other camera; needs clips from two cameras (`has_source`).
    """
    if "latents" in dataset:
        return partial(decode_latents, with_source=with_source)
    kinds = tuple(dataset["sample"].get("mask_kinds", ()))
    return partial(decode_pixels, mask_kinds=kinds, with_source=with_source)


def decode_one(facts: Mapping[str, Any], members: Mapping[str, bytes], index: int, with_source: bool) -> dict[str, Any]:
    """Decode one sample with its mask `index`; the entry point of the child of `ex4d.data.foreign`."""

    def draw(count: int) -> int:
        if index >= count:
            raise ContractError(f"has {count} masks, {facts['sample'].get('num_masks')} are expected")
        return index

    if "latents" not in facts:
        frames = np.empty((facts["sample"]["num_frames"], *facts["sample"]["size"], 3), np.uint8)
        return decoder_of(facts, with_source)(members, draw, into=frames)
    return decoder_of(facts, with_source)(members, draw)


def has_source(dataset: Mapping[str, Any]) -> bool:
    """Return whether a dataset holds clips from two cameras, by the contents of its dataset.json."""
    if "latents" in dataset:
        return LatentSpec.of(dataset).source
    return "source.mp4" in dataset.get("members", ())


def shown(frames: np.ndarray, cond: np.ndarray | None, is_visibility: np.ndarray, index: int) -> np.ndarray:
    """Return uint8 [T,H,W,3], the colours under mask `index`: those of `cond` for a visibility mask, else of `frames`.

    Args:
        cond: see Sample.
        is_visibility: bool [S].
    """
    if cond is None or not is_visibility[index]:
        return frames
    first = int(np.count_nonzero(is_visibility[:index])) * len(frames)
    return cond[first : first + len(frames)]
