"""Decode samples of foreign datasets in a sandboxed child, and samples of own ones in this process, which is faster.

`trust` is "own", "foreign", or "auto": local folders of this user and buckets (`s3://`, `gs://`) are own; datasets from
the web or a hub, or owned by another user, are foreign.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d import isolation, storage
from ex4d.data import decoding, latents, sample
from ex4d.data.members import MAX_MASKS
from ex4d.errors import ConfigError, ContractError

if TYPE_CHECKING:
    from ex4d.data.sample import Sample, SampleSpec

TRUST = ("auto", "own", "foreign")
LIMITS = isolation.Limits(wall_s=120, cpu_s=120, memory_bytes=6 * 2**30)  # of one sample
FUNCTIONS = {
    "check": "ex4d.data.foreign:check",
    "decode_sample": "ex4d.data.sample:decode",
    "decode_one": "ex4d.data.decoding:decode_one",
}


def is_foreign(dataset: str, trust: str = "auto") -> bool:
    """Return whether a dataset's samples must be decoded in a sandbox. Raises ConfigError if trust is not in TRUST."""

    if trust not in TRUST:
        raise ConfigError("trust", trust, ", ".join(TRUST))
    if trust != "auto":
        return trust == "foreign"
    if not storage.is_local(dataset):
        return not dataset.startswith(("s3://", "gs://", "gcs://", "memory://"))
    path = storage.local_path(dataset)
    there = [place for place in (path, path / "shards") if place.exists()]  # either may be a link to another folder
    return any(place.stat().st_uid != os.getuid() for place in there)


def check(facts: Mapping[str, Any], members: Mapping[str, bytes], key: str) -> None:
    """Raise ContractError unless a sample matches its dataset.json (`facts`)."""
    contract_of(facts)(members, key)


def contract_of(dataset: Mapping[str, Any]) -> Callable[[Mapping[str, bytes], str], object]:
    """Return the check of a sample, ({member: bytes}, key), chosen by dataset.json: pixels or latents."""
    spec = spec_of(dataset)
    if "latents" in dataset:
        encoded = latents.LatentSpec.of(dataset)
        return lambda members, key: latents.validate(members, encoded, len(spec.mask_kinds), key)
    return lambda members, key: sample.validate(members, spec, key)


def spec_of(dataset: Mapping[str, Any]) -> SampleSpec:
    """Return the properties that all samples share, from dataset.json. Raises ContractError if it lacks them."""
    try:
        facts = dataset["sample"]
        optional = tuple(name for name in sample.OPTIONAL if name in dataset.get("members", ()))
        size, kinds = tuple(facts["size"]), tuple(facts["mask_kinds"])
        return sample.SampleSpec(facts["num_frames"], size, facts["num_masks"], kinds, optional)
    except (KeyError, TypeError) as error:
        raise ContractError(f"dataset.json: sample is not a SampleSpec ({error!r})") from error


def checker(dataset: Mapping[str, Any], foreign: bool) -> Callable[[Mapping[str, bytes], str], object]:
    """Return `contract_of`, executed in the child if the dataset is foreign."""
    own = contract_of(dataset)
    if not foreign:
        return own
    facts = _facts(dataset)
    return lambda members, key: isolation.run("check", (facts, dict(members), key), LIMITS, table=__name__)


def sample_of(dataset: Mapping[str, Any], members: Mapping[str, bytes], foreign: bool) -> Sample:
    """Decode a sample of a dataset of clips. Raises ContractError, or BadSample if the child died."""
    spec = spec_of(dataset)
    if not foreign:
        return sample.decode(members, spec)
    return isolation.run("decode_sample", (dict(members), spec), LIMITS, table=__name__)


def decoder_of(path: str, dataset: Mapping[str, Any], trust: str, with_source: bool) -> Callable[..., dict[str, Any]]:
    """Return the loader's decoder: `decoding.decoder_of` the dataset, executed in the child if it is foreign."""
    if not is_foreign(path, trust):
        return decoding.decoder_of(dataset, with_source)
    facts = _facts(dataset)

    def decode(members: Mapping[str, bytes], draw: Callable[[int], int], into: np.ndarray | None = None) -> dict:
        index = draw(facts["sample"].get("num_masks", MAX_MASKS))
        arguments = (facts, dict(members), index, with_source)
        values = isolation.run("decode_one", arguments, LIMITS, table=__name__)
        if into is not None:
            if values["frames"].shape != into.shape or values["frames"].dtype != into.dtype:
                raise ContractError(f"mp4: {[*values['frames'].shape]} where {[*into.shape]} is expected")
            into[:] = values["frames"]
            values["frames"] = into
        return values

    return decode


def _facts(dataset: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataset[name] for name in ("sample", "members", "latents") if name in dataset}
