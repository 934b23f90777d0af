"""Depth from a file beside the video: what another program estimated, or the truth of a synthetic scene.

`clip.mp4` looks for `clip.depth.npz`, `clip.npz`, `clip.depth.npy`, `clip.npy`. Values are [N, H, W], one map for
each frame of the whole source; the key of the npz says what they are:

| key | kind | who writes it |
|---|---|---|
| `z_depth` | z-depth | `ex4d` |
| `disparity` | disparity, larger is nearer | `ex4d` |
| `depth` | disparity in [0, 1], 1 is near | DepthCrafter |
| `depths` | metric z-depth | Video Depth Anything with `--metric` |

A string `kind` ("z_depth" or "disparity") in the npz decides over the key: Video Depth Anything's relative models write
disparity as `depths` too, so add it there; `K` float [3, 3] in px of the stored maps is
taken where it is there; an npy holds z-depth. Pickles are refused.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import IO

import numpy as np

from ex4d import hub, storage
from ex4d.depth import DepthRequest, DepthResult
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import check_intrinsics

KINDS = {"z_depth": "z_depth", "disparity": "disparity", "depth": "disparity", "depths": "z_depth"}
SUFFIXES = (".depth.npz", ".npz", ".depth.npy", ".npy")
MAX_BYTES = 16 * 2**30  # unpacked; an hour at 576 × 1024 in float16 is more than that, and needs to be split
# What numpy and zipfile raise on damaged archives; RuntimeError: members encrypted or packed in an unknown way.
UNREADABLE = (OSError, EOFError, MemoryError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
SKIP_BYTES = 2**20
ASPECT_TOLERANCE = 0.02  # networks round sides to multiples of 14 or 64


def estimate(frames: np.ndarray, request: DepthRequest) -> DepthResult:
    """Return the stored depth of the clip's frames, cut and scaled as the frames were.

    Raises:
        BadSample: depth_missing (no file, or no known key), depth_pickle (objects inside), depth_shape (not [N, H, W],
            too few frames, another aspect), depth_nan (a selected value is not finite).
    """
    path = find(request)
    index = np.arange(len(frames)) if request.frame_index is None else np.asarray(request.frame_index)
    values, kind, K, key = read(path, index)
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise BadSample("depth_nan", f"{(~np.isfinite(values)).mean():.2%} of {_name(path)} is not finite")
    values, K = _fitted(values, K, frames.shape[1:3], request, _name(path))
    # Every clip of a long video asks for the same file, which may have gigabytes.
    digest = hub.file_sha256(storage.local_path(path)) if storage.is_local(path) else storage.sha256(path)
    provenance = {"estimator": "sidecar", "file": _name(path), "key": key, "sha256": digest}
    return DepthResult(values, kind, K, metric=False, provenance=provenance)


def find(request: DepthRequest) -> str:
    """Return the path of the clip's depth file. Raises BadSample depth_missing."""
    given = request.depth_path
    if given and str(given).lower().endswith((".npz", ".npy")):
        candidates = [str(given)]
    else:
        stem = PurePosixPath(request.video_path).stem
        folder = str(given) if given else request.video_path.rpartition("/")[0] or "."
        candidates = [storage.join(folder, stem + suffix) for suffix in SUFFIXES]
    for candidate in candidates:
        if storage.exists(candidate):
            return candidate
    raise BadSample("depth_missing", f"no depth file; looked for {', '.join(map(_name, candidates))}")


def read(path: str, index: np.ndarray) -> tuple[np.ndarray, str, np.ndarray | None, str]:
    """Return (values [T, H, W] of a float or integer type, kind, K [3, 3] or None, key) of frames of a depth file.

    Args:
        index: int [T], which of the file's frames; the others are never held.
    """
    try:
        with storage.open_read(path) as file:
            if not zipfile.is_zipfile(file):
                key, kind, K, values = "z_depth", "z_depth", None, _frames(file, file.seek(0, os.SEEK_END), index)
            else:
                file.seek(0)
                with zipfile.ZipFile(file) as archive:
                    key, kind, K = _said(archive, _name(path))
                    with archive.open(f"{key}.npy") as member:
                        values = _frames(member, archive.getinfo(f"{key}.npy").file_size, index)
    except ValueError as error:
        reason = "depth_pickle" if "allow_pickle" in str(error) else "depth_shape"
        raise BadSample(reason, f"{_name(path)}: {error}") from error
    except UNREADABLE as error:
        raise BadSample("depth_shape", f"{_name(path)} cannot be read: {error}") from error
    if values.ndim == 4 and 1 in (values.shape[1], values.shape[3]):
        values = values[:, 0] if values.shape[1] == 1 else values[..., 0]
    if values.ndim != 3 or values.dtype.kind not in "fiu" or 0 in values.shape:
        raise BadSample("depth_shape", f"{_name(path)}: {key} is {values.dtype} {list(values.shape)}, not [N, H, W]")
    if kind not in ("z_depth", "disparity"):
        raise BadSample("depth_shape", f"{_name(path)}: kind {kind!r}, not z_depth or disparity")
    if K is not None:
        try:
            check_intrinsics(K)
        except ConfigError as error:  # here K is data, not a choice
            raise BadSample("depth_shape", f"{_name(path)}: K is no matrix of intrinsics: {error.allowed}") from error
    return values, kind, K, key


def _said(archive: zipfile.ZipFile, name: str) -> tuple[str, str, np.ndarray | None]:
    """Return (key, kind, K) of an npz. Raises BadSample depth_missing; depth_shape where it unpacks to too much."""
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_BYTES:
        raise BadSample("depth_shape", f"unpacks to {unpacked} bytes, more than {MAX_BYTES}")
    there = {member.removesuffix(".npy") for member in archive.namelist()}
    key = next((key for key in KINDS if key in there), None)
    if key is None:
        raise BadSample("depth_missing", f"{name} has none of the keys {', '.join(KINDS)}")
    small = {}
    for known in there & {"kind", "K"}:
        with archive.open(f"{known}.npy") as member:
            small[known] = np.lib.format.read_array(member, allow_pickle=False)
    kind = str(small["kind"]) if "kind" in small else KINDS[key]
    return key, kind, np.asarray(small["K"], np.float64) if "K" in small else None


def _frames(file: IO[bytes], num_bytes: int, index: np.ndarray) -> np.ndarray:
    """Return `array[index]` of an npy file of so many bytes; one in rows is never held whole, one in columns is.

    Raises:
        ValueError: it is no npy of plain numbers, has fewer frames, or is cut short.
    """
    file.seek(0)
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"npy of version {version}")
    shape, by_columns, dtype = HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("holds objects, which need allow_pickle")
    start, frame_bytes = file.tell(), math.prod(shape[1:]) * dtype.itemsize
    if not shape or start + shape[0] * frame_bytes > num_bytes:
        raise ValueError(f"{dtype} {list(shape)}, or cut short, where [N, H, W] is needed")
    if index.min(initial=0) < 0 or index.max(initial=0) >= shape[0]:
        raise ValueError(f"has {shape[0]} frames, the clip needs frame {index.max()}")
    if by_columns:
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)[index]
    found = {}
    for number in sorted({int(number) for number in index}):
        target = start + number * frame_bytes
        # A compressed member unpacks what it skips, up to 16 MiB at once where it is let.
        while file.tell() < target:
            file.seek(min(target, file.tell() + SKIP_BYTES))
        found[number] = np.frombuffer(file.read(frame_bytes), dtype).reshape(shape[1:])
    return np.stack([found[int(number)] for number in index])


def _fitted(
    values: np.ndarray, K: np.ndarray | None, size: tuple[int, ...], request: DepthRequest, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return values and K at the frames' size. Maps may be stored at another scale than the video, not aspect."""
    from ex4d.video import Fit

    stored = (int(values.shape[1]), int(values.shape[2]))
    height, width = size
    fit = request.fit or Fit((height, width), (height, width), "squeeze")
    if tuple(fit.size) != (height, width):
        raise BadSample("depth_shape", f"the frames are {(height, width)}, the fit makes {tuple(fit.size)}")
    aspect = (stored[0] / stored[1]) / (fit.source_size[0] / fit.source_size[1])
    if abs(aspect - 1) > ASPECT_TOLERANCE:
        raise BadSample("depth_shape", f"{name} is {stored}, the video {tuple(fit.source_size)}: another aspect")
    depth = np.ascontiguousarray(fit.scaled_to(stored).apply_depth(values))
    if K is None:
        return depth, None
    # By way of the video's own pixels: K belongs to the frames, whose cut need not be whole pixels of a smaller map.
    to_video = np.diag([fit.source_size[1] / stored[1], fit.source_size[0] / stored[0], 1.0])
    return depth, fit.apply_K(to_video @ K)


def _name(path: str) -> str:
    return PurePosixPath(path).name
