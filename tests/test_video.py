"""Frame truth, colours, orientation and refusals: on clips made here, and on real media where they are."""

from __future__ import annotations

import dataclasses
import io
import os
from fractions import Fraction
from pathlib import Path

import av
import barcode
import cv2
import numpy as np
import pytest

from ex4d import video
from ex4d.errors import BadSample, ConfigError
from ex4d.video import frames as frames_module
from ex4d.video.source import opened
from pipelines.isolation import Isolated, Limits

REFUSED = {
    "derived_hostile/bomb_30000x30000.png": "container_not_allowed",
    "derived_hostile/concat_relative.mp4": "ffconcat_script",
    "derived_hostile/concat_script.mp4": "ffconcat_script",
    "derived_hostile/declared_65535x65535.mp4": "size_limit",
    "derived_hostile/html_404.mp4": "html_page",
    "derived_hostile/jpeg_named.mp4": "container_not_allowed",
    "derived_hostile/lfs_pointer.mp4": "lfs_pointer",
    "derived_hostile/no_mdat.mp4": "truncated",
    "derived_hostile/no_moov.mp4": "no_moov",
    "derived_hostile/offsets_past_eof.mp4": "truncated",
    "derived_hostile/playlist.mp4": "playlist",
    "derived_hostile/timescale_zero.mp4": "timescale_zero",
    "derived_hostile/truncated_60pct.mp4": "no_moov",
    "derived_hostile/truncated_faststart_40pct.mp4": "truncated",
    "derived_hostile/zero_byte.mp4": "empty_file",
    "derived_hostile/bitflips_40.mp4": "decode_corrupt",
    "decord_broken/corrupted.mp4": "decode_error",
    "libwebm/invalid/invalid_vp9_bitstream-bug_1416.webm": "size_limit",
    "mp4ff_edge/mp4/testdata/init.mp4": "no_frames",
    "mp4ff_edge/mp4/testdata/init_truncated.mp4": "truncated",
    "mp4ff_edge/mp4/testdata/opus.mp4": "no_video_stream",
    "mp4ff_edge/mp4/testdata/prog_8s_enc_dashinit.mp4": "encrypted",
}
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".png", ".libwebm")


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


def test_without_the_guard_decord_gives_other_frames_of_an_open_gop(tmp_path):
    decord = pytest.importorskip("decord")
    clip = barcode.write(tmp_path / "clip.mp4", barcode.RECIPES["hevc_open_gop"])
    wrong = 0
    for number in range(0, 96, 3):
        image = decord.VideoReader(str(clip), num_threads=1)[number].asnumpy()
        wrong += barcode.number_of(image) != number
    assert wrong > 0
    pts, _ = video.frame_pts(clip)
    assert reason_of(video.decode, clip, pts[:1], backend="decord") == "decord_inexact"


def test_a_late_frame_is_reached_by_seeking(tmp_path, monkeypatch):
    clip = barcode.write(tmp_path / "clip.mp4", barcode.RECIPES["h264"])
    seen = []
    real = frames_module.decoded

    def counting(container, stream):
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


# ---------------------------------------------------------------- colours and orientation


def flat_yuv(colour, matrix: str, full: bool, depth: int) -> list[int]:
    """Return (Y, Cb, Cr) of an RGB colour by ITU-R BT.601 / BT.709, the formula written out."""
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


# ---------------------------------------------------------------- our own files


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


def test_write_is_whole_or_not_there(tmp_path):
    video.write(tmp_path / "a" / "clip.mp4", saturated(), 10)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["clip.mp4"]
    assert video.read(tmp_path / "a" / "clip.mp4")[0].shape == (6, 64, 96, 3)


@pytest.mark.parametrize("frames", [np.zeros((1, 63, 64, 3), np.uint8), np.zeros((1, 64, 64)), np.zeros((0, 4, 4, 3))])
def test_frames_that_cannot_be_encoded_are_refused(frames):
    with pytest.raises(ConfigError, match="frames"):
        video.encode(frames, 10)


# ---------------------------------------------------------------- Fit


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


# ---------------------------------------------------------------- hostile files


def test_scripts_and_texts_are_refused_by_name(tmp_path):
    secret = barcode.write(tmp_path / "other.mp4", barcode.RECIPES["h264"], num_frames=4)
    texts = {
        "ffconcat_script": f"ffconcat version 1.0\nfile '{secret.name}'\n",
        "playlist": f"#EXTM3U\n#EXTINF:1,\n{secret.name}\n",
        "html_page": "<!DOCTYPE html><html></html>",
        "lfs_pointer": "version https://git-lfs.github.com/spec/v1\n",
        "empty_file": "",
        "unknown_container": "just words",
    }
    for reason, text in texts.items():
        path = tmp_path / "text.mp4"
        path.write_text(text)
        assert reason_of(video.probe, path) == reason


def test_a_hostile_file_name_is_only_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-i concat:x.mp4", "%03d.mp4", "a\nb'\";$(x).mp4", "http:x.mp4"):
        barcode.write(tmp_path / "plain.mp4", barcode.RECIPES["h264"], num_frames=2).rename(tmp_path / name)
        assert video.probe(name).codec == "h264"


def test_an_encrypted_sample_entry_is_refused():
    data = video.encode(saturated(), 10)
    assert reason_of(video.probe, data.replace(b"avc1\x00\x00\x00\x00", b"encv\x00\x00\x00\x00")) == "encrypted"


def test_a_file_cut_short_is_refused():
    data = video.encode(np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3)).astype(np.uint8), 10)
    assert reason_of(video.frame_pts, data[: len(data) * 2 // 3]) == "truncated"


def use(child: Isolated, path: str) -> str:
    """Return "ok" or the reason: what a pipeline does with a file, first and last frame decoded."""
    try:
        child.call("probe", path)
        pts, _ = child.call("frame_pts", path)
        child.call("decode", path, pts[[0, -1]], (32, 32))
    except BadSample as error:
        return error.reason if error.message else "no message"
    return "ok"


@pytest.fixture(scope="module")
def child():
    isolated = Isolated(Limits(wall_s=20, cpu_s=20))
    yield isolated
    isolated.close()


def test_fuzzed_files_are_used_or_refused(child, tmp_path):
    check_fuzzed(child, tmp_path, num_variants=40)


@pytest.mark.heavy
def test_two_hundred_fuzzed_files_are_used_or_refused(child, tmp_path):
    check_fuzzed(child, tmp_path, num_variants=200)


def check_fuzzed(child: Isolated, folder: Path, num_variants: int) -> None:
    rng = np.random.default_rng(7)
    recipes = [barcode.RECIPES[name] for name in ("h264", "vp9_vfr", "av1", "hevc_open_gop", "h264_ts")]
    originals = [barcode.write(folder / f"{i}{r.suffix}", r, num_frames=24) for i, r in enumerate(recipes)]
    fates = []
    for index in range(num_variants):
        original = originals[index % len(originals)]
        data = bytearray(original.read_bytes())
        if index % 4 == 3:
            del data[int(rng.integers(1, len(data))) :]
        else:
            for position in rng.integers(0, len(data), 1 + index % 30):
                data[position] ^= int(rng.integers(1, 256))
        path = folder / f"fuzzed{original.suffix}"
        path.write_bytes(data)
        fates.append(use(child, str(path)))
    assert len(fates) == num_variants
    lost = {"decode_crash", "decode_timeout", "decode_cpu", "decode_memory"} & set(fates)
    assert not lost, "no variant should need the isolation; if one does, it was contained"
    assert "ok" in fates
    assert len(set(fates)) > 3


def test_every_file_of_the_media_is_used_or_refused_with_its_reason(media, child):
    files = sorted(path for path in media.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    fates = {str(path.relative_to(media)): use(child, str(path)) for path in files}
    assert {name: fates[name] for name in REFUSED} == REFUSED
    good = [
        name for name in fates if not name.startswith(("derived_hostile", "decord_broken", "libwebm", "mp4ff", "rgbd"))
    ]
    assert {fates[name] for name in good} == {"ok"}
    assert fates["mp4ff_edge/examples/resegmenter/testdata/outV300.mp4"] == "ok"


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


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadSample, match="pipe"):
        video.probe(tmp_path / "pipe.mp4")
