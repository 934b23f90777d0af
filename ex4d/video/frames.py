"""List the presentation times of frames, and decode exactly the requested frames."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ex4d.errors import BadSample, ConfigError
from ex4d.video.rgb import Converter
from ex4d.video.source import Source, ffmpeg_errors, opened

BACKENDS = ("pyav", "decord")

# Across a gap longer than this, seeking is cheaper than decoding.
_RESEEK_S = 5.0


def frame_pts(path: Source) -> tuple[np.ndarray, Fraction]:
    """Return (int64 [N] sorted pts of every frame that is shown, seconds per tick), without decoding.

    Packets hidden by an edit list are left out. If packets are not enough (missing or duplicate pts),
    the stream is decoded instead.

    Raises:
        BadSample: `no_frames`, and the reasons of `source.opened`.
    """
    pts: list[int | None] = []
    with opened(path) as (container, stream, _):
        time_base = stream.time_base
        with ffmpeg_errors("demux_error", "reading packets"):
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    pts.append(packet.pts)
    if None in pts or len(set(pts)) != len(pts):
        return frame_pts_by_decoding(path)
    if not pts:
        raise BadSample("no_frames", "the video stream has no packets")
    return np.array(sorted(p for p in pts if p is not None), np.int64), time_base


def frame_pts_by_decoding(path: Source) -> tuple[np.ndarray, Fraction]:
    """Return the same as `frame_pts`, by decoding every frame: slow, but always right."""
    with opened(path) as (container, stream, _):
        pts = sorted({_pts_of(frame) for frame in decoded(container, stream, wanted=())})
        time_base = stream.time_base
    if not pts:
        raise BadSample("no_frames", "the video stream has no frame that decodes")
    return np.array(pts, np.int64), time_base


def decode(
    path: Source,
    pts: Sequence[int] | np.ndarray,
    size: tuple[int, int] | None = None,
    fit: str = "crop",
    backend: str = "pyav",
    box: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Decode the frames with exactly these pts, in that order, upright: uint8 [T,H,W,3] RGB.

    HDR (PQ, HLG) is tone-mapped to BT.709 (`hdr`), interlaced frames are deinterlaced (bwdif).

    Args:
        pts: ticks of the stream's clock, as from `frame_pts`; any order, repeats allowed.
        size: (H, W) px of the result; None keeps the video's.
        fit: mode of `Fit` for the resize to `size`.
        backend: "pyav", or "decord", which rejects videos where its timestamps do not prove each frame.
        box: (y, x, height, width) px of the upright picture to scale to `size`; None is all of it.

    Raises:
        BadSample: `decode_short` (a frame is missing), `decode_error`, `decode_corrupt` (the decoder concealed
            damage), `resolution_changed`, `decord_inexact`, and the reasons of `source.opened`.
        ConfigError: unknown backend or fit.
    """
    if backend not in BACKENDS:
        raise ConfigError("backend", backend, f"allowed: {', '.join(BACKENDS)}")
    wanted = [int(value) for value in pts]
    if not wanted:
        raise ConfigError("pts", [], "must name at least one frame")
    if backend == "decord":
        from ex4d.video.decord_backend import decode_decord

        return decode_decord(path, wanted, size, fit, box)
    pictures: dict[int, np.ndarray] = {}
    to_rgb = Converter(size, fit, box=box)
    with opened(path) as (_, stream, _):
        groups = _groups(sorted(set(wanted)), stream.time_base)
    for group in groups:
        pictures |= _decode_group(path, group, to_rgb)
    return np.stack([pictures[value] for value in wanted])


def iter_decimated(path: Source, max_height: int = 144, stride: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (pts, uint8 [h,w,3] RGB upright, h ≤ `max_height`) for every `stride`-th frame, for cut detection.

    Every frame is decoded, because others depend on it; damaged frames are also yielded. Only yielded frames are scaled
    and converted, by a fast bilinear filter: the pixels are good for statistics, not for training.

    Raises:
        BadSample: `decode_error`, `resolution_changed`, and the reasons of `source.opened`.
    """
    with opened(path) as (container, stream, _):
        to_rgb = Converter(None, "squeeze", max_height=max_height)
        for index, frame in enumerate(decoded(container, stream, wanted=())):
            if index % stride == 0:
                yield _pts_of(frame), to_rgb(frame, stream)


def _groups(values: list[int], time_base: Fraction) -> list[list[int]]:
    groups = [[values[0]]]
    for previous, value in itertools.pairwise(values):
        if (value - previous) * time_base > _RESEEK_S:
            groups.append([])
        groups[-1].append(value)
    return groups


def _decode_group(path: Source, group: list[int], to_rgb: Converter) -> dict[int, np.ndarray]:
    first, frames, wanted = group[0], decoded, set(group)
    while True:
        try:
            for by_seeking in (True, False):  # a file without an index can be read but not seeked
                with opened(path) as (container, stream, _):
                    if not by_seeking or _seek_before(container, stream, first):
                        return _collect(frames(container, stream, wanted), wanted, stream, to_rgb)
        except _Interlaced:
            # The filter also needs the frame before the first, so it needs an earlier key frame.
            first, frames = group[0] - 1, deinterlaced


class _Interlaced(Exception):
    """A requested frame is interlaced."""


def _seek_before(container: Any, stream: Any, target: int) -> bool:
    """Seek to a key frame whose own pts is ≤ target; return False if that is not possible.

    A seek may land on a key frame that is shown after the target (open GOP: its leading frames need the group
    before), so the search goes back until the key frame's pts is early enough.
    """
    import av

    at, step = target, max(1, int(1 / stream.time_base))
    first = min(stream.start_time or 0, 0) - step
    while at > first:
        try:
            container.seek(at, stream=stream, backward=True, any_frame=False)
            packet = next(container.demux(stream), None)
            if packet is not None and packet.pts is not None and packet.is_keyframe and packet.pts <= target:
                container.seek(at, stream=stream, backward=True, any_frame=False)
                return True
        except av.FFmpegError:
            return False
        if packet is not None and packet.pts is not None:
            at = min(at, packet.pts)
        at, step = at - step, step * 2
    return False


def _collect(frames: Iterator[Any], wanted: set[int], stream: Any, to_rgb: Converter) -> dict[int, np.ndarray]:
    pictures: dict[int, np.ndarray] = {}
    last = max(wanted)
    for frame in frames:
        pts = _pts_of(frame)
        if pts in wanted and pts not in pictures:
            if frame.interlaced_frame:
                raise _Interlaced
            pictures[pts] = to_rgb(frame, stream)
            if len(pictures) == len(wanted):
                return pictures
        if pts > last:
            break
    missing = sorted(wanted - set(pictures))
    raise BadSample("decode_short", f"{len(missing)} of {len(wanted)} frames are missing, first at pts {missing[0]}")


def deinterlaced(container: Any, stream: Any, wanted: Container[int] | None = None) -> Iterator[Any]:
    """Yield the frames of `decoded`: interlaced ones deinterlaced by bwdif, others unchanged."""
    import av

    graph = av.filter.Graph()
    source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    source.link_to(bwdif)
    bwdif.link_to(sink)
    graph.configure()
    for frame in itertools.chain(decoded(container, stream, wanted), [None]):  # None flushes the filter
        with ffmpeg_errors("decode_error", "deinterlacing"):
            graph.push(frame)
            while True:
                try:
                    shown = graph.pull()
                except (av.BlockingIOError, av.EOFError):
                    break
                if shown.pts is not None:  # the filter's clock ticks twice as fast
                    shown.pts = round(shown.pts * Fraction(shown.time_base or 1) / stream.time_base)
                    shown.time_base = stream.time_base
                yield shown


def decoded(container: Any, stream: Any, wanted: Container[int] | None = None) -> Iterator[Any]:
    """Yield PyAV's frames of an opened stream.

    Args:
        wanted: pts of the frames that must be undamaged; None: all. After concealed damage, every frame up to the next
            key frame may be affected, though the decoder marks only the first.

    Raises:
        BadSample: `decode_corrupt`, `decode_error`.
    """
    damaged = None
    with ffmpeg_errors("decode_error", "decoding"):
        for frame in container.decode(stream):
            damaged = frame.pts if frame.is_corrupt else None if frame.key_frame else damaged
            if damaged is not None and (wanted is None or frame.pts in wanted):
                raise BadSample("decode_corrupt", f"the decoder concealed damage at pts {damaged}")
            yield frame


def _pts_of(frame: Any) -> int:
    pts = frame.pts if frame.pts is not None else frame.dts
    if pts is None:
        raise BadSample("no_timestamps", "frames of this stream have neither pts nor dts")
    return pts
