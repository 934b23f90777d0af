"""Files that this project writes: equal bytes, the right colours, complete or absent; and the single resize."""

from __future__ import annotations

import gc

import av
import numpy as np
import pytest

from ex4d import video
from ex4d.errors import BadSample, ConfigError
from ex4d.video.source import opened


def reason_of(call, *args, **kwargs) -> str:
    with pytest.raises(BadSample) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def saturated(num_frames: int = 6) -> np.ndarray:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]
    return np.stack([np.full((64, 96, 3), colours[i % 6], np.uint8) for i in range(num_frames)])


def test_encoded_bytes_repeat_and_colours_come_back():
    data = video.encode(saturated(), 30000 / 1001)
    assert data == video.encode(saturated(), 30000 / 1001)
    back, fps = video.read(data)
    assert np.abs(back.astype(int) - saturated()).max() <= 2  # the BT.601 matrix under a BT.709 tag is off by 30
    assert fps == pytest.approx(30000 / 1001, abs=1e-9)
    with opened(data) as (container, stream, _):
        context = stream.codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        assert context.pix_fmt == "yuv420p"
        assert "creation_time" not in container.metadata
    assert data.index(b"moov") < data.index(b"mdat")


def test_lossless_files_give_back_every_bit():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (3, 31, 33)).astype(np.uint8)
    for frames in (grey, grey.astype(np.uint16) * 257 + 1, rng.integers(0, 256, (3, 31, 33, 3)).astype(np.uint8)):
        data = video.encode(frames, 10, lossless=True)
        assert data == video.encode(frames, 10, lossless=True)
        back, _ = video.read(data)
        assert back.dtype == frames.dtype
        np.testing.assert_array_equal(back, frames)


def test_frames_are_let_go_without_the_garbage_collector():
    """PyAV's side data and their frame form a reference cycle: at 1080p, frames awaiting collection took 700 MB."""

    def num_alive() -> int:
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    data = video.encode(saturated(60), 10)
    gc.collect()
    gc.disable()
    try:
        before = num_alive()
        assert max(num_alive() - before for _ in video.iter_decimated(data)) <= 10  # a packet may give several
    finally:
        gc.enable()


def test_write_is_whole_or_not_there(tmp_path):
    video.write(tmp_path / "a" / "clip.mp4", saturated(), 10)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["clip.mp4"]
    assert video.read(tmp_path / "a" / "clip.mp4")[0].shape == (6, 64, 96, 3)


@pytest.mark.parametrize("frames", [np.zeros((1, 63, 64, 3), np.uint8), np.zeros((1, 64, 64)), np.zeros((0, 4, 4, 3))])
def test_frames_that_cannot_be_encoded_are_refused(frames):
    with pytest.raises(ConfigError, match="frames"):
        video.encode(frames, 10)


@pytest.mark.parametrize("mode", ["crop", "pad", "squeeze"])
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (90, 90), (200, 120)])
def test_image_depth_and_intrinsics_are_resized_alike(mode, size):
    """A picture of its own coordinates: what lands at a target pixel is what K says."""
    source = (60, 100)
    fit = video.Fit(source, size, mode)
    y, x = np.mgrid[0 : source[0], 0 : source[1]] + 0.5
    image = fit.apply_image(np.stack([x, y, x], -1).astype(np.float32))
    change = fit.apply_K(np.eye(3))
    top, left, height, width = fit.inner_box
    rows, columns = np.mgrid[top : top + height, left : left + width] + 0.5
    target = np.stack([columns, rows, np.ones_like(rows)], -1)
    expected = np.linalg.solve(change, target[..., None])[..., 0]
    inner = np.s_[top + 2 : top + height - 2, left + 2 : left + width - 2]
    cut = np.s_[2:-2, 2:-2]
    assert np.abs(image[inner][..., :2] - expected[cut][..., :2]).max() < 0.51
    depth_x, depth_y = fit.apply_depth(x), fit.apply_depth(y)
    assert np.abs(depth_x[inner] - expected[cut][..., 0]).max() <= 0.51
    assert np.abs(depth_y[inner] - expected[cut][..., 1]).max() <= 0.51
    assert image.shape[:2] == depth_x.shape == size


def test_fit_refuses_other_sizes_and_modes():
    with pytest.raises(ConfigError, match="fit"):
        video.Fit((4, 4), (2, 2), "stretch")
    assert reason_of(video.Fit((4, 4), (2, 2)).apply_depth, np.zeros((5, 4))) == "size_mismatch"
