"""Read and write videos: probe, decode by pts, encode. The only gate to PyAV and decord.

Pipelines decode in a child process (`ex4d.isolation`), because a decoder may crash.
"""

from __future__ import annotations

from ex4d.video.audio import with_audio as with_audio
from ex4d.video.encoder import encode as encode
from ex4d.video.encoder import read as read
from ex4d.video.encoder import write as write
from ex4d.video.frames import decode as decode
from ex4d.video.frames import frame_pts as frame_pts
from ex4d.video.frames import frame_pts_by_decoding as frame_pts_by_decoding
from ex4d.video.frames import iter_decimated as iter_decimated
from ex4d.video.resize import Fit as Fit
from ex4d.video.source import VideoInfo as VideoInfo
from ex4d.video.source import missing_decoders as missing_decoders
from ex4d.video.source import probe as probe
