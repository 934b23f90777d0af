"""One crop box for pixels, depth and intrinsics: a point keeps its colour, its depth and its ray, in every mode."""

from __future__ import annotations

import numpy as np
import pytest

from ex4d.depth import DepthRequest, sidecar
from ex4d.errors import ConfigError
from ex4d.video import Fit

BOX = (30, 16, 180, 288)  # y, x, height, width in a source of 240 × 320


@pytest.mark.parametrize("mode", ["crop", "pad", "squeeze"])
def test_a_box_is_the_fit_of_the_picture_cut_out_before(mode):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (240, 320, 3), dtype=np.uint8)
    depth = rng.random((240, 320)).astype(np.float32)
    y, x, height, width = BOX
    K = np.array([[300.0, 0, 160], [0, 310.0, 120], [0, 0, 1]])
    cut_K = K - np.array([[0, 0, x], [0, 0, y], [0, 0, 0]])
    boxed, plain = Fit((240, 320), (96, 96), mode, BOX), Fit((height, width), (96, 96), mode)
    cut = (slice(y, y + height), slice(x, x + width))
    assert (boxed.apply_image(image) == plain.apply_image(image[cut])).all()
    assert (boxed.apply_depth(depth) == plain.apply_depth(depth[cut])).all()
    assert np.allclose(boxed.apply_K(K), plain.apply_K(cut_K))


@pytest.mark.parametrize("mode", ["crop", "pad", "squeeze"])
@pytest.mark.parametrize("stored", [(240, 320), (120, 160), (70, 94)])
def test_stored_depth_and_intrinsics_follow_the_box(tmp_path, mode, stored):
    """A ramp of depth says from which column of the source each pixel's depth came; K says it of its ray."""
    columns = (np.arange(stored[1]) + 0.5) * (320 / stored[1])
    K = np.diag([stored[1] / 320, stored[0] / 240, 1]) @ np.array([[300.0, 0, 160], [0, 300.0, 120], [0, 0, 1]])
    z_depth = np.tile(columns.astype(np.float32), (2, stored[0], 1))
    np.savez(tmp_path / "clip.depth.npz", z_depth=z_depth, K=K)
    fit = Fit((240, 320), (96, 96), mode, BOX)
    request = DepthRequest(video_path=str(tmp_path / "clip.mp4"), fit=fit)
    found = sidecar.estimate(np.zeros((2, 96, 96, 3), np.uint8), request)
    top, left, inner_h, inner_w = fit.inner_box
    u = np.arange(left, left + inner_w) + 0.5
    by_ray = ((u - found.K[0, 2]) / found.K[0, 0]) * 300 + 160
    by_depth = found.values[0, top + inner_h // 2, left : left + inner_w]
    assert np.abs(by_ray - by_depth).max() <= 1.5 * 320 / stored[1]


def test_a_box_outside_the_source_is_refused():
    for box in ((0, 0, 241, 10), (-1, 0, 10, 10), (0, 0, 0, 10), (100, 300, 10, 21)):
        with pytest.raises(ConfigError, match="box"):
            Fit((240, 320), (96, 96), "crop", box)
