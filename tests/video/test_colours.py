"""Colours by matrix, range and depth; upright pictures with square pixels, as a player shows them."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from ex4d import video


def flat_yuv(colour, matrix: str, full: bool, depth: int) -> list[int]:
    """Return (Y, Cb, Cr) of an RGB colour by the formulas of ITU-R BT.601 / BT.709."""
    kr, kb = {"601": (0.299, 0.114), "709": (0.2126, 0.0722)}[matrix]
    r, g, b = (value / 255 for value in colour)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    scale = 2 ** (depth - 8)
    if full:
        top = 2**depth - 1
        return [min(top, round(value)) for value in (top * y, 128 * scale + top * cb, 128 * scale + top * cr)]
    return [round(scale * (16 + 219 * y)), round(scale * (128 + 224 * cb)), round(scale * (128 + 224 * cr))]


@pytest.mark.parametrize(
    ("matrix", "tag", "full", "pix_fmt", "size"),
    [
        ("601", 2, False, "yuv420p", (64, 64)),  # untagged and small
        ("709", 2, False, "yuv420p", (720, 64)),  # untagged and high
        ("601", 6, False, "yuv420p", (720, 64)),
        ("709", 1, False, "yuv420p", (64, 64)),
        ("709", 1, True, "yuv420p", (64, 64)),
        ("709", 1, False, "yuv420p10le", (64, 64)),
        ("709", 1, True, "yuv444p", (64, 64)),
    ],
)
def test_colours_follow_matrix_range_and_depth(matrix, tag, full, pix_fmt, size):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 220, 10), (128, 128, 128), (20, 90, 160), (0, 0, 0)]
    dtype, depth = (np.uint16, 10) if pix_fmt.endswith("10le") else (np.uint8, 8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, 2 if full else 1
        for index, colour in enumerate(colours):
            frame = av.VideoFrame(size[1], size[0], pix_fmt)
            for plane, value in zip(frame.planes, flat_yuv(colour, matrix, full, depth), strict=True):
                plane.update(np.full(plane.buffer_size // np.dtype(dtype).itemsize, value, dtype).tobytes())
            frame.colorspace, frame.color_range = tag, 2 if full else 1
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    images = video.decode(data, video.frame_pts(data)[0])
    error = np.abs(images.astype(int) - np.array(colours)[:, None, None])
    assert error.max() <= 2


UPRIGHT = np.zeros((64, 96, 3), np.uint8)
UPRIGHT[:32, :48], UPRIGHT[:32, 48:], UPRIGHT[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_rotated_or_mirrored_video_is_seen_as_a_viewer_shows_it(degrees, hflip, tmp_path):
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0", "threads": "1"})
        stream.height, stream.width = UPRIGHT.shape[:2]
        stream.set_display_rotation(degrees, hflip=hflip)
        frame = av.VideoFrame.from_ndarray(UPRIGHT, format="rgb24").reformat(format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    info = video.probe(path)
    expected = np.rot90(UPRIGHT, degrees // 90)  # counter-clockwise, and then the mirror
    expected = expected[:, ::-1] if hflip else expected
    image = video.decode(path, video.frame_pts(path)[0])[0]
    assert info.size == image.shape[:2] == expected.shape[:2]
    assert np.abs(image.astype(int) - expected).mean() < 6
    assert info.mirrored == hflip


def test_rotated_media_look_as_opencv_shows_them(media):
    for name in ("video_0", "video_90", "video_180", "video_270"):
        path = media / "decord_rotation" / f"{name}.mov"
        seen, picture = cv2.VideoCapture(str(path)).read()
        image = video.decode(path, video.frame_pts(path)[0][:1])[0]
        assert seen
        assert image.shape == picture.shape
        assert np.abs(image.astype(int) - picture[..., ::-1]).mean() < 4


def test_stretched_pixels_become_square(tmp_path):
    path = tmp_path / "anamorphic.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"threads": "1"})
        stream.height, stream.width = UPRIGHT.shape[:2]
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(UPRIGHT, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    info = video.probe(path)
    assert (info.size, info.coded_size) == ((64, 128), (64, 96))
    assert "non_square_pixels" in info.notes
    assert video.decode(path, video.frame_pts(path)[0]).shape == (1, 64, 128, 3)
