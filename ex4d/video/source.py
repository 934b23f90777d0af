"""Open a video and read its properties. FFmpeg gets an explicit format and may open no other file."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

from ex4d.errors import BadSample
from ex4d.video import hdr, pictures, sniff
from ex4d.video.sniff import MAX_SIDE_PX

# A path, a file's bytes, or an open, seekable file
Source = str | Path | bytes | IO[bytes]


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video, from its header and its first frame.

    Attributes:
        container: demuxer, one of sniff.CONTAINERS.
        codec, pix_fmt: FFmpeg's names.
        size: (H, W) px as displayed, rotation applied.
        coded_size: (H, W) px as stored.
        turn: counter-clockwise quarter turns that make the stored picture upright, 0–3.
        mirrored: True if it is flipped left to right after the turn.
        time_base: seconds per pts tick, (numerator, denominator).
        fps: mean frame rate that the container declares; 0.0 if it declares none.
        duration_s: declared, so perhaps wrong; 0.0 if not declared.
        num_frames: declared, so perhaps wrong; 0 if not declared.
        stream_index: the video stream that is read.
        num_video_streams: without attached cover pictures.
        notes: facts that a user may want to filter by, e.g. "hdr_pq".
    """

    container: str
    codec: str
    pix_fmt: str
    size: tuple[int, int]
    coded_size: tuple[int, int]
    turn: int
    mirrored: bool
    time_base: tuple[int, int]
    fps: float
    duration_s: float
    num_frames: int
    stream_index: int
    num_video_streams: int
    notes: tuple[str, ...]


@contextmanager
def opened(source: Source) -> Iterator[tuple[Any, Any, str]]:
    """Yield (PyAV container, its video stream ready to decode on one thread, container name).

    Raises:
        BadSample: all of `sniff.container_of`, and `codec_unknown`, `codec_not_allowed`, `no_video_stream`,
            `size_limit`, `no_size`, `encrypted`, `decode_error` (WebP),
            `timescale_zero`, `truncated`, `open_error`, `unreadable` (an error of the system, perhaps transient).
    """
    import av

    # The caller closes an open file.
    with _file(source) if isinstance(source, str | Path | bytes) else nullcontext(source) as file:
        name = sniff.container_of(file)
        raw, demuxer = (pictures.of_webp(file), "mov") if name == "webp" else (file, name)
        num_bytes = raw.seek(0, os.SEEK_END)
        raw.seek(0)
        # FFmpeg reads through our handle, so that no file name is parsed as a URL; the empty whitelist
        # keeps it from opening other files.
        # Probing already opens decoders, so the list of allowed ones goes to the container.
        options = {"protocol_whitelist": "", "max_streams": "64", "codec_whitelist": ",".join(sniff.codecs())}
        with ffmpeg_errors("open_error", f"{name} header"):
            container = av.open(raw, format=demuxer, container_options=options, buffer_size=1 << 18)
        with container:
            stream = _choose_stream(container)
            _check_stream(stream, name, num_bytes)
            # One thread: FFmpeg's frame threads have deadlocked when a broken file was closed, and a pool of
            # processes is the better use of the cores.
            stream.codec_context.thread_count = 1
            stream.codec_context.thread_type = "SLICE"
            yield container, stream, name


def missing_decoders(names: Sequence[str]) -> list[str]:
    """Return those of FFmpeg's codec names that the installed PyAV lacks."""
    import av

    return [name for name in names if name not in av.codecs_available]


@contextmanager
def ffmpeg_errors(reason: str, doing: str) -> Iterator[None]:
    """Turn FFmpeg's errors into BadSample(reason), except MemoryError.

    The message is FFmpeg's, without file names, so that it is the same on every machine.
    """
    import av

    try:
        yield
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise BadSample(reason, f"{doing}: {error.strerror}") from error
    except ValueError as error:  # PyAV's own checks
        raise BadSample(reason, f"{doing}: {error}") from error


def _file(source: str | Path | bytes) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if Path(source).is_fifo() or Path(source).is_socket():  # opening one could block for ever
        raise BadSample("open_error", "a pipe or socket is not seekable")
    try:
        return Path(source).open("rb")
    except OSError as error:
        raise BadSample("unreadable", error.strerror or type(error).__name__) from error


def video_streams(container: Any) -> list[Any]:
    """Return the video streams, without attached cover pictures."""
    import av

    attached = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & attached]


def _choose_stream(container: Any) -> Any:
    import av

    streams = video_streams(container)
    if not streams:
        raise BadSample("no_video_stream", f"streams: {', '.join(s.type for s in container.streams) or 'none'}")

    def rank(stream: Any) -> tuple[bool, int, int]:
        context = stream.codec_context
        is_default = bool(stream.disposition & av.stream.Disposition.default)
        return is_default, context.width * context.height if context else 0, -stream.index

    return max(streams, key=rank)


def _check_stream(stream: Any, name: str, num_bytes: int) -> None:
    context = stream.codec_context
    if context is None:
        raise BadSample("codec_unknown", "there is no decoder for the video stream")
    if context.codec.name not in sniff.codecs():
        allowed = f"is not among the decoders that are allowed ({', '.join(sniff.CODECS)}); EX4D_CODECS may name more"
        raise BadSample("codec_not_allowed", f"{context.codec.name} {allowed}")
    if "enc_key_id" in stream.metadata:  # Matroska's ContentEncryption
        raise BadSample("encrypted", "the video track names an encryption key")
    if max(context.width, context.height) > MAX_SIDE_PX:
        raise BadSample("size_limit", f"declared {context.width}x{context.height}, limit {MAX_SIDE_PX} px a side")
    if stream.time_base is None or stream.time_base <= 0:
        raise BadSample("timescale_zero", "the stream has no clock")
    if name == "mov" and stream.index_entries:
        end = max(entry.pos + entry.size for entry in stream.index_entries)
        if end > num_bytes:
            raise BadSample("truncated", f"the index points at byte {end}, the file ends at {num_bytes}")


def probe(path: Source) -> VideoInfo:
    """Read the VideoInfo of a file, decoding its first frame.

    Raises:
        BadSample: the file is not a usable video; the reasons are those of `opened`, and `no_frames`,
            `decode_error`.
    """
    with opened(path) as (container, stream, name):
        frame = first_frame(container, stream)
        turn, mirrored = orientation(frame)
        shown_size = square_pixel_size(frame, stream)
        num_streams = len(video_streams(container))
        duration = stream.duration * stream.time_base if stream.duration else Fraction(container.duration or 0, 10**6)
        return VideoInfo(
            container=name,
            codec=stream.codec_context.name,
            pix_fmt=frame.format.name,
            size=shown_size[::-1] if turn % 2 else shown_size,
            coded_size=(frame.height, frame.width),
            turn=turn,
            mirrored=mirrored,
            time_base=(stream.time_base.numerator, stream.time_base.denominator),
            fps=float(stream.average_rate or 0),
            duration_s=float(duration),
            num_frames=stream.frames,
            stream_index=stream.index,
            num_video_streams=num_streams,
            notes=_notes(frame, stream, turn, mirrored, num_streams),
        )


def first_frame(container: Any, stream: Any) -> Any:
    """Return the first frame that decodes.

    Raises:
        BadSample: `no_frames`, `decode_error`.
    """
    with ffmpeg_errors("decode_error", "first frame"):
        frame = next(container.decode(stream), None)
    if frame is None:
        raise BadSample("no_frames", "the video stream has no frame that decodes")
    return frame


def _notes(frame: Any, stream: Any, turn: int, mirrored: bool, num_streams: int) -> tuple[str, ...]:
    notes = []
    if frame.color_trc in hdr.NAMES:
        notes.append(f"hdr_{hdr.NAMES[frame.color_trc]}")
    if num_streams > 1:
        notes.append("several_video_streams")
    if turn:
        notes.append(f"rotated_{turn * 90}")
    if mirrored:
        notes.append("mirrored")
    if frame.interlaced_frame:
        notes.append("interlaced")
    if square_pixel_size(frame, stream) != (frame.height, frame.width):
        notes.append("non_square_pixels")
    return tuple(notes)


def square_pixel_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Return (H, W) px of a stored frame with square pixels, before rotation; one side is stretched, none shrinks.

    Raises:
        BadSample: `size_limit`.
    """
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    height, width = frame.height, frame.width
    if aspect > 1:
        width = round(width * aspect)
    elif 0 < aspect < 1:
        height = round(height / aspect)
    if max(height, width) > MAX_SIDE_PX:
        raise BadSample("size_limit", f"frames of {width}x{height}, limit {MAX_SIDE_PX} px a side")
    return height, width


def orientation(frame: Any) -> tuple[int, bool]:
    """Return (quarter turns counter-clockwise, then mirrored left to right) that make a stored frame upright.

    From the display matrix, nine 32-bit integers of which a b / c d map stored to shown coordinates
    (ISO/IEC 14496-12, 8.3.2). Angles that are not quarter turns are rounded to the nearest one.
    """
    from av.sidedata.sidedata import Type

    try:
        data = frame.side_data.get(Type.DISPLAYMATRIX)
    except ValueError:  # PyAV has no name for another side datum of this frame, e.g. MV-HEVC's view id
        return round(frame.rotation / 90) % 4, False
    if data is None:
        return 0, False
    a, b, _, c, d, *_ = struct.unpack("<9i", bytes(data)[:36])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, c = -a, -c  # undo the flip of x, which comes last
    if abs(a) >= abs(b):
        return (0 if a >= 0 else 2), mirrored
    return (3 if b > 0 else 1), mirrored
