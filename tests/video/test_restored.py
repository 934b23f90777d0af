"""HDR becomes what an SDR display shows, interlaced frames show one moment each, and damage stays local."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from ex4d import video
from ex4d.errors import BadSample
from ex4d.video import hdr
from ex4d.video.frames import iter_decimated

SIZE = (64, 96)


def scene(moment: float) -> np.ndarray:
    """Return a smooth coloured picture, uint8 [H,W,3], that moves sideways."""
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]] / 16.0
    waves = [np.sin(x - moment), np.cos(y + 0.5 * x - moment), np.sin(0.7 * y + 2)]
    return np.rint(128 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)


TO_2020 = np.linalg.inv(hdr.TO_709.astype(np.float64))


def coded(picture: np.ndarray, transfer: int) -> np.ndarray:
    """Return uint16 [H,W,3]: an SDR picture as BT.2020 in PQ or HLG, its white at 203 cd/m²."""
    light = np.clip((picture / 255.0) ** 2.4 @ TO_2020.T, 0, None) * hdr.WHITE
    if transfer == hdr.PQ:
        return np.rint(65535 * hdr.pq_of(light)).astype(np.uint16)
    shown = light / hdr.PEAK  # of the display; the scene's light has its luma to 1 / 1.2
    luma = np.maximum(shown @ hdr.LUMA_2020, 1e-9)[..., None]
    scene_light = shown * luma ** (1 / hdr.HLG_GAMMA - 1)
    codes = np.linspace(0, 1, 65536)
    return np.rint(65535 * np.interp(scene_light, hdr.light_of_hlg(codes), codes)).astype(np.uint16)


def write_hdr(path: Path, pictures: list[np.ndarray], transfer: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, 9, 1
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(coded(picture, transfer), format="rgb48le")
            frame = frame.reformat(
                format="yuv420p10le", dst_colorspace=9, src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_hdr_is_tone_mapped(tmp_path, transfer):
    path = tmp_path / "hdr.mp4"
    write_hdr(path, [scene(t / 5) for t in range(5)], transfer)
    assert f"hdr_{hdr.NAMES[transfer]}" in video.probe(path).notes
    pts, _ = video.frame_pts(path)
    shown = video.decode(path, pts).astype(np.float64)
    true = np.stack([scene(t / 5) for t in range(5)]).astype(np.float64)
    middle = true < 150  # up to 87 cd/m² nothing is compressed
    assert np.abs(shown - true)[middle].mean() < 3
    assert np.abs(shown - true).mean() < 8
    assert shown.std() > 0.9 * true.std()  # flat before: codes taken as they were
    small = np.stack([image for _, image in iter_decimated(path, max_height=32)])
    assert np.abs(small.mean(axis=(0, 1, 2)) - shown.mean(axis=(0, 1, 2))).max() < 4


def test_the_curve_is_that_of_bt_2390():
    for light in (0.0, 0.1, 10.0, 80.0):
        assert hdr.light_of_pq(hdr.eetf(hdr.pq_of(light))) == pytest.approx(light, abs=1e-4)
    out = hdr.light_of_pq(hdr.eetf(hdr.pq_of(np.linspace(0, 10000, 2000))))
    assert (np.diff(out) >= -1e-9).all()
    assert out.max() == pytest.approx(hdr.WHITE, rel=1e-6)
    assert hdr.pq_of(np.array(100.0)) == pytest.approx(0.508, abs=1e-3)  # BT.2100's own examples
    assert hdr.light_of_hlg(np.array([0.5, 1.0])) == pytest.approx([1 / 12, 1.0], abs=1e-6)


def test_the_table_is_the_formula():
    codes = np.random.default_rng(0).integers(0, 65536, (300, 7, 3)).astype(np.uint16)
    light = hdr.light_of_pq(codes / 65535)
    brightest = light.max(axis=-1, keepdims=True)
    scaled = light * hdr.light_of_pq(hdr.eetf(hdr.pq_of(brightest))) / np.maximum(brightest, 1e-12) / hdr.WHITE
    slow = np.rint(255 * np.clip(scaled @ hdr.TO_709.T, 0, 1) ** (1 / 2.4))
    assert np.abs(hdr.to_sdr(codes, hdr.PQ) - slow).max() <= 1


def grey(moment: float) -> np.ndarray:
    """Return `scene` without colours, which 4:2:0 mixes between the fields."""
    return np.repeat(scene(moment)[..., :1], 3, axis=-1)


def write_interlaced(path: Path, count: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1", "x264-params": "bff=1:keyint=8"})
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            woven = grey(0.6 * number)
            woven[::2] = grey(0.6 * number + 0.3)[::2]  # the upper field is half a frame later
            container.mux(stream.encode(av.VideoFrame.from_ndarray(woven, format="rgb24")))
        container.mux(stream.encode(None))


def test_interlaced_frames_become_one_moment(tmp_path):
    path = tmp_path / "i.mp4"
    write_interlaced(path, 20)
    assert "interlaced" in video.probe(path).notes
    pts, _ = video.frame_pts(path)
    shown = video.decode(path, pts).astype(np.float64)
    true = np.stack([grey(0.6 * number) for number in range(20)]).astype(np.float64)
    woven = true.copy()
    for number in range(20):
        woven[number, ::2] = grey(0.6 * number + 0.3)[::2]
    assert np.abs(shown - true).mean() < 0.5 * np.abs(woven - true).mean()
    # any frame alone, and any part, are those of the whole
    for part in ([0], [7], [8], [9], [19], [3, 12], list(range(6, 11))):
        np.testing.assert_array_equal(video.decode(path, pts[part]), shown[part].astype(np.uint8))


def test_progressive_frames_are_as_they_were(tmp_path):
    frames = np.stack([scene(t / 3) for t in range(6)])
    video.write(tmp_path / "p.mp4", frames, 25)
    pts, _ = video.frame_pts(tmp_path / "p.mp4")
    own, _ = video.read(tmp_path / "p.mp4")
    np.testing.assert_array_equal(video.decode(tmp_path / "p.mp4", pts), own)


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Return an AVI of 40 frames, a key frame every ten, with frame 14 damaged."""
    path = tmp_path / "whole.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25), options={"g": "10", "bf": "0", "qscale": "3"})
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        packets = []
        for number in range(40):
            noise = np.random.default_rng(number).integers(-20, 20, (*SIZE, 3))
            picture = np.clip(scene(number / 4) + noise, 0, 255).astype(np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode(None)
        torn = bytes(packets[14])
        container.mux(packets)
    data = bytearray(path.read_bytes())
    at = data.find(torn)
    assert at > 0
    data[at + 60 : at + len(torn)] = np.random.default_rng(1).bytes(len(torn) - 60)
    (tmp_path / "torn.avi").write_bytes(data)
    return tmp_path / "torn.avi"


def test_damage_costs_the_frames_up_to_the_next_key_frame(damaged):
    pts, _ = video.frame_pts(damaged)
    assert len(pts) == 40
    for value in pts[14:20]:
        with pytest.raises(BadSample, match="decode_corrupt"):
            video.decode(damaged, [value])
    whole = [*range(14), *range(20, 40)]
    assert len(video.decode(damaged, pts[whole])) == 34
    with pytest.raises(BadSample, match="decode_corrupt"):
        video.decode(damaged, pts)
    assert len(list(iter_decimated(damaged))) == 40  # cuts are looked for in all of it
