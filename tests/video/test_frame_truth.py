"""Every frame is the requested one: clips whose frames show their own number, in every available codec."""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction
from pathlib import Path

import av
import barcode
import numpy as np
import pytest

from ex4d import video
from ex4d.errors import BadSample
from ex4d.video import frames as frames_module


def reason_of(call, *args, **kwargs) -> str:
    with pytest.raises(BadSample) as caught:
        call(*args, **kwargs)
    return caught.value.reason


@pytest.fixture(scope="module", params=sorted(barcode.RECIPES))
def clip(request, tmp_path_factory) -> Path:
    recipe = barcode.RECIPES[request.param]
    if recipe.codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {recipe.codec}")
    return barcode.write(tmp_path_factory.mktemp("clips") / (request.param + recipe.suffix), recipe)


class TestFrameTruth:
    def test_pts_by_demuxing_are_those_by_decoding(self, clip):
        fast, slow = video.frame_pts(clip), video.frame_pts_by_decoding(clip)
        np.testing.assert_array_equal(fast[0], slow[0])
        assert fast[1] == slow[1]
        assert len(fast[0]) == 96

    def test_every_frame_is_the_one_asked_for(self, clip):
        pts, _ = video.frame_pts(clip)
        together = video.decode(clip, pts)
        assert [barcode.number_of(image) for image in together] == list(range(96))
        for number in np.random.default_rng(0).permutation(96):
            alone = video.decode(clip, [pts[number]])[0]
            np.testing.assert_array_equal(alone, together[number])

    def test_order_repeats_and_a_frame_that_is_not_there(self, clip):
        pts, _ = video.frame_pts(clip)
        images = video.decode(clip, pts[[70, 3, 3, 41]])
        assert [barcode.number_of(image) for image in images] == [70, 3, 3, 41]
        absent = int(pts[-1]) + 10**6
        assert reason_of(video.decode, clip, [pts[5], absent]) == "decode_short"

    def test_decimated_frames_carry_their_pts(self, clip):
        pts, _ = video.frame_pts(clip)
        found = list(video.iter_decimated(clip, max_height=32, stride=5))
        assert [value for value, _ in found] == pts[::5].tolist()
        assert found[0][1].shape == (32, 96, 3)

    def test_decord_is_exact_or_refused(self, clip):
        pytest.importorskip("decord")
        pts, _ = video.frame_pts(clip)
        for number in np.random.default_rng(1).permutation(96)[:12]:
            try:
                image = video.decode(clip, [pts[number]], backend="decord")[0]
            except BadSample as error:
                if error.reason not in ("decord_inexact", "decord_error"):
                    raise
                return
            assert barcode.number_of(image) == number


@pytest.mark.parametrize("name", ["hevc_open_gop", "hevc_keyint_60", "h264_open_gop", "h264_ts", "mpeg4_avi"])
def test_decord_gives_other_frames_and_the_guard_refuses_those_videos(name, tmp_path):
    """x265's defaults are open GOPs; measured wrong of 32 by seeking: 8, 2, 3, all 32, 28."""
    decord = pytest.importorskip("decord")
    recipe = barcode.RECIPES[name]
    clip = barcode.write(tmp_path / f"clip{recipe.suffix}", recipe)
    asked = range(0, 96, 3)
    given = [barcode.number_of(decord.VideoReader(str(clip), num_threads=1)[number].asnumpy()) for number in asked]
    assert given != list(asked)
    pts, _ = video.frame_pts(clip)
    assert reason_of(video.decode, clip, pts[:1], backend="decord") == "decord_inexact"
    right = video.decode(clip, pts[::3])
    assert [barcode.number_of(image) for image in right] == list(asked)


def test_a_late_frame_is_reached_by_seeking(tmp_path, monkeypatch):
    clip = barcode.write(tmp_path / "clip.mp4", barcode.RECIPES["h264"])
    seen = []
    real = frames_module.decoded

    def counting(container, stream, wanted=None):
        for frame in real(container, stream):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(frames_module, "decoded", counting)
    pts, _ = video.frame_pts(clip)
    assert barcode.number_of(video.decode(clip, pts[-1:])[0]) == 95
    assert len(seen) <= 30


def test_frames_that_an_edit_list_hides_are_not_there(tmp_path):
    whole = barcode.write(tmp_path / "whole.mp4", barcode.RECIPES["h264"])
    cut = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is None:
                continue
            shift = int(10 / 25 / stream.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            target.mux(packet)
    pts, _ = video.frame_pts(cut)
    np.testing.assert_array_equal(pts, video.frame_pts_by_decoding(cut)[0])
    numbers = [barcode.number_of(image) for image in video.decode(cut, pts)]
    assert numbers == list(range(96 - len(pts), 96))
    assert len(pts) < 96


def test_a_resolution_that_changes_is_refused(tmp_path):
    parts = []
    for size in ((64, 96), (96, 64)):
        with (buffer := io.BytesIO()), av.open(buffer, "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=25, options={"threads": "1", "g": "5"})
            stream.height, stream.width = size
            for index in range(20):
                frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 9 * index, np.uint8), format="rgb24")
                frame.pts = index + 20 * len(parts)
                frame.time_base = Fraction(1, 25)
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
            container.mux(stream.encode(None))
            container.close()
            parts.append(buffer.getvalue())
    path = tmp_path / "changes.ts"
    path.write_bytes(b"".join(parts))
    pts, _ = video.frame_pts(path)
    assert reason_of(video.decode, path, pts) == "resolution_changed"


def test_pts_of_real_codecs_by_both_ways(media):
    for name in ("torchcodec_vfr/var_fps_video.mp4", "mp4ff_edge/examples/resegmenter/testdata/outV300.mp4",
                 "intel_static/asl_gestures/brother.mkv", "decord_broken/unordered.mov",
                 "pyscenedetect_cuts/delayed_start.mp4", *[f"torchcodec_codecs/{p.name}" for p in
                 sorted((media / "torchcodec_codecs").glob("*.m*"))]):  # fmt: skip
        np.testing.assert_array_equal(video.frame_pts(media / name)[0], video.frame_pts_by_decoding(media / name)[0])


def test_what_probe_says_of_real_media(media):
    nasa = video.probe(media / "torchcodec_nasa" / "nasa_13013.mp4")
    assert (nasa.num_video_streams, nasa.stream_index, nasa.size) == (2, 3, (270, 480))
    flower = video.probe(media / "ex4d_flower" / "input.mp4")
    assert dataclasses.asdict(flower)["fps"] == 30.0
    assert flower.notes == ()
    assert video.probe(media / "torchcodec_codecs" / "h264_10bits.mp4").pix_fmt == "yuv420p10le"
    pts, time_base = video.frame_pts(media / "torchcodec_vfr" / "var_fps_video.mp4")
    gaps = np.diff(pts) * float(time_base)
    assert gaps.min() < 0.04
    assert gaps.max() > 0.5


def test_an_animated_png_is_a_video_and_a_still_one_is_not(tmp_path):
    from PIL import Image

    pictures = [Image.fromarray(np.full((40, 60, 3), (10 * index, 100, 200), np.uint8)) for index in range(8)]
    pictures[0].save(tmp_path / "a.apng", format="PNG", save_all=True, append_images=pictures[1:], duration=100)
    pictures[0].save(tmp_path / "b.png")
    pts, time_base = video.frame_pts(tmp_path / "a.apng")
    np.testing.assert_allclose(pts * float(time_base), np.arange(8) / 10, atol=1e-6)
    frames = video.decode(tmp_path / "a.apng", pts[[5, 2]])
    np.testing.assert_array_equal(frames[:, 7, 9], [[50, 100, 200], [20, 100, 200]])
    assert reason_of(video.probe, tmp_path / "b.png") == "container_not_allowed"
