"""Encode and decode our own files: deterministic bytes, tagged colours, written atomically."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import storage
from ex4d.errors import BadSample, ConfigError
from ex4d.video.frames import decoded
from ex4d.video.rgb import rgb_of
from ex4d.video.source import opened

# H.273 code points: BT.709 primaries, transfer and matrix are all 1; 1 is limited ("MPEG") range
_BT709, _LIMITED = 1, 1


def encode(frames: np.ndarray, fps: float | Fraction, crf: int = 12, lossless: bool = False) -> bytes:
    """Encode frames to a video file's bytes, deterministically: one encoder thread, no dates, index first.

    Args:
        frames: uint8 [T,H,W,3] RGB. With `lossless` also uint8 or uint16 [T,H,W].
        fps: frames per second; a float becomes the nearest fraction with a denominator up to 1001.
        crf: x264's quality, 0–51, smaller is better.
        lossless: FFV1 in Matroska instead of H.264 in mp4; `read` returns the same frames bit for bit.

    H.264 is yuv420p, limited range, converted with the BT.709 matrix and tagged so.

    Raises:
        ConfigError: a shape, dtype, rate or crf that cannot be encoded.
    """
    rate = Fraction(fps).limit_denominator(1001)
    _check(frames, rate, crf, lossless)
    suffix = ".mkv" if lossless else ".mp4"
    # To write the index first, the muxer rereads its own file, so it needs a file on disk.
    with tempfile.TemporaryDirectory(prefix="ex4d-encode-") as folder:
        path = Path(folder) / f"video{suffix}"
        _encode_to(path, frames, rate, crf, lossless)
        return path.read_bytes()


def _check(frames: np.ndarray, rate: Fraction, crf: int, lossless: bool) -> None:
    is_rgb = frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == np.uint8
    is_grey = frames.ndim == 3 and frames.dtype in (np.uint8, np.uint16)
    if not (is_rgb or (is_grey and lossless)) or 0 in frames.shape:
        allowed = "uint8 [T,H,W,3]; lossless also uint8 or uint16 [T,H,W]"
        raise ConfigError("frames", f"{frames.dtype} {list(frames.shape)}", allowed)
    if not lossless and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise ConfigError("frames", list(frames.shape), "H and W must be even for H.264 yuv420p")
    if rate <= 0 or not 0 <= crf <= 51:
        raise ConfigError("fps, crf", (str(rate), crf), "fps above 0, crf 0 to 51")


def _encode_to(path: Path, frames: np.ndarray, rate: Fraction, crf: int, lossless: bool) -> None:
    import av

    options = {"fflags": "+bitexact"} | ({} if lossless else {"movflags": "+faststart"})
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream("ffv1" if lossless else "libx264", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        context = stream.codec_context
        context.thread_count = 1
        context.flags |= av.codec.context.Flags.bitexact
        if lossless:
            context.pix_fmt = "bgr0" if frames.ndim == 4 else ("gray" if frames.dtype == np.uint8 else "gray16le")
            context.options = {"level": "3", "slices": "4", "slicecrc": "1"}
        else:
            context.pix_fmt = "yuv420p"
            # x264's macroblock tree reads uninitialised memory if the width is not a multiple of 128 (seen with its
            # AVX-512 code: 96 x 96 gave other bytes in 50 of 80 runs); without it, the bytes are the same.
            context.options = {"crf": str(crf), "preset": "medium", "threads": "1", "mbtree": "0"}
            context.color_primaries = context.color_trc = context.colorspace = _BT709
            context.color_range = _LIMITED
        for index, image in enumerate(frames):
            frame = _to_frame(np.ascontiguousarray(image), context.pix_fmt)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _to_frame(image: np.ndarray, pix_fmt: str) -> Any:
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    if image.ndim == 2:
        return av.VideoFrame.from_ndarray(image, format=pix_fmt)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    if pix_fmt == "bgr0":
        return frame.reformat(format=pix_fmt, threads=1)
    # swscale's default is BT.601, whatever the tags say: the matrix must be named
    return frame.reformat(
        format=pix_fmt,
        src_color_range=ColorRange.JPEG,
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.BITEXACT | Interpolation.ACCURATE_RND,
        threads=1,
    )


def write(path: str | Path, frames: np.ndarray, fps: float | Fraction, crf: int = 12, lossless: bool = False) -> None:
    """Write `encode`'s bytes to a path or URL, atomically."""
    storage.write_bytes(path, encode(frames, fps, crf, lossless))


MAX_READ_BYTES = 2 * 2**30  # of all decoded frames: 2730 of 512 × 512; a file of 61 kB may hold more


def read(
    source: str | Path | bytes, into: np.ndarray | None = None, limit: tuple[int, int, int] | None = None
) -> tuple[np.ndarray, float]:
    """Read (frames, fps) of a file made by `encode`: all frames, uint8 [T,H,W,3] RGB, or grey uint8 or uint16 [T,H,W].

    Args:
        into: an array of the frames' shape and dtype, to which they are written and which is returned.
        limit: largest number of frames, H and W; MAX_READ_BYTES limits the total in any case.

    Raises:
        BadSample: the file does not decode completely, or its frames exceed a limit or do not fit `into`.
    """
    if not isinstance(source, bytes):
        source = storage.read_bytes(source)
    images, count = [], 0
    with opened(source) as (container, stream, _):
        fps = float(stream.average_rate or 0)
        for count, frame in enumerate(decoded(container, stream), start=1):
            grey = frame.format.name.startswith("gray")
            too_many = count * frame.height * frame.width * 3 > MAX_READ_BYTES
            if too_many or (limit and (count > limit[0] or frame.height > limit[1] or frame.width > limit[2])):
                shape_text = f"frame {count} of {frame.height} x {frame.width}"
                raise BadSample("other_frames", f"{shape_text} where {limit or f'{MAX_READ_BYTES} bytes'} are the most")
            image = frame.to_ndarray() if grey else rgb_of(frame)
            if into is None:
                images.append(image)
            elif count > len(into) or image.shape != into.shape[1:]:
                raise BadSample("other_frames", f"frame {count} of {[*image.shape]} where {[*into.shape]} are expected")
            else:
                into[count - 1] = image
    if not count:
        raise BadSample("no_frames", "the video stream has no frame that decodes")
    if into is not None and count < len(into):
        raise BadSample("other_frames", f"{count} frames where {len(into)} are expected")
    return np.stack(images) if into is None else into, fps
