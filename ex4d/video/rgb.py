"""Convert decoded frames to upright RGB pictures of a given size."""

from __future__ import annotations

from typing import Any

import numpy as np

from ex4d.errors import BadSample
from ex4d.video import hdr
from ex4d.video.resize import Fit
from ex4d.video.source import orientation, square_pixel_size


class Converter:
    """Convert decoded frames to upright RGB: square pixels, colour matrix, range, rotation, then the resize."""

    def __init__(
        self,
        size: tuple[int, int] | None,
        fit: str,
        max_height: int | None = None,
        box: tuple[int, int, int, int] | None = None,
    ):
        self.size, self.fit_mode, self.max_height, self.box = size, fit, max_height, box
        self.coded_size: tuple[int, int] | None = None
        self.rotation: int | None = None
        self.upright = (0, False)
        self.fit: Fit | None = None

    def __call__(self, frame: Any, stream: Any) -> np.ndarray:
        """Convert a frame to uint8 [H,W,3] RGB. Raises BadSample(`resolution_changed`, `size_limit`)."""
        coded_size = (frame.height, frame.width)
        if self.coded_size not in (None, coded_size):
            raise BadSample("resolution_changed", f"from {self.coded_size} to {coded_size} at pts {frame.pts}")
        self.coded_size = coded_size
        turn, mirrored = self._orientation(frame)
        image = rgb_of(
            frame, self._decimated(square_pixel_size(frame, stream), turn), draft=self.max_height is not None
        )
        if turn or mirrored:
            image = np.rot90(image, turn)
            image = np.ascontiguousarray(image[:, ::-1] if mirrored else image)
        if self.size is None:
            return image
        if self.fit is None:
            self.fit = Fit(image.shape[:2], self.size, self.fit_mode, self.box)
        return self.fit.apply_image(image)

    def _orientation(self, frame: Any) -> tuple[int, bool]:
        # PyAV's side data and its frame form a reference cycle. Read for every frame, they would keep a hundred frames
        # and more until garbage collection (400 MB at 1080p), so they are read again only if the angle changes.
        if self.rotation != frame.rotation:
            self.rotation, self.upright = frame.rotation, orientation(frame)
        return self.upright

    def _decimated(self, shown_size: tuple[int, int], turn: int) -> tuple[int, int]:
        height = shown_size[turn % 2]
        if self.max_height is None or height <= self.max_height:
            return shown_size
        scale = self.max_height / height
        return max(1, round(shown_size[0] * scale)), max(1, round(shown_size[1] * scale))


def rgb_of(frame: Any, size: tuple[int, int] | None = None, draft: bool = False) -> np.ndarray:
    """Convert a frame to uint8 [H,W,3] RGB, full range, by its tagged matrix and range; HDR is tone-mapped.

    As in players, untagged frames count as limited-range BT.709 from 720 lines or 1280 columns, else BT.601.

    Args:
        size: (H, W) px of the result; None keeps the frame's.
        draft: a fast filter instead of an exact one.
    """
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    matrix = frame.colorspace
    if matrix in (0, 2, 3):  # RGB, unspecified, reserved
        matrix = Colorspace.ITU709 if frame.height >= 720 or frame.width >= 1280 else Colorspace.ITU601
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    height, width = size or (frame.height, frame.width)
    # Without the last two, swscale's fast path darkens every channel by one to two levels (docs/decisions/video.md).
    exact = Interpolation.BILINEAR | Interpolation.BITEXACT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    is_hdr = frame.color_trc in hdr.NAMES
    picture = frame.reformat(
        width=width,
        height=height,
        format="gbrp16le" if is_hdr else "rgb24",  # not rgb48le: with FULL_CHR_H_INT swscale mixes up its channels
        src_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.FAST_BILINEAR if draft else exact,
        threads=1,
    ).to_ndarray()
    return hdr.to_sdr(picture, frame.color_trc) if is_hdr else picture
