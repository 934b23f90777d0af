"""Which depth file belongs to a video if several match, how many maps it needs, and which units it has."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from ex4d import video
from ex4d.depth import DepthRequest, Geometry, arrays, estimate, places, sidecar
from ex4d.errors import BadSample

SIZE = (24, 32)
K = np.array([[40.0, 0, 16], [0, 40, 12], [0, 0, 1]])


def depth(count: int = 10, step: float = 1.0) -> np.ndarray:
    rows = np.arange(SIZE[0])[:, None] + np.zeros(SIZE[1])
    return np.stack([1 + step * index + 0.01 * rows for index in range(count)]).astype(np.float32)


def taken(request: DepthRequest, count: int = 4) -> Geometry:
    return estimate("sidecar", np.zeros((count, *SIZE, 3), np.uint8), request)


def refusal(request: DepthRequest, count: int = 4) -> BadSample:
    with pytest.raises(BadSample) as caught:
        taken(request, count)
    return caught.value


def test_a_folder_of_depth_mirrors_the_folder_of_videos(tmp_path):
    maps = tmp_path / "maps"
    for name, first in (("a/clip", 1.0), ("b/clip", 50.0)):
        (maps / name).parent.mkdir(parents=True)
        np.savez(maps / f"{name}.depth.npz", z_depth=depth() + first)
    for name, first in (("a/clip.mp4", 1.0), ("b/clip.mp4", 50.0)):
        request = DepthRequest(str(tmp_path / "in" / name), str(maps), name, namesake="another/clip.mp4")
        assert taken(request).values.min() == pytest.approx(1 + first)


def test_a_file_that_could_be_of_two_videos_is_refused(tmp_path):
    np.savez(tmp_path / "clip.depth.npz", z_depth=depth())
    own = DepthRequest(str(tmp_path / "in/a/clip.mp4"), str(tmp_path), "a/clip.mp4", namesake="b/clip.mp4")
    caught = refusal(own)
    assert caught.reason == "sidecar_ambiguous"
    assert "a/clip.mp4 or to b/clip.mp4: put it at a/clip.depth.npz" in caught.message
    # without another video of that name, a flat folder is fine
    assert taken(DepthRequest(str(tmp_path / "in/a/clip.mp4"), str(tmp_path), "a/clip.mp4")).kind == "z_depth"
    # the one at the root of the videos has its place at the root of the maps
    assert taken(DepthRequest(str(tmp_path / "in/clip.mp4"), str(tmp_path), "clip.mp4", namesake="b/clip.mp4"))


@pytest.mark.parametrize("suffix", places.SUFFIXES)
def test_twins_have_files_of_their_whole_names(tmp_path, suffix):
    save = np.save if suffix.endswith(".npy") else lambda path, values: np.savez(path, z_depth=values)
    save(tmp_path / f"x{suffix}", depth())
    request = DepthRequest(str(tmp_path / "x.mp4"), twin="x.mov")
    caught = refusal(request)
    assert caught.reason == "sidecar_ambiguous"
    assert f"name it x.mp4{suffix}" in caught.message
    save(tmp_path / f"x.mp4{suffix}", depth() + 7)
    assert taken(request).values.min() == pytest.approx(8)


def test_twins_are_seen_beside_a_single_video(tmp_path):
    for name in ("x.mp4", "x.MOV", "x.txt", "x.depth.npz", "xy.mp4"):
        (tmp_path / name).write_bytes(b"")
    assert places.twin_of(str(tmp_path / "x.mp4")) == "x.MOV"
    assert places.twin_of(str(tmp_path / "xy.mp4")) == ""


@pytest.mark.parametrize("count", [5, 9, 11, 20])
@pytest.mark.parametrize("form", ["npz", "compressed", "npy", "columns", "png"])
def test_another_number_of_maps_than_frames_is_refused(tmp_path, count, form):
    maps = depth(count)
    if form == "png":
        write_png(tmp_path / "clip.depth", maps)
    elif form == "npy":
        np.save(tmp_path / "clip.npy", maps)
    else:
        save = np.savez_compressed if form == "compressed" else np.savez
        save(tmp_path / "clip.npz", z_depth=np.asfortranarray(maps) if form == "columns" else maps)
    request = DepthRequest(str(tmp_path / "clip.mp4"), source_frames=10, source_s=0.3)
    caught = refusal(request)
    assert caught.reason == "depth_frames"
    assert f"{count} " in caught.message


def test_maps_that_say_their_rate_are_taken_by_time(tmp_path):
    # 25 maps a second for a video of 50: the map nearest in time, in any part of the video
    np.savez(tmp_path / "clip.npz", z_depth=depth(25), fps=np.array(25))
    index = np.arange(20, 28)
    request = DepthRequest(
        str(tmp_path / "clip.mp4"), frame_index=index, frame_s=index / 50, source_frames=50, source_s=49 / 50
    )
    found = taken(request, 8).values[:, 0, 0] - 1
    np.testing.assert_array_equal(found, np.rint(index / 2))
    # one map a frame: no rate is asked
    np.savez(tmp_path / "clip.npz", z_depth=depth(50), fps=np.array(25))
    np.testing.assert_array_equal(taken(request, 8).values[:, 0, 0] - 1, index)


@pytest.mark.parametrize("fps", [50.0, 12.0, 0.0, -1.0, np.nan, np.inf])
def test_a_rate_that_does_not_last_the_video_is_refused(tmp_path, fps):
    np.savez(tmp_path / "clip.npz", z_depth=depth(25), fps=np.array(fps))
    request = DepthRequest(str(tmp_path / "clip.mp4"), frame_s=np.arange(4) / 50, source_frames=50, source_s=0.98)
    assert refusal(request).reason in ("depth_frames", "depth_shape")


def write_png(folder, maps: np.ndarray, dtype=np.uint16) -> None:
    folder.mkdir()
    for index, one in enumerate(maps):
        scale = 1000 if dtype == np.uint16 else 20
        cv2.imwrite(str(folder / f"frame_{index}.png"), (one * scale).astype(dtype))


def test_a_folder_of_png_holds_millimetres(tmp_path):
    write_png(tmp_path / "clip.depth", depth(12))
    request = DepthRequest(str(tmp_path / "clip.mp4"), frame_index=np.array([1, 2, 10, 11]), source_frames=12)
    result = taken(request)
    np.testing.assert_allclose(result.values, depth(12)[[1, 2, 10, 11]], atol=1e-3)  # frame_10 comes after frame_9
    assert (result.kind, result.provenance["key"]) == ("z_depth", "png")
    # a folder is named, as `ex4d reconstruct --depth-path` does
    result = taken(DepthRequest("", str(tmp_path / "clip.depth"), frame_index=np.arange(4)))
    np.testing.assert_allclose(result.values, depth(12)[:4], atol=1e-3)


@pytest.mark.parametrize("how", ["8 bits", "colour", "no PNG", "empty folder", "cut", "two sizes", "a bomb"])
def test_png_that_hold_no_depth(tmp_path, how):
    folder = tmp_path / "clip.depth"
    write_png(folder, depth(4), np.uint8 if how == "8 bits" else np.uint16)
    first = folder / "frame_0.png"
    if how == "colour":
        cv2.imwrite(str(first), np.zeros((*SIZE, 3), np.uint16))
    elif how == "no PNG":
        first.write_bytes(b"GIF89a" + bytes(60))
    elif how == "empty folder":
        for file in folder.iterdir():
            file.unlink()
    elif how == "cut":
        first.write_bytes(first.read_bytes()[:20])
    elif how == "two sizes":
        cv2.imwrite(str(first), np.ones((10, 10), np.uint16))
    elif how == "a bomb":
        data = bytearray(first.read_bytes())
        data[16:24] = (60000).to_bytes(4, "big") * 2
        first.write_bytes(data)
    assert refusal(DepthRequest(str(tmp_path / "clip.mp4"))).reason in ("depth_shape", "depth_missing")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<html>", b""])
def test_what_is_no_array_is_said_so(tmp_path, content):
    (tmp_path / "clip.depth.npz").write_bytes(content)
    caught = refusal(DepthRequest(str(tmp_path / "clip.mp4")))
    assert caught.reason == "depth_shape"
    assert "is not an npy or npz file" in caught.message


@pytest.mark.parametrize("name", ["clip_vis.mp4", "clip.depth.exr", "clip.depth.avi"])
def test_pictures_of_depth_are_named_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    caught = refusal(DepthRequest(str(tmp_path / "clip.mp4")))
    assert caught.reason == "depth_missing"
    assert (
        caught.message
        == f"{name} is a picture of depth, or a format that is not read: write the values as clip.depth.npz"
    )


def write_video(path, maps: np.ndarray, fps: float = 10, coloured: bool = False) -> None:
    grey = np.repeat(maps[..., None], 3, axis=-1)
    path.parent.mkdir(exist_ok=True)
    video.write(path, grey * np.array([1, 1, 0] if coloured else [1, 1, 1], np.uint8), fps)


def disparity(count: int) -> np.ndarray:
    return np.stack([np.full(SIZE, 20 + 8 * index, np.uint8) for index in range(count)]) + np.arange(
        SIZE[1], dtype=np.uint8
    )


@pytest.mark.parametrize("name", ["clip_depth.mp4", "clip.depth.mp4"])
def test_a_grey_video_is_relative_disparity(tmp_path, name):
    write_video(tmp_path / "maps" / name, disparity(10))
    request = DepthRequest(
        str(tmp_path / "clip.mp4"), str(tmp_path / "maps"), frame_index=np.arange(3, 7), source_frames=10
    )
    for chosen in (tmp_path / "maps", tmp_path / "maps" / name):
        result = taken(dataclasses.replace(request, depth_path=str(chosen)))
        assert (result.kind, result.metric, result.provenance["key"]) == ("disparity", False, "video")
        np.testing.assert_allclose(result.values, disparity(10)[3:7], atol=4)
    # next to the video, its kind is not stated
    (tmp_path / name).write_bytes((tmp_path / "maps" / name).read_bytes())
    caught = refusal(DepthRequest(str(tmp_path / "clip.mp4")))
    assert caught.reason == "depth_missing"
    assert "set depth_path" in caught.message


def test_a_video_of_depth_is_taken_by_time_or_refused(tmp_path):
    write_video(tmp_path / "maps" / "clip_depth.mp4", disparity(10), fps=10)
    index = np.arange(8, 12)
    request = DepthRequest(
        str(tmp_path / "clip.mp4"),
        str(tmp_path / "maps"),
        frame_index=index,
        frame_s=index / 20,
        source_frames=20,
        source_s=0.95,
    )
    np.testing.assert_allclose(taken(request).values, disparity(10)[np.rint(index / 2).astype(int)], atol=4)
    assert refusal(dataclasses.replace(request, source_frames=60, source_s=2.95)).reason == "depth_frames"


@pytest.mark.parametrize("how", ["coloured", "no video", "cut"])
def test_videos_that_hold_no_depth(tmp_path, how):
    path = tmp_path / "maps" / "clip_depth.mp4"
    write_video(path, disparity(10), coloured=how == "coloured")
    if how != "coloured":
        path.write_bytes(b"GIF89a" + bytes(60) if how == "no video" else path.read_bytes()[:-200])
    caught = refusal(DepthRequest(str(tmp_path / "clip.mp4"), str(tmp_path / "maps")))
    assert caught.reason != "depth_missing"
    assert ("colour-mapped" in caught.message) == (how == "coloured")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint32, np.int64])
def test_whole_numbers_are_millimetres(tmp_path, dtype):
    np.savez(tmp_path / "clip.npz", z_depth=(depth() * 1000).astype(dtype))
    np.testing.assert_allclose(taken(DepthRequest(str(tmp_path / "clip.mp4"))).values, depth()[:4], atol=1e-3)


@pytest.mark.parametrize("values", [(depth() * 20).astype(np.uint8), depth() * 1e30, depth().astype(np.float64) * 1e60])
def test_values_of_no_known_unit_are_refused(tmp_path, values):
    np.savez(tmp_path / "clip.npz", z_depth=values)
    assert refusal(DepthRequest(str(tmp_path / "clip.mp4"))).reason in ("depth_unit", "depth_nan")


def lens(focal: float, x: float, y: float) -> np.ndarray:
    return np.array([[focal, 0, x], [0, focal, y], [0, 0, 1]])


@pytest.mark.parametrize(
    "wrong",
    [
        lens(0.8, 0.5, 0.5),  # in shares of the sides
        lens(0.8, 0.5, 0.375),  # in shares of the width
        lens(1.6, 0.0, 0.0),  # in clip space
        lens(1500, 960, 540),  # of the video, whose maps are smaller
        lens(40, 32, 24),  # of pictures of twice the size
        lens(40, -16, 12),
        np.stack([lens(40, 16, 12), lens(50, 16, 12)]),  # a zoom
        np.eye(4),
    ],
)
def test_a_K_of_other_pictures_is_refused(tmp_path, wrong):
    np.savez(tmp_path / "clip.npz", z_depth=depth(), K=wrong)
    caught = refusal(DepthRequest(str(tmp_path / "clip.mp4")))
    assert caught.reason == "depth_shape"
    assert "K " in caught.message


def test_one_K_for_each_frame_is_one_where_they_are_equal(tmp_path):
    np.savez(tmp_path / "clip.npz", z_depth=depth(), K=np.tile(K, (10, 1, 1)))
    np.testing.assert_array_equal(taken(DepthRequest(str(tmp_path / "clip.mp4"))).K, K)


def test_the_hash_of_a_folder_is_that_of_names_and_contents(tmp_path):
    write_png(tmp_path / "a.depth", depth(3))
    write_png(tmp_path / "b.depth", depth(3))
    (tmp_path / "b.depth" / "README").write_text("not a map")
    assert places.sha256(str(tmp_path / "a.depth")) == places.sha256(str(tmp_path / "b.depth"))
    (tmp_path / "b.depth" / "frame_2.png").rename(tmp_path / "b.depth" / "frame_3.png")
    assert places.sha256(str(tmp_path / "a.depth")) != places.sha256(str(tmp_path / "b.depth"))


def test_the_maps_of_numpy_are_the_slow_twin_of_retimed_reading(tmp_path):
    maps = np.random.default_rng(0).uniform(1, 9, (25, *SIZE)).astype(np.float32)
    np.savez_compressed(tmp_path / "clip.npz", z_depth=maps, fps=np.array(25.0))
    seconds = np.arange(50) / 50
    wanted = arrays.Wanted(np.arange(50), source_frames=50, source_s=0.98, frame_s=seconds)
    found, *_ = sidecar.read(str(tmp_path / "clip.npz"), wanted)
    nearest = [int(np.argmin(np.abs(np.arange(25) / 25 - second))) for second in seconds]
    away = np.abs(np.array(nearest) - np.minimum(np.rint(seconds * 25), 24))
    assert away.max() <= 1  # a tie may go either way
    np.testing.assert_array_equal(found[::2], maps)
