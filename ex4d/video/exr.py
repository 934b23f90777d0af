"""Read a single-channel OpenEXR picture, as depth programs write it, by FFmpeg, in the sandboxed child.

FFmpeg knows only the channels R, G, B, A and Y. Depth is usually called Z or V, so a single channel is renamed to Y in
the copy of the header that FFmpeg reads. A name is one letter, or one after its layer (`depth.Z`).
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

HEADER_BYTES = 1 << 16  # real headers have a few hundred
_MAGIC = b"v/1\x01"
_DEEP, _PARTS = 0x800, 0x1000
_NUMPY = {"grayf16le": np.float16, "grayf32le": np.float32, "gbrpf16le": np.float16, "gbrpf32le": np.float32}


@dataclass(frozen=True)
class Header:
    """The facts of a file's header: its channels, (H, W) px, and the offset of its channels attribute."""

    channels: tuple[str, ...]
    size: tuple[int, int]
    at: int


def header(data: bytes) -> Header:
    """Parse the header of a file from its first bytes, at most HEADER_BYTES (OpenEXR File Layout, version 2).

    Raises:
        ValueError: it is not an OpenEXR, or of a kind that is not supported.
    """
    if not data.startswith(_MAGIC) or len(data) < 8:
        raise ValueError("is not an OpenEXR file")
    (flags,) = struct.unpack_from("<I", data, 4)
    if flags & 0xFF != 2 or flags & (_DEEP | _PARTS):
        raise ValueError("has several parts or deep pixels")
    channels: tuple[str, ...] = ()
    place, at, size = 8, 0, (0, 0)
    try:
        while data[place] != 0:
            name, place = _word(data, place)
            _, place = _word(data, place)
            (length,) = struct.unpack_from("<I", data, place)
            place += 4
            if name == "channels":
                at, channels = place, _channels(data[place : place + length])
            if name == "displayWindow":
                left, top, right, bottom = struct.unpack_from("<4i", data, place)
                size = bottom - top + 1, right - left + 1
            place += length
    except (IndexError, ValueError, struct.error):
        raise ValueError("has a damaged header") from None
    if not channels or min(size) < 1:
        raise ValueError("has no channels, or no size")
    return Header(channels, size, at)


def _word(data: bytes, place: int) -> tuple[str, int]:
    end = data.index(b"\0", place)
    return data[place:end].decode("latin-1"), end + 1


def _channels(data: bytes) -> tuple[str, ...]:
    names, place = [], 0
    while data[place] != 0:
        name, place = _word(data, place)
        names.append(name)
        place += 16  # pixel type, linear, sampling
    return tuple(names)


def picture(data: bytes) -> np.ndarray:
    """Decode a file with one channel, or with equal R, G and B, to float16 or float32 [H, W].

    Raises:
        ValueError: another kind of file, or one that does not decode. BadSample: decode_error.
    """
    import av

    from ex4d.video.source import ffmpeg_errors

    facts = header(data[:HEADER_BYTES])
    layer, _, letter = facts.channels[0].rpartition(".")
    if len(facts.channels) == 1 and len(letter) == 1:
        name = facts.at + len(facts.channels[0]) - 1
        data = b"".join((data[:name], b"Y", data[name + 1 :]))
    elif sorted(facts.channels) != ["B", "G", "R"]:
        raise ValueError(f"has the channels {', '.join(facts.channels)[:80]}; one channel of depth is read")
    options = {"protocol_whitelist": "", "codec_whitelist": "exr"}
    layers: list[Any] = [{"layer": layer}]
    opening: dict[str, Any] = {"format": "exr_pipe", "container_options": options, "stream_options": layers}
    with ffmpeg_errors("decode_error", "OpenEXR"), av.open(io.BytesIO(data), **opening) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"layer": layer}
        frame = next(file.decode(stream), None)
    if frame is None or frame.format.name not in _NUMPY or (frame.height, frame.width) != facts.size:
        raise ValueError("does not decode to floats of its size")
    planes = [_plane(plane, frame.format.name) for plane in frame.planes]
    if any(not np.array_equal(plane, planes[0], equal_nan=True) for plane in planes[1:]):
        raise ValueError("is coloured; one channel of depth is read")
    return planes[0]


def _plane(plane: object, name: str) -> np.ndarray:
    dtype = np.dtype(_NUMPY[name])
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)  # type: ignore[attr-defined, call-overload]
    return rows[:, : plane.width * dtype.itemsize].copy().view(dtype)  # type: ignore[attr-defined]
