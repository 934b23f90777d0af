"""Read depth from a file beside the video: the estimate of another program, or the truth of a synthetic scene.

`places` finds the file; `layouts` lists the npz layouts that are read, with intrinsics and the source's cameras if they
hold them. Values are [N, H, W], one map for each frame of the whole source; if the npz has its own rate as `fps`, the
map nearest in time is used. `videos` reads grey videos of disparity.

A string `kind` ("z_depth" or "disparity") in the npz decides over the key: Video Depth Anything's relative models write
disparity as `depths` too, so add it there; an npy holds z-depth. Whole numbers of 16 bits or more are millimetres, as
depth cameras write them; a folder of 16-bit PNG, one a frame, holds such. z_depth of 0, NaN or inf, and disparity of
NaN or inf, is a hole: the sensor has no value there (`holes`). Pickles are refused.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from ex4d import storage
from ex4d.depth import DepthRequest, Geometry, holes, layouts, pictures, places, videos
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import check_lens

KEYS = ("z_depth", "disparity", "depth", "depths", "local_points")
MAX_BYTES = 16 * 2**30  # unpacked; an hour at 576 × 1024 in float16 exceeds it and must be split
# What numpy and zipfile raise on damaged archives; RuntimeError: members encrypted or packed in an unknown way.
UNREADABLE = (OSError, EOFError, MemoryError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error)
MAX_SMALL_BYTES, MAX_WHOLE_BYTES, MAX_SIDE_PX = 64 * 2**20, 2**30, 8192
SKIP_BYTES = 2**20
MAX_Z = 1e7  # ten thousand kilometres, or ten kilometres in millimetres
ASPECT_TOLERANCE = 0.02  # networks round sides to multiples of 14 or 64


def estimate(frames: np.ndarray, request: DepthRequest) -> Geometry:
    """Return the stored depth of the clip's frames, cut and scaled as the frames were.

    Raises:
        BadSample: depth_missing (no file, or no known key), sidecar_ambiguous, depth_pickle (objects inside),
            depth_shape (not [N, H, W], another aspect), depth_frames (not one map a frame), depth_unit (values or a K
            of an implausible unit), depth_holes (a frame has no value at all).
    """
    path = places.find(request)
    index = np.arange(len(frames)) if request.frame_index is None else np.asarray(request.frame_index)
    if os.path.isdir(path):
        values, kind, K, key, w2c = *pictures.read(path, index, request.source_frames), None, "png", None
    elif path.lower().endswith(places.VIDEOS):
        values = videos.read(path, lambda count, fps: _maps(count, index, request, fps))
        kind, K, key, w2c = "disparity", None, "video", None
    else:
        values, kind, K, key, w2c = read(path, index, request)
    values = _in_one_unit(values, kind, _name(path))
    values, K = _fitted(values, K, frames.shape[1:3], request, _name(path))
    measured = holes.valid_mask(values, kind)
    values, valid = holes.close(values, kind, measured, request.fill_px)
    facts: dict[str, Any] = {"estimator": "sidecar", "file": _name(path), "key": key, "sha256": places.sha256(path)}
    facts["measured_share"] = float(measured.mean(dtype=np.float64))
    cameras = w2c if kind == "z_depth" else None
    return Geometry(values, kind, K, False, facts, cameras, valid_mask=None if valid.all() else valid)


def read(
    path: str, index: np.ndarray, request: DepthRequest | None = None
) -> tuple[np.ndarray, str, np.ndarray | None, str, np.ndarray | None]:
    """Return (values [T, H, W] of a float or integer type, kind, K [3, 3] or None, key, w2c [T, 4, 4] or None).

    Args:
        index: int [T], which of the source's frames; other maps are never held.
        request: what is known of the source's frames and times; None: nothing.
    """
    request = request or DepthRequest()
    try:
        with storage.open_read(path) as file:
            if not zipfile.is_zipfile(file):
                key, kind, K, w2c = "z_depth", "z_depth", None, None
                num_bytes = file.seek(0, os.SEEK_END)
                values = _frames(file, num_bytes, lambda count: _maps(count, index, request, None))
            else:
                file.seek(0)
                with zipfile.ZipFile(file) as archive:
                    values, kind, K, key, w2c = _of_archive(archive, index, request, _name(path))
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
        K = _lens(K, (values.shape[1], values.shape[2]), _name(path))
    return values, kind, K, key, w2c


def _of_archive(
    archive: zipfile.ZipFile, index: np.ndarray, request: DepthRequest, name: str
) -> tuple[np.ndarray, str, np.ndarray | None, str, np.ndarray | None]:
    """Return what `read` does, of an npz, K as it is written."""
    layout, small = _said(archive, name)
    fps = float(small["fps"]) if small.get("fps", np.empty(0)).size == 1 else None
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}, not above 0")
    chosen: list[np.ndarray] = []  # which maps: known once their number is

    def choose(count: int) -> np.ndarray:
        chosen.append(_maps(count, index, request, fps))
        return chosen[0]

    with archive.open(f"{layout.depth}.npy") as member:
        values = _frames(member, archive.getinfo(f"{layout.depth}.npy").file_size, choose)
    K = np.asarray(small[layout.K], np.float64) if layout.K in small else None
    if layout.depth == "local_points":
        if values.ndim != 4 or values.shape[3] != 3:
            raise ValueError(f"local_points is {list(values.shape)}, not [N, H, W, 3]")
        K, values = layouts.lens_of_points(values), values[..., 2]
    w2c = layouts.cameras(small[layout.poses], layout, chosen[0]) if layout.poses else None
    kind = str(small["kind"]) if "kind" in small else layout.kind
    return values, kind, K, layout.depth, w2c


def _lens(K: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Return K [3, 3] of one that is given once or for each frame; BadSample unless it is a lens in px of the maps."""
    try:
        K = layouts.one_lens(K)
    except ValueError as error:
        raise BadSample("depth_shape", f"{name}: {error}") from None
    try:
        return check_lens(K, size)
    except ConfigError as error:  # K comes from data, not from a setting
        message = f"{name}: K is no matrix of intrinsics in px of its maps of {size[1]} × {size[0]}: {error.allowed}"
        raise BadSample("depth_shape", message) from error


def _maps(count: int, index: np.ndarray, request: DepthRequest, fps: float | None) -> np.ndarray:
    """Return which of `count` maps belong to the source's frames `index`.

    Raises:
        BadSample: depth_frames: there is not one map for each frame, and no rate that says which belong to them.
    """
    source = request.source_frames
    if source in (0, count):
        if index.max(initial=0) >= count or index.min(initial=0) < 0:
            raise BadSample("depth_frames", f"has {count} maps, the clip needs that of frame {index.max()}")
        return index
    if fps is None or request.frame_s is None:
        remedy = "write one map a frame, or the maps' rate as `fps` in the npz"
        raise BadSample("depth_frames", f"has {count} maps, the video {source} frames: {remedy}")
    if abs(count / fps - request.source_s * source / max(1, source - 1)) > 1.5 / fps:
        raise BadSample("depth_frames", f"{count} maps at fps={fps:g} do not last the video's {request.source_s:.2f} s")
    return np.clip(np.rint(request.frame_s * fps).astype(np.int64), 0, count - 1)


def _in_one_unit(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Return float32 values; whole numbers of z-depth are millimetres and become metres."""
    if kind == "z_depth" and values.dtype.kind in "iu":
        if values.dtype.itemsize == 1:
            raise BadSample("depth_unit", f"{name}: 8 bits hold no z_depth; call it disparity where near is bright")
        return values.astype(np.float32) / 1000
    known = values[np.isfinite(values)]
    middle = float(np.median(known)) if known.size else 1.0
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if kind == "z_depth" and middle > MAX_Z:
        raise BadSample("depth_unit", f"{name}: a middle z_depth of {middle:.3g} is in no unit that is known")
    return values


def _said(archive: zipfile.ZipFile, name: str) -> tuple[layouts.Layout, dict[str, np.ndarray]]:
    """Return the layout of an npz, and its small arrays: kind, fps, intrinsics and cameras.

    Raises:
        BadSample: depth_missing; depth_shape where it unpacks too large.
    """
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_BYTES:
        raise BadSample("depth_shape", f"unpacks to {unpacked} bytes, more than {MAX_BYTES}")
    there = {member.removesuffix(".npy") for member in archive.namelist()}
    layout = layouts.of(there)
    if layout is None:
        found = ", ".join(sorted(there)[:4]) or "nothing"
        raise BadSample("depth_missing", f"{name} holds {found}, and none of the keys {', '.join(KEYS)}")
    small = {}
    for known in sorted(there & {"kind", "fps", layout.K, layout.poses}):
        with archive.open(f"{known}.npy") as member:
            shape, _, dtype = _header(member)
            if math.prod(shape) * dtype.itemsize > MAX_SMALL_BYTES:
                raise ValueError(f"{known} is {dtype} {list(shape)}, too large")
        with archive.open(f"{known}.npy") as member:
            small[known] = np.lib.format.read_array(member, allow_pickle=False)
    return layout, small


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return (shape, whether in columns, type) of an npy stream. Raises ValueError where it is none of numbers."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # a later version may announce a header of gigabytes, and numpy reads it
        raise ValueError(f"npy of version {version}")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("holds objects, which need allow_pickle")
    return shape, by_columns, dtype


def _frames(file: IO[bytes], num_bytes: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """Return `array[choose(len(array))]` of an npy file of so many bytes; one in rows is never held whole, one in
    columns is.

    Raises:
        ValueError: it is no npy of plain numbers, or is cut short. BadSample: as `choose`.
    """
    file.seek(0)
    shape, by_columns, dtype = _header(file)
    start, frame_bytes = file.tell(), math.prod(shape[1:]) * dtype.itemsize
    if not shape or start + shape[0] * frame_bytes > num_bytes:
        raise ValueError(f"{dtype} {list(shape)}, or cut short, where [N, H, W] is needed")
    if 0 in shape:
        raise ValueError(f"{dtype} {list(shape)} is empty")
    if max(shape[1:], default=0) > MAX_SIDE_PX or (by_columns and num_bytes > MAX_WHOLE_BYTES):
        raise ValueError(
            f"{dtype} {list(shape)}: {MAX_SIDE_PX} px a side are the most, and in columns {MAX_WHOLE_BYTES} bytes"
        )
    index = choose(shape[0])
    pictures.check_pixels(len(index) * math.prod(shape[1:]))
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
    # Through the video's own pixels: the crop of the frames need not be whole pixels of a smaller map.
    to_video = np.diag([fit.source_size[1] / stored[1], fit.source_size[0] / stored[0], 1.0])
    return depth, fit.apply_K(to_video @ K)


def _name(path: str) -> str:
    return PurePosixPath(path).name
