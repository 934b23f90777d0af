"""Picture folders and animated WebP as videos: their pixels, times and hash, and what is rejected."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from ex4d import isolation, video
from ex4d.errors import BadSample
from ex4d.video import pictures


def smooth(count: int = 12, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """Return uint8 [T, H, W, 3] that JPEG keeps well."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 255, (count, 4, 5, 3)).astype(np.uint8)
    return np.stack([cv2.resize(one, size[::-1], interpolation=cv2.INTER_LINEAR) for one in coarse])


def write(folder: Path, frames: np.ndarray, name: str = "frame_{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        options = [cv2.IMWRITE_JPEG_QUALITY, 98] if not name.endswith("png") else []
        cv2.imwrite(str(folder / name.format(number)), frame[..., ::-1], options)
    return folder


def reason(folder: Path, **options) -> str:
    with pytest.raises(BadSample) as caught, pictures.as_video(folder, **options):
        pass
    return caught.value.reason


@pytest.mark.parametrize(("fps", "clock"), [(24, 24), (29.97, 2997), (23.976, 2997), (12.5, 25), (0.5, 1)])
def test_a_folder_of_png_is_its_own_pixels_at_the_rate_that_is_said(tmp_path, fps, clock):
    frames = smooth()
    write(tmp_path / "clip", frames)
    with pictures.as_video(tmp_path / "clip", fps) as path:
        info = video.probe(path)
        pts, time_base = video.frame_pts(path)
        assert (info.codec, info.size, info.num_frames, time_base.denominator) == ("png", (48, 64), 12, clock)
        np.testing.assert_allclose(pts * float(time_base), np.arange(12) / fps, rtol=1e-5)
        assert info.fps == pytest.approx(fps, rel=1e-5)
        np.testing.assert_array_equal(video.decode(path, pts), frames)  # frame_10 comes after frame_9
        np.testing.assert_array_equal(video.decode(path, pts[[7]])[0], frames[7])
        np.testing.assert_array_equal(video.frame_pts_by_decoding(path)[0], pts)
        file = isolation.File(path)
        np.testing.assert_array_equal(isolation.run("decode", (file, pts)), frames)
        assert Path(path).suffix == ".mov"
    assert not Path(path).exists()


@pytest.mark.parametrize("size", [(48, 64), (720, 96)])
def test_jpeg_keeps_its_colours_at_any_size(tmp_path, size):
    frames = smooth(3, size)
    write(tmp_path / "clip", frames, "{:05d}.jpg")
    with pictures.as_video(tmp_path / "clip") as path:
        result = video.decode(path, video.frame_pts(path)[0])
    twin = np.stack([cv2.imread(str(file))[..., ::-1] for file in sorted((tmp_path / "clip").iterdir())])
    assert np.abs(result.astype(int) - twin).mean() < 1.5  # of another decoder; BT.709 in place of BT.601 makes 6


def test_a_camera_s_pictures_are_shown_upright(tmp_path):
    from PIL import Image

    (tmp_path / "clip").mkdir()
    exif = Image.Exif()
    exif[0x112] = 6  # turn clockwise
    frames = smooth(2)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"clip/IMG_{number}.JPG", format="JPEG", quality=98, exif=exif)
    with pictures.as_video(tmp_path / "clip") as path:
        assert video.probe(path).size == (64, 48)
        result = video.decode(path, video.frame_pts(path)[0])
    assert np.abs(result.astype(int) - np.rot90(frames, -1, axes=(1, 2))).mean() < 4


def test_grey_and_transparent_pictures_are_read(tmp_path):
    grey, clear = smooth(2)[..., :1], np.concatenate([smooth(2), smooth(2)[..., :1]], axis=-1)
    for number in range(2):
        for name, picture in (("grey", grey[number]), ("clear", clear[number][..., [2, 1, 0, 3]])):
            (tmp_path / name).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), picture)
    for name, wanted in (("grey", np.repeat(grey, 3, axis=-1)), ("clear", clear[..., :3])):
        with pictures.as_video(tmp_path / name) as path:
            np.testing.assert_array_equal(video.decode(path, video.frame_pts(path)[0]), wanted)


def test_the_hash_is_that_of_rate_names_and_bytes(tmp_path):
    frames = smooth(3)
    first = pictures.digest(str(write(tmp_path / "a", frames)), 24)
    assert pictures.digest(str(write(tmp_path / "b", frames)), 24) == first
    (tmp_path / "b/note.txt").write_text("another file is none of its pictures")
    with open(tmp_path / "b.mov", "wb") as file:
        assert pictures.digest(str(tmp_path / "b"), 24, file) == first
    assert pictures.digest(str(tmp_path / "b"), 25)[0] != first[0]
    assert pictures.digest(str(write(tmp_path / "c", frames, "{}.png")), 24)[0] != first[0]
    assert pictures.digest(str(write(tmp_path / "d", frames[::-1])), 24)[0] != first[0]


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("empty", "no_pictures"),
        ("two names", "pictures_mixed"),
        ("two codecs", "pictures_mixed"),
        ("depth", "pictures_depth"),
        ("a pipe", "not_a_file"),
        ("a dead link", "not_a_file"),
        ("a page", "container_not_allowed"),
        ("no bytes", "container_not_allowed"),
    ],
)
def test_folders_that_are_no_video_are_refused_by_name(tmp_path, how, wanted):
    folder = write(tmp_path / "clip", smooth(3))
    odd = folder / "frame_3.png"
    if how == "empty":
        for file in folder.iterdir():
            file.unlink()
    elif how == "two names":
        odd.with_name("cover_3.png").write_bytes((folder / "frame_0.png").read_bytes())
    elif how == "two codecs":
        odd.write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    elif how == "depth":
        for number in range(3):
            cv2.imwrite(str(folder / f"frame_{number}.png"), np.full((8, 8), 1000, np.uint16))
    elif how == "a pipe":
        os.mkfifo(odd)
    elif how == "a dead link":
        odd.symlink_to("nowhere")
    else:
        odd.write_bytes(b"<html>" if how == "a page" else b"")
    assert reason(folder) == wanted


@pytest.mark.parametrize(("how", "wanted"), [("another size", "resolution_changed"), ("cut", "decode_")])
def test_a_picture_unlike_the_others_is_refused_where_it_is_decoded(tmp_path, how, wanted):
    folder = write(tmp_path / "clip", smooth(3))
    data = cv2.imencode(".png", smooth(1, (24, 32))[0])[1].tobytes()
    (folder / "frame_2.png").write_bytes(data if how == "another size" else data[: len(data) // 2])
    with pictures.as_video(folder) as path:
        pts, _ = video.frame_pts(path)
        video.decode(path, pts[:2])
        with pytest.raises(BadSample, match=wanted):
            isolation.run("decode", (isolation.File(path), pts))


def test_more_bytes_than_are_allowed_are_refused(tmp_path):
    folder = write(tmp_path / "clip", smooth(3))
    with pytest.raises(BadSample, match="file_too_large"):
        pictures.digest(str(folder), 24, max_bytes=pictures.size_of(str(folder)) - 1)


def webp(path: Path, frames: np.ndarray, shown_ms: list[int]) -> Path:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=shown_ms, lossless=True)
    return path


def test_an_animated_webp_is_its_own_pixels_at_its_own_times(tmp_path):
    frames = smooth(6)
    path = webp(tmp_path / "a.webp", frames, [100, 100, 40, 40, 200, 100])
    info = video.probe(path)
    pts, time_base = video.frame_pts(path)
    assert (info.container, info.size) == ("webp", (48, 64))
    np.testing.assert_allclose(pts * float(time_base), [0, 0.1, 0.2, 0.24, 0.28, 0.48])
    np.testing.assert_array_equal(video.decode(path, pts[[5, 0, 3]]), frames[[5, 0, 3]])
    file = isolation.File(str(path))
    assert dataclasses.asdict(isolation.run("probe", (file,))) == dataclasses.asdict(info)
    np.testing.assert_array_equal(isolation.run("decode", (file, pts)), frames)


def test_a_still_webp_is_no_video_and_damaged_ones_end_with_a_reason(tmp_path):
    from PIL import Image

    Image.fromarray(smooth(1)[0]).save(tmp_path / "still.webp")
    with pytest.raises(BadSample, match="container_not_allowed: detected webp"):
        video.probe(tmp_path / "still.webp")
    data = webp(tmp_path / "a.webp", smooth(6), [100] * 6).read_bytes()
    rng = np.random.default_rng(0)
    reasons = set()
    for _ in range(20):
        damaged = bytearray(data[: int(rng.integers(30, len(data)))])
        for place in rng.integers(12, len(damaged), 5):
            damaged[place] = int(rng.integers(256))
        (tmp_path / "b.webp").write_bytes(damaged)
        try:
            isolation.run("probe", (isolation.File(str(tmp_path / "b.webp")),))
        except BadSample as error:
            reasons.add(error.reason)
    assert "decode_error" in reasons
    assert not reasons & {"decode_crash", "decode_timeout", "decode_memory"}


def test_a_webp_that_unpacks_to_gigabytes_is_refused_before_it_is_decoded(tmp_path):
    data = bytearray(webp(tmp_path / "a.webp", smooth(6), [100] * 6).read_bytes())
    data[24:30] = (8000).to_bytes(3, "little") * 2
    with pytest.raises(BadSample, match="size_limit"):
        video.probe(bytes(data))
