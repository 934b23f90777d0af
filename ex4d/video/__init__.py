"""Videos in and out: probe, decode by pts, encode. The only gate to PyAV and decord.

Pipelines decode in a child process (`ex4d.isolation`), since a decoder may crash.
"""

from __future__ import annotations

from ex4d.video.audio import with_audio
from ex4d.video.encoder import encode, read, write
from ex4d.video.frames import decode, frame_pts, frame_pts_by_decoding, iter_decimated
from ex4d.video.resize import Fit
from ex4d.video.source import VideoInfo, missing_decoders, probe

__all__ = [
    "Fit",
    "VideoInfo",
    "decode",
    "encode",
    "frame_pts",
    "frame_pts_by_decoding",
    "iter_decimated",
    "missing_decoders",
    "probe",
    "read",
    "with_audio",
    "write",
]
