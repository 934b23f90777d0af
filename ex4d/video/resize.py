"""Resize pixels, depth and intrinsics with the same crop, scale and padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ex4d.errors import BadSample, ConfigError

MODES = ("crop", "pad", "squeeze")


@dataclass(frozen=True)
class Fit:
    """A resize of pictures from `source_size` to `size`.

    Args:
        source_size: (H, W) in px.
        size: (H, W) in px.
        mode: "crop" keeps the aspect and crops the longer side, "pad" keeps the aspect and adds
            black bars, both centred; "squeeze" scales the sides independently.
        box: (y, x, height, width) in source px of the part of the source to use, e.g. inside its black bars; None:
            all of it.

    Raises:
        ConfigError: unknown mode, a side below one pixel, or a box outside the source.
    """

    source_size: tuple[int, int]
    size: tuple[int, int]
    mode: str = "crop"
    box: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError("fit", self.mode, f"allowed: {', '.join(MODES)}")
        if min(*self.source_size, *self.size) < 1:
            raise ConfigError("size", (self.source_size, self.size), "both sides of both sizes must be at least 1 px")
        y, x, height, width = self.source_box
        inside = y + height <= self.source_size[0] and x + width <= self.source_size[1]
        if min(y, x) < 0 or min(height, width) < 1 or not inside:
            raise ConfigError("box", self.box, f"[y, x, height, width] within {self.source_size}")

    @property
    def source_box(self) -> tuple[int, int, int, int]:
        """(y, x, height, width) in source px of the part of the source that is used."""
        return self.box or (0, 0, *self.source_size)

    def scaled_to(self, source_size: tuple[int, int]) -> Fit:
        """Return the same fit for a map of the source stored at another resolution; the box is rounded to px."""
        if self.box is None:
            return replace(self, source_size=source_size)
        edges = []
        for axis in (0, 1):
            scale = source_size[axis] / self.source_size[axis]
            start = min(round(self.box[axis] * scale), source_size[axis] - 1)
            edges.append((start, max(1, round((self.box[axis] + self.box[axis + 2]) * scale) - start)))
        (y, height), (x, width) = edges
        return replace(self, source_size=source_size, box=(y, x, height, width))

    @cached_property
    def crop_box(self) -> tuple[int, int, int, int]:
        """(y, x, height, width) in source px of the part that is kept after cropping."""
        (y, x, source_h, source_w), (h, w) = self.source_box, self.size
        if self.mode != "crop":
            return y, x, source_h, source_w
        if source_w * h > w * source_h:
            keep = max(1, _round_div(source_h * w, h))
            return y, x + (source_w - keep) // 2, source_h, keep
        keep = max(1, _round_div(source_w * h, w))
        return y + (source_h - keep) // 2, x, keep, source_w

    @cached_property
    def inner_box(self) -> tuple[int, int, int, int]:
        """(y, x, height, width) in target px of the picture: the whole target unless the mode is "pad"."""
        (_, _, source_h, source_w), (h, w) = self.source_box, self.size
        if self.mode != "pad":
            return 0, 0, h, w
        if source_w * h > w * source_h:
            inner = max(1, _round_div(source_h * w, source_w))
            return (h - inner) // 2, 0, inner, w
        inner = max(1, _round_div(source_w * h, source_h))
        return 0, (w - inner) // 2, h, inner

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Resize uint8 or float [..., h, w, C] to `size`: area filter if neither side grows, else linear.

        Raises:
            BadSample: the picture does not have `source_size`.
        """
        import cv2

        self._check(image.shape[-3:-1])
        (y, x, height, width), (top, left, inner_h, inner_w) = self.crop_box, self.inner_box
        if self.source_size == self.size and self.box is None:
            return image
        shrinks = inner_h <= height and inner_w <= width
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        out = np.zeros((*image.shape[:-3], *self.size, image.shape[-1]), image.dtype)
        for index in np.ndindex(image.shape[:-3]):
            cut = np.ascontiguousarray(image[index][y : y + height, x : x + width])
            if (height, width) != (inner_h, inner_w):
                cut = cv2.resize(cut, (inner_w, inner_h), interpolation=interpolation)
            # cv2 drops a last axis of one channel
            out[index][top : top + inner_h, left : left + inner_w] = cut.reshape(inner_h, inner_w, -1)
        return out

    def apply_depth(self, depth: np.ndarray) -> np.ndarray:
        """Resize depth, disparity or a mask [..., h, w] to `size`, by nearest neighbour.

        Not interpolated, because no surface lies at the mean of a near and a far depth. Bars of "pad" repeat the edge,
        so that they stay finite.

        Raises:
            BadSample: the map does not have `source_size`.
        """
        self._check(depth.shape[-2:])
        rows, columns = self._source_index(0), self._source_index(1)
        return depth[..., rows[:, None], columns[None, :]]

    def apply_K(self, K: Any) -> np.ndarray:
        """Convert intrinsics to px of `size`: float64 [..., 3, 3], pixel centres at +0.5 before and after.

        With that convention a picture's border is at 0 and at its width, so a resize is one scale and one shift.
        """
        (y, x, height, width), (top, left, inner_h, inner_w) = self.crop_box, self.inner_box
        scale_x, scale_y = inner_w / width, inner_h / height
        change = np.array([[scale_x, 0, left - x * scale_x], [0, scale_y, top - y * scale_y], [0, 0, 1]])
        return change @ np.asarray(K, np.float64)

    def _source_index(self, axis: int) -> np.ndarray:
        start, length = self.crop_box[axis], self.crop_box[axis + 2]
        first, inner = self.inner_box[axis], self.inner_box[axis + 2]
        target = np.clip(np.arange(self.size[axis]) - first, 0, inner - 1)
        return start + ((2 * target + 1) * length) // (2 * inner)  # floor((t + 0.5) · length / inner), in integers

    def _check(self, size: tuple[int, ...]) -> None:
        if tuple(size) != tuple(self.source_size):
            raise BadSample("size_mismatch", f"got {tuple(size)} where {tuple(self.source_size)} was expected")


def _round_div(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
