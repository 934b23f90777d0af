"""THE CONTRACT of a training sample: its members with types, shapes and ranges; encoding, decoding and checks.

A sample is one clip with S simulated masks. The model's condition is `frames * visible[s]`, or, in a dataset with
conditions from imperfect geometry, their colours under visibility masks (`decoding.shown`).

| member        | what |
|---|---|
| `camera.json` | `K` [3][3] px, `size` [H, W], `axes` "opencv", `w2c`: a mask's [T][4][4], null when tracking |
| `json`        | provenance: see PROVENANCE; plus `key` and `fps` |
| `masks.npz`   | `visible_packed` uint8 [S,T,H,ceil(W/8)], `kind` uint8 [S], `hole_share` float32 [S,T] |
| `mp4`         | T frames, H.264, one encoder thread |
| `txt`         | caption, UTF-8, may be empty |

Optional members, which either all samples of a dataset have or none:

| member      | what |
|---|---|
| `cond.mp4`  | T frames for each visibility mask in turn, as a warp shows them; T black frames if there is none |
| `depth.mkv` | T frames, 16-bit FFV1: disparity = value / 65535 × `disparity_max` of `json`; z_depth = 1 / disparity |
| `source.mp4` | T frames: the scene at the same times from the camera of the visibility mask's `w2c` |

A `cond.mp4` has the colours of the clip, warped with wrong depth, or, beside a `source.mp4`, the source's colours.

In the JSON members, a number is always int or always float, every key is always present, and only the `w2c` of a
tracking mask is null: readers that infer column types from the first samples depend on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ex4d import video
from ex4d.data.members import (
    decode_depth,
    decode_frames,
    decode_json,
    decode_masks,
    encode_depth,
    encode_json,
    encode_npz,
    hole_share,
    pack_bits,
    plain,
    require_members,
    unpack_bits,
)
from ex4d.errors import ContractError

MEMBERS = ("camera.json", "json", "masks.npz", "mp4", "txt")
OPTIONAL = ("cond.mp4", "depth.mkv", "source.mp4")
KEY = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")  # no dots: readers split key and extension at the first dot
TRACKING = "tracking"  # the one kind of mask that has no camera path
VISIBILITY = "visibility"  # the kind of mask whose condition a cond.mp4 holds
CRF = 12
# Required keys of `json`. More are allowed if every sample of a dataset has them. "" means that there is no value.
PROVENANCE: dict[str, type] = {
    "source_sha256": str,  # of the video file's bytes
    "source_group": str,  # sources of a group share a split; the source_sha256 of the first of its near-duplicates
    "source_path": str,  # relative to the input root, never absolute
    "licence": str,  # of the video, as the list of inputs states it
    "start_pts": int,  # of the first frame, in units of time_base
    "end_pts": int,  # of the last frame
    "time_base": str,  # "1/30000", seconds
    "start_s": float,
    "end_s": float,
    "scores": dict,  # {filter: float}, whether or not a threshold was set
    "seeds": dict,  # {what: int}
    "depth": dict,  # "estimator" and "weights_sha256" ("" for none) at least
    "versions": dict,  # {package: version}
    "config_fingerprint": str,
}


@dataclass(frozen=True)
class SampleSpec:
    """Properties that all samples of a dataset share.

    Args:
        num_frames: T.
        size: (H, W), both even (yuv420p).
        num_masks: S.
        mask_kinds: names of the values of `kind`, in order.
        optional: which of OPTIONAL every sample has.
    """

    num_frames: int
    size: tuple[int, int]
    num_masks: int
    mask_kinds: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One training sample in memory.

    Args:
        key: stable id from content hash and span, `[a-z0-9_-]`, at most 80 characters.
        frames: uint8 [T,H,W,3] RGB.
        fps: frames per second, > 0.
        visible: bool [S,T,H,W], True where the pixel is seen.
        kind: uint8 [S], index into the dataset's mask_kinds.
        hole_share: float32 [S,T], share of False in `visible`.
        K: float64 [3,3], px, pixel centres at +0.5.
        w2c: S entries, float64 [T,4,4] (OpenCV axes, world-to-camera) or None for a tracking mask.
        caption: may be empty.
        provenance: see PROVENANCE.
        cond: uint8 [V·T,H,W,3] RGB, T frames for each of V visibility masks in turn, or T black ones if V is 0; None
            if the dataset has none. The model sees only its visible pixels.
        z_depth: float32 [T,H,W], positive, finite, in the units of `w2c`; None if the dataset has none.
        source: uint8 [T,H,W,3] RGB, the scene from another camera; None if the dataset has none.
    """

    key: str
    frames: np.ndarray
    fps: float
    visible: np.ndarray
    kind: np.ndarray
    hole_share: np.ndarray
    K: np.ndarray
    w2c: list[np.ndarray | None]
    caption: str
    provenance: dict[str, Any]
    cond: np.ndarray | None = None
    z_depth: np.ndarray | None = None
    source: np.ndarray | None = None


def encode(sample: Sample) -> dict[str, bytes]:
    """Encode a sample as {member: bytes}; equal samples give equal bytes with equal package versions.

    Raises:
        ContractError: the sample's parts do not fit together; the message names key, member and problem.
    """
    _check(sample)
    camera = {
        "K": np.asarray(sample.K, dtype=np.float64).tolist(),
        "size": [int(sample.frames.shape[1]), int(sample.frames.shape[2])],
        "axes": "opencv",
        "w2c": [None if path is None else np.asarray(path, dtype=np.float64).tolist() for path in sample.w2c],
    }
    own: dict[str, Any] = {"key": sample.key, "fps": float(sample.fps)}
    optional = {}
    if sample.cond is not None:
        optional["cond.mp4"] = video.encode(sample.cond, sample.fps, crf=CRF)
    if sample.source is not None:
        optional["source.mp4"] = video.encode(sample.source, sample.fps, crf=CRF)
    if sample.z_depth is not None:
        own["disparity_max"], optional["depth.mkv"] = encode_depth(sample.z_depth, sample.fps)
    facts = plain({**sample.provenance, **own}, f"{sample.key}.json")
    masks = {
        "visible_packed": pack_bits(sample.visible),
        "kind": np.asarray(sample.kind, dtype=np.uint8),
        "hole_share": np.asarray(sample.hole_share, dtype=np.float32),
    }
    return {
        "camera.json": encode_json(camera),
        "json": encode_json(facts),
        "masks.npz": encode_npz(masks),
        "mp4": video.encode(sample.frames, sample.fps, crf=CRF),
        "txt": sample.caption.encode("utf-8"),
        **optional,
    }


def decode(members: Mapping[str, bytes], spec: SampleSpec | None = None) -> Sample:
    """Decode {member: bytes} to a Sample.

    Args:
        spec: limits decoding to the dataset's number of frames and masks.

    Raises:
        ContractError: a member is missing, does not parse, or does not fit the others; the message names it.
    """
    require_members(members, MEMBERS, OPTIONAL)
    facts = decode_json(members["json"], "json")
    camera = decode_json(members["camera.json"], "camera.json")
    frames = decode_frames(members["mp4"], limit=(spec.num_frames, *spec.size) if spec else None)
    size = camera.get("size")
    if set(camera) != {"K", "size", "axes", "w2c"} or camera["axes"] != "opencv" or not isinstance(camera["w2c"], list):
        raise ContractError("camera.json: needs K, size, axes 'opencv' and w2c, and nothing else")
    if size != [*frames.shape[1:3]]:
        raise ContractError(f"camera.json: size {size} is not the clip's {[*frames.shape[1:3]]}")
    packed, kind, share = decode_masks(members["masks.npz"], frames.shape[:3], spec.num_masks if spec else None)
    try:
        caption = members["txt"].decode("utf-8")
        intrinsics = np.array(camera["K"], dtype=np.float64)
        paths = [None if path is None else np.array(path, dtype=np.float64) for path in camera["w2c"]]
    except UnicodeDecodeError as error:
        raise ContractError(f"txt: is not UTF-8 ({error})") from error
    except (ValueError, TypeError) as error:
        raise ContractError(f"camera.json: K or w2c is not a matrix of numbers ({error})") from error
    key, fps = facts.pop("key", None), facts.pop("fps", None)
    if not isinstance(key, str) or not isinstance(fps, float):
        raise ContractError("json: needs key (text) and fps (float)")
    visible = unpack_bits(packed, frames.shape[2])
    limit = frames.shape[:3]
    cond_limit = (max(1, len(kind)) * limit[0], *limit[1:])
    cond = decode_frames(members["cond.mp4"], "cond.mp4", limit=cond_limit) if "cond.mp4" in members else None
    depth = members.get("depth.mkv")
    z_depth = None if depth is None else decode_depth(depth, facts.pop("disparity_max", None), limit)
    source = decode_frames(members["source.mp4"], "source.mp4", limit=limit) if "source.mp4" in members else None
    sample = Sample(key, frames, fps, visible, kind, share, intrinsics, paths, caption, facts, cond, z_depth, source)
    _check(sample)
    return sample


def validate(members: Mapping[str, bytes], spec: SampleSpec, key: str | None = None) -> Sample:
    """Return the decoded sample, after checking that it matches its dataset.

    Args:
        spec: the properties that all samples share.
        key: the key under which the sample was stored, compared with the one inside.

    Raises:
        ContractError: a member does not match; the message names it and the problem.
    """
    require_members(members, (*MEMBERS, *spec.optional))
    sample = decode(members, spec)
    if key is not None and sample.key != key:
        raise ContractError(f"json: key {sample.key!r} inside, stored as {key!r}")
    shape = (spec.num_frames, *spec.size)
    if sample.frames.shape[:3] != shape:
        raise ContractError(f"mp4: [T,H,W] = {[*sample.frames.shape[:3]]}, the dataset has {[*shape]}")
    if len(sample.kind) != spec.num_masks or sample.kind.max(initial=0) >= len(spec.mask_kinds):
        raise ContractError(
            f"masks.npz: kind {sample.kind.tolist()}; wanted {spec.num_masks} values below {len(spec.mask_kinds)}"
        )
    for index, path in zip(sample.kind, sample.w2c, strict=True):
        if (path is None) != (spec.mask_kinds[index] == TRACKING):
            raise ContractError(f"camera.json: w2c must be null exactly for {TRACKING} masks")
    if sample.cond is not None:
        count = max(1, sum(spec.mask_kinds[index] == VISIBILITY for index in sample.kind))
        if len(sample.cond) != count * spec.num_frames:
            raise ContractError(f"cond.mp4: {len(sample.cond)} frames, wanted {count} × {spec.num_frames}")
    return sample


def _check(sample: Sample) -> None:
    """Raise ContractError unless the parts of a sample fit together."""

    def need(holds: bool, member: str, message: str) -> None:
        if not holds:
            raise ContractError(f"{member}: {message} (sample {sample.key})")

    frames, visible = sample.frames, sample.visible
    need(KEY.fullmatch(sample.key) is not None, "json", f"key must match {KEY.pattern}")
    need(frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3:] == (3,), "mp4", "needs uint8 [T,H,W,3]")
    need(
        min(frames.shape) > 0 and frames.shape[1] % 2 == frames.shape[2] % 2 == 0, "mp4", "needs an even, non-zero size"
    )
    need(math.isfinite(sample.fps) and sample.fps > 0, "json", f"fps {sample.fps}")
    need(visible.dtype == bool and visible.ndim == 4, "masks.npz", "visible must be bool [S,T,H,W]")
    need(visible.shape[1:] == frames.shape[:3], "masks.npz", f"visible {visible.shape} for frames {frames.shape}")
    need(np.shape(sample.kind) == visible.shape[:1], "masks.npz", f"kind has shape {np.shape(sample.kind)}")
    need(np.shape(sample.hole_share) == visible.shape[:2], "masks.npz", f"hole_share {np.shape(sample.hole_share)}")
    error = np.abs(np.asarray(sample.hole_share) - hole_share(visible)).max(initial=0.0)
    need(bool(error < 1e-5), "masks.npz", f"hole_share differs from the mask by {error:.2g}")
    cond, z_depth = sample.cond, sample.z_depth
    if cond is not None:
        fits = cond.dtype == np.uint8 and cond.shape[1:] == frames.shape[1:] and len(cond) % len(frames) == 0
        need(fits and len(cond) > 0, "cond.mp4", f"{cond.dtype} {cond.shape} for frames {frames.shape}")
    if sample.source is not None:
        fits = sample.source.dtype == np.uint8 and sample.source.shape == frames.shape
        need(fits, "source.mp4", f"{sample.source.dtype} {sample.source.shape} for frames {frames.shape}")
    if z_depth is not None:
        need(z_depth.shape == frames.shape[:3], "depth.mkv", f"{z_depth.shape} for frames {frames.shape}")
        need(bool(np.isfinite(z_depth).all() and (z_depth > 0).all()), "depth.mkv", "must be finite and positive")
    K = np.asarray(sample.K)
    need(K.shape == (3, 3) and bool(np.isfinite(K).all()), "camera.json", "K must be 3 x 3 and finite")
    need(K[0, 0] > 0 and K[1, 1] > 0 and K[2].tolist() == [0, 0, 1], "camera.json", f"K {K.tolist()}")
    need(len(sample.w2c) == len(visible), "camera.json", f"{len(sample.w2c)} paths for {len(visible)} masks")
    for path in sample.w2c:
        need(path is None or _is_rigid(np.asarray(path), len(frames)), "camera.json", "w2c must be rigid [T,4,4]")
    for name, kind in PROVENANCE.items():
        value = sample.provenance.get(name)
        need(isinstance(value, kind), "json", f"{name} must be {kind.__name__}, is {value!r}")
    need(
        {"estimator", "weights_sha256"} <= set(sample.provenance["depth"]),
        "json",
        "depth needs estimator, weights_sha256",
    )


def _is_rigid(w2c: np.ndarray, num_frames: int) -> bool:
    if w2c.shape != (num_frames, 4, 4) or not np.isfinite(w2c).all():
        return False
    rotation = w2c[:, :3, :3]
    orthogonal = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max() < 1e-4
    return bool(orthogonal and (np.linalg.det(rotation) > 0).all() and (w2c[:, 3] == [0, 0, 0, 1]).all())
