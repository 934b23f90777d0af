"""Make clips whose every frame shows its own number, in every codec that the installed FFmpeg can write."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

os.environ.setdefault("SVT_LOG", "1")  # errors only

NUM_BITS, BLOCK_PX = 12, 16
SIZE = (64, NUM_BITS * BLOCK_PX)


@dataclass(frozen=True)
class Recipe:
    """Encoding of a bar-coded clip: 25 frames per second, or gaps of 1–12 such steps if `variable`."""

    codec: str
    suffix: str
    options: dict[str, str] = field(default_factory=dict)
    mux: dict[str, str] = field(default_factory=dict)
    variable: bool = False


X265 = "log-level=none:pools=1:frame-threads=1"
VP9 = {"g": "30", "deadline": "realtime", "cpu-used": "8"}
RECIPES = {
    "h264": Recipe("libx264", ".mp4", {"g": "30", "threads": "1"}),
    "h264_open_gop": Recipe("libx264", ".mp4", {"x264-params": "open-gop=1:keyint=20:threads=1:bframes=3"}),
    "h264_no_index": Recipe("libx264", ".mkv", {"g": "30", "threads": "1"}, {"live": "1"}),
    "h264_ts": Recipe("libx264", ".ts", {"g": "30", "threads": "1"}),
    "h264_fragments": Recipe("libx264", ".mp4", {"g": "30", "threads": "1"}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264_vfr": Recipe("libx264", ".mp4", {"g": "30", "threads": "1"}, variable=True),
    "hevc_open_gop": Recipe(
        "libx265", ".mp4", {"preset": "veryfast", "x265-params": f"{X265}:keyint=20:min-keyint=20"}
    ),
    "hevc_keyint_60": Recipe("libx265", ".mkv", {"preset": "veryfast", "x265-params": f"{X265}:keyint=60"}),
    "hevc_closed_gop": Recipe("libx265", ".mp4", {"preset": "veryfast", "x265-params": f"{X265}:keyint=30:open-gop=0"}),
    "vp9": Recipe(
        "libvpx-vp9",
        ".webm",
        {"g": "30", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "16", "auto-alt-ref": "1", "b": "500k"},
    ),
    "vp9_vfr": Recipe("libvpx-vp9", ".webm", {"g": "30", "deadline": "realtime", "cpu-used": "8"}, variable=True),
    "av1": Recipe("libsvtav1", ".mkv", {"preset": "12", "g": "30", "svtav1-params": "lp=1:pin=0"}),
    "av1_mp4": Recipe("libsvtav1", ".mp4", {"preset": "12", "g": "30", "svtav1-params": "lp=1:pin=0"}),
    "mpeg4_avi": Recipe("mpeg4", ".avi", {"g": "12", "bf": "2", "b": "2M"}),
}


def frame_of(number: int) -> np.ndarray:
    """Return uint8 [64, 192, 3]: the number's bits as black and white blocks above a drifting texture."""
    bits = (number >> np.arange(NUM_BITS)) & 1
    code = np.repeat(bits * 255, BLOCK_PX)[None].repeat(32, 0)
    y, x = np.mgrid[0:32, 0 : SIZE[1]]
    texture = 127 + 100 * np.sin((x + 3 * number) / 9) * np.cos((y - number) / 5)
    return np.concatenate([code, texture])[..., None].repeat(3, 2).astype(np.uint8)


def number_of(image: np.ndarray) -> int:
    """Return the number in a picture of frame_of's size."""
    means = image[8:24].mean((0, 2)).reshape(NUM_BITS, BLOCK_PX)[:, 4:12].mean(1)
    return int(((means > 127) << np.arange(NUM_BITS)).sum())


def write(path: Path, recipe: Recipe, num_frames: int = 96, seed: int = 0) -> Path:
    """Write frames 0 … num_frames − 1 and return the path."""
    rng = np.random.default_rng(seed)
    gaps = rng.integers(1, 13, num_frames) if recipe.variable else np.full(num_frames, 1)
    times = np.cumsum(gaps) - gaps[0]
    with av.open(str(path), "w", options=recipe.mux) as container:
        stream = container.add_stream(recipe.codec, rate=25, options=recipe.options)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(frame_of(number), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = int(time), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
