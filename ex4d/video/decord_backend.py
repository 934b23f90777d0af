"""Decode with decord, but only if timestamps prove that each frame is the requested one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ex4d.errors import BadSample, ConfigError
from ex4d.video.resize import Fit
from ex4d.video.source import Source, opened, probe


def decode_decord(
    path: Source,
    wanted: list[int],
    size: tuple[int, int] | None,
    fit: str,
    box: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Decode uint8 [T,H,W,3] RGB like `frames.decode`, by decord.

    decord numbers the packets by pts, seeks to a key frame and then *counts* frames. The count is right if every
    packet is one shown frame and no frame is shown before the key frame that it follows (closed GOPs). So this,
    decord's frame count and its timestamps are checked against the stream's pts; other videos are rejected.

    Raises:
        BadSample: `decord_inexact`, `decord_error`, and the reasons of `source.opened`.
        ConfigError: decord is not installed.
    """
    try:
        import decord
    except ImportError as error:
        raise ConfigError("backend", "decord", "is not installed: pip install 'ex4d-platform[decord]'") from error
    if not isinstance(path, str | Path):
        raise ConfigError("backend", "decord", "reads files by their path")
    info = probe(path)
    unlike = {"mirrored", "non_square_pixels", "several_video_streams", "interlaced", "hdr_pq", "hdr_hlg"}
    if unlike & set(info.notes) or info.turn:
        raise BadSample("decord_inexact", f"decord is not exact for {', '.join(info.notes)}")
    pts = _closed_gop_pts(path)
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        _prove(reader, pts, info.time_base)
        index = np.searchsorted(pts, wanted)
        if (pts[np.minimum(index, len(pts) - 1)] != wanted).any():
            raise BadSample("decode_short", "a requested frame is missing")
        frames = reader.get_batch(index.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise BadSample("decord_error", str(error).splitlines()[0]) from error
    if frames.shape[1:3] != info.size:
        raise BadSample("decord_inexact", f"frames of {frames.shape[1:3]} where the stream has {info.size}")
    return frames if size is None else Fit(info.size, size, fit, box).apply_image(frames)


def _closed_gop_pts(path: str | Path) -> np.ndarray:
    """Return int64 [N] sorted pts. Raises BadSample(`decord_inexact`) if counting from a key frame can be wrong."""
    pts: list[int] = []
    key_pts = None
    with opened(path) as (container, stream, _):
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.pts is None or packet.is_discard:
                raise BadSample("decord_inexact", "packets have no pts, or an edit list hides them")
            if packet.is_keyframe:
                key_pts = packet.pts
            elif key_pts is None or packet.pts < key_pts:
                raise BadSample("decord_inexact", f"open GOP: a frame at pts {packet.pts} is shown before its key")
            pts.append(packet.pts)
    if len(set(pts)) != len(pts):
        raise BadSample("decord_inexact", "two packets have the same pts")
    return np.array(sorted(pts), np.int64)


def _prove(reader: Any, pts: np.ndarray, time_base: tuple[int, int]) -> None:
    if len(reader) != len(pts):
        raise BadSample("decord_inexact", f"decord counts {len(reader)} frames, the stream has {len(pts)}")
    shown_s = reader.get_frame_timestamp(np.arange(len(pts)))[:, 0].astype(np.float64)
    true_s = pts * (time_base[0] / time_base[1])
    # decord's seconds are float32: a tolerance of half the smallest spacing still separates neighbours
    tolerance = np.diff(true_s).min() / 2 if len(pts) > 1 else 1e-3
    if np.abs(shown_s - true_s).max() >= tolerance:
        raise BadSample("decord_inexact", "decord's timestamps differ from the stream's")
