"""Read depth maps, intrinsics and cameras from an npy, an npz or a zip of OpenEXR, in the sandboxed child.

Headers are checked before any array is allocated. Only the requested maps are held in memory. Pickles are rejected.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from ex4d import npy
from ex4d.depth import layouts, pictures
from ex4d.errors import BadSample

KEYS = ("z_depth", "disparity", "depth", "depths", "local_points", "points")
MAX_BYTES = 16 * 2**30  # unpacked; an hour at 576 × 1024 in float16 exceeds it and must be split
# What numpy and zipfile raise on damaged archives; RuntimeError: encrypted members or unknown compression.
UNREADABLE = (OSError, EOFError, MemoryError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error)
MAX_SMALL_BYTES, MAX_WHOLE_BYTES, MAX_SIDE_PX = 64 * 2**20, 2**30, 8192
SKIP_BYTES = 2**20


@dataclass(frozen=True)
class Wanted:
    """The requested maps, and the timing that locates them in the file; fields as in DepthRequest.

    Args:
        index: int [T], positions in the source.
    """

    index: np.ndarray
    source_frames: int = 0
    source_s: float = 0.0
    frame_s: np.ndarray | None = None

    def of(self, count: int, fps: float | None) -> np.ndarray:
        """Return the indices of the requested maps in a file of `count` maps at a rate `fps`.

        Raises:
            BadSample: depth_frames: there is not one map per frame, and no rate by which to assign maps to frames.
        """
        source = self.source_frames
        if source in (0, count):
            if self.index.max(initial=0) >= count or self.index.min(initial=0) < 0:
                raise BadSample("depth_frames", f"has {count} maps, but the clip needs frame {self.index.max()}")
            return self.index
        if fps is None or self.frame_s is None:
            remedy = "write one map a frame, or the maps' rate as `fps` in the npz"
            raise BadSample("depth_frames", f"has {count} maps, the video {source} frames: {remedy}")
        if abs(count / fps - self.source_s * source / max(1, source - 1)) > 1.5 / fps:
            raise BadSample(
                "depth_frames", f"{count} maps at fps={fps:g} do not cover the video's {self.source_s:.2f} s"
            )
        return np.clip(np.rint(self.frame_s * fps).astype(np.int64), 0, count - 1)


def read(file: IO[bytes], name: str, wanted: Wanted) -> dict[str, Any]:
    """Read the requested maps of a file.

    Args:
        file: the open file; it may hold anything.
        name: the file's name, for messages.

    Returns: `values` [T, H, W] (or with one more axis of length 1) of a float or integer type, `kind`, `key`, `K`
        float64 as stored and `w2c` [T, 4, 4]; the last two None if the file has none.

    Raises:
        BadSample: depth_missing, depth_pickle, depth_shape, depth_frames.
    """
    try:
        if zipfile.is_zipfile(file):
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                is_exr = name.lower().endswith(".zip")
                return _of_pictures(archive, name, wanted) if is_exr else _of_archive(archive, name, wanted)
        num_bytes = file.seek(0, os.SEEK_END)
        values = _frames(file, num_bytes, lambda count: wanted.of(count, None))
        return {"values": values, "kind": "z_depth", "key": "z_depth", "K": None, "w2c": None}
    except ValueError as error:
        reason = "depth_pickle" if "allow_pickle" in str(error) else "depth_shape"
        raise BadSample(reason, f"{name}: {error}") from error
    except UNREADABLE as error:
        raise BadSample("depth_shape", f"{name} cannot be read: {error}") from error


def _of_archive(archive: zipfile.ZipFile, name: str, wanted: Wanted) -> dict[str, Any]:
    """Read the requested maps of an npz; see `read`."""
    layout, small = _layout_of(archive, name)
    fps = float(small["fps"]) if small.get("fps", np.empty(0)).size == 1 else None
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}, not above 0")
    chosen: list[np.ndarray] = []  # the indices, known once the number of maps is

    def choose(count: int) -> np.ndarray:
        chosen.append(wanted.of(count, fps))
        return chosen[0]

    with archive.open(f"{layout.depth}.npy") as member:
        values = _frames(member, archive.getinfo(f"{layout.depth}.npy").file_size, choose)
    K = np.asarray(small[layout.K], np.float64) if layout.K in small else None
    if layout.depth in ("local_points", "points"):
        if values.ndim != 4 or values.shape[3] != 3 or values.dtype.kind != "f":
            raise ValueError(f"{layout.depth} is {values.dtype} {list(values.shape)}, not floats [N, H, W, 3]")
        if layout.depth == "points":
            values = layouts.in_cameras(values, small[layout.poses], layout, chosen[0])
        K, values = layouts.lens_of_points(values), values[..., 2]
    w2c = layouts.cameras(small[layout.poses], layout, chosen[0]) if layout.poses else None
    kind = str(small["kind"]) if "kind" in small else layout.kind
    return {"values": values, "kind": kind, "key": layout.depth, "K": K, "w2c": w2c}


def _of_pictures(archive: zipfile.ZipFile, name: str, wanted: Wanted) -> dict[str, Any]:
    """Read the requested maps of a zip of OpenEXR, named by frame from 00000.exr on, as ViPE writes it; see `read`.

    Raises:
        BadSample: depth_missing, depth_frames, depth_shape.
    """
    names = sorted(member for member in archive.namelist() if member.endswith(".exr"))
    if not names:
        raise BadSample("depth_missing", f"{name} holds no OpenEXR; expected a zip with one per frame")
    if [member.removesuffix(".exr").lstrip("0") for member in names] != ["", *map(str, range(1, len(names)))]:
        raise BadSample("depth_frames", f"{name} needs one picture per frame, from 00000.exr on, without a gap")
    index = wanted.of(len(names), None)
    values = np.empty(0)
    for number in np.unique(index):
        if archive.getinfo(names[number]).file_size > MAX_WHOLE_BYTES:
            raise ValueError(f"{names[number]} unpacks to more than {MAX_WHOLE_BYTES} bytes")
        one = pictures.exr_values(archive.read(names[number]), values.shape[1:] or None, f"{name}/{names[number]}")
        if not values.size:
            pictures.check_pixels(len(index) * one.size)
            values = np.empty((len(index), *one.shape), np.float32)
        values[index == number] = one
    return {"values": values, "kind": "z_depth", "key": "exr", "K": None, "w2c": None}


def _layout_of(archive: zipfile.ZipFile, name: str) -> tuple[layouts.Layout, dict[str, np.ndarray]]:
    """Return the layout of an npz, and its small arrays: kind, fps, intrinsics and cameras.

    Raises:
        BadSample: depth_missing; depth_shape, if it unpacks to too many bytes.
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
            header = npy.header(member)
            if header.num_bytes > MAX_SMALL_BYTES:
                raise ValueError(f"{known} is {header}, too large")
            small[known] = npy.numbers(member, header)
    return layout, small


def _frames(file: IO[bytes], num_bytes: int, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """Read `array[choose(len(array))]` of an npy file of `num_bytes`.

    An array in row-major order is never held whole in memory; one in column-major order is.

    Raises:
        ValueError: not an npy of plain numbers, or truncated. BadSample: as `choose`.
    """
    file.seek(0)
    header = npy.header(file)
    shape, dtype = header.shape, header.dtype
    start, frame_bytes = file.tell(), math.prod(shape[1:]) * dtype.itemsize
    if not shape or start + shape[0] * frame_bytes > num_bytes:
        raise ValueError(f"{header}, or cut short, where [N, H, W] is needed")
    if 0 in shape or dtype.kind not in "fiu":
        raise ValueError(f"{header} is empty, or holds no numbers")
    if max(shape[1:], default=0) > MAX_SIDE_PX or (header.by_columns and num_bytes > MAX_WHOLE_BYTES):
        raise ValueError(f"{header}: {MAX_SIDE_PX} px a side are the most, and in columns {MAX_WHOLE_BYTES} bytes")
    index = choose(shape[0])
    pictures.check_pixels(len(index) * math.prod(shape[1:]))
    if header.by_columns:
        return npy.numbers(file, header)[index]
    values = np.empty((len(index), *shape[1:]), dtype)
    for number in np.unique(index):
        target = start + int(number) * frame_bytes
        # Seeking in a compressed member unpacks what it skips, up to 16 MiB at once; small steps need less memory.
        while file.tell() < target:
            file.seek(min(target, file.tell() + SKIP_BYTES))
        values[index == number] = np.frombuffer(file.read(frame_bytes), dtype).reshape(shape[1:])
    return values
