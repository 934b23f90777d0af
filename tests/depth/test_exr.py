"""Depth in OpenEXR: folders of pictures, and the folder that ViPE writes."""

from __future__ import annotations

import base64
import struct
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ex4d import isolation
from ex4d.depth import DepthRequest, Geometry, estimate, places
from ex4d.errors import BadSample
from ex4d.geometry.camera import invert, look_at
from ex4d.video import exr

SIZE = (24, 32)
# Written by OpenEXR 3.5.3 (its Python package) as ViPE does: channel Z, half floats, 6 × 8 px of 0.5, 0.75, 1, …
BY_OPENEXR = (
    "c-kw|H)LdDU|>kjNX*Mi%_#;lax#lc7=(dhQ4EX>5Won<49WSq1x2aF#hLkeC~S}<b4p@KVt8g=N`5&*QhtR|CW8P20<Z%yD-fq-78m3sRuWW~lbM"
    "(5UzCzsgv0_np&+v&HOH~IAT_xpD6u3npCK(LKe2>?1+2TlzBsukH8l@nymM+^2~b;^Q5pjWk`>5G!ZTA!GSG}*kYz+DRs`aTxa155W;P9r1~#z;"
    "&62*py$%-`nt3H8SOiQMEZ!TQ1^}w`N^1"
)


def maps(count: int = 10, dtype: type = np.float16) -> np.ndarray:
    rows = np.arange(SIZE[0])[:, None] / 8 + np.zeros(SIZE[1])
    return np.stack([1 + index + rows for index in range(count)]).astype(dtype)


def packed(values: np.ndarray, channel: str = "Z") -> bytes:
    """Return an OpenEXR of float16 or float32 [H, W] with one channel, by FFmpeg's own encoder."""
    context = av.CodecContext.create("exr", "w")
    context.height, context.width = values.shape
    context.pix_fmt, context.time_base = "grayf32le", Fraction(1, 24)
    context.options = {"compression": "zip16", "format": "half" if values.dtype == np.float16 else "float"}
    frame = av.VideoFrame.from_ndarray(values.astype(np.float32), format="grayf32le")
    frame.pts = 0
    data = b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])
    place = exr.header(data).at
    return data[:place] + channel.encode() + data[place + 1 :]


def write(folder: Path, values: np.ndarray, channel: str = "Z") -> Path:
    folder.mkdir(parents=True)
    for number, one in enumerate(values):
        (folder / f"frame_{number}.exr").write_bytes(packed(one, channel))
    return folder


def taken(request: DepthRequest, count: int = 4) -> Geometry:
    return estimate("sidecar", np.zeros((count, *SIZE, 3), np.uint8), request)


def refusal(request: DepthRequest) -> BadSample:
    with pytest.raises(BadSample) as caught:
        taken(request)
    return caught.value


def test_a_file_of_openexr_itself():
    data = zlib.decompress(base64.b85decode(BY_OPENEXR))
    assert exr.header(data).channels == ("Z",)
    np.testing.assert_array_equal(exr.picture(data), np.arange(48, dtype=np.float16).reshape(6, 8) / 4 + 0.5)


@pytest.mark.parametrize("channel", ["Z", "Y", "V"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_folder_of_openexr_is_depth_to_the_last_bit(tmp_path, channel, dtype):
    write(tmp_path / "clip.depth", maps(12, dtype), channel)
    request = DepthRequest(str(tmp_path / "clip.mp4"), frame_index=np.array([1, 2, 10, 11]), source_frames=12)
    result = taken(request)
    np.testing.assert_array_equal(result.values, maps(12, dtype)[[1, 2, 10, 11]].astype(np.float32))
    assert (result.kind, result.provenance["key"]) == ("z_depth", "exr")


def test_the_folder_s_name_says_disparity_and_holes_are_holes(tmp_path):
    write(tmp_path / "clip.disparity", maps(4) - 1)
    assert taken(DepthRequest(str(tmp_path / "clip.mp4"))).kind == "disparity"
    values = maps(4)
    values[:, 3, 5], values[:, 4, 6], values[:, 5, 7] = 0, np.inf, np.nan
    write(tmp_path / "other.depth", values)
    result = taken(DepthRequest(str(tmp_path / "other.mp4")))
    assert result.valid_mask is not None
    assert (~result.valid_mask).sum() == 3 * 4


@pytest.mark.parametrize(
    "how",
    ["PNG too", "PNG in disparity", "another size", "cut", "no OpenEXR", "two channels", "parts", "too large", "few"],
)
def test_openexr_that_hold_no_depth(tmp_path, how):
    import cv2

    folder = write(tmp_path / "clip.depth", maps(4))
    first = folder / "frame_0.exr"
    data = bytearray(first.read_bytes())
    if how == "PNG too":
        cv2.imwrite(str(folder / "frame_0.png"), np.ones(SIZE, np.uint16))
    elif how == "PNG in disparity":
        for file in folder.iterdir():
            cv2.imwrite(str(file.with_suffix(".png")), np.ones(SIZE, np.uint16))
            file.unlink()
        folder.rename(tmp_path / "clip.disparity")
    elif how == "another size":
        first.write_bytes(packed(np.ones((8, 8), np.float16)))
    elif how == "cut":
        first.write_bytes(data[: len(data) // 2])
    elif how == "no OpenEXR":
        first.write_bytes(b"\x89PNG" + bytes(60))
    elif how == "two channels":
        place = exr.header(bytes(data)).at
        entry = data[place : place + 18]
        length = struct.unpack_from("<I", data, place - 4)[0]
        data[place - 4 : place] = struct.pack("<I", length + 18)
        data[place:place] = b"A" + entry[1:]
        first.write_bytes(data)
    elif how == "parts":
        data[5] |= 0x10
        first.write_bytes(data)
    elif how == "too large":
        place = data.index(b"displayWindow\0box2i\0") + 24
        data[place + 8 : place + 16] = struct.pack("<2i", 10**6, 10**6)
        first.write_bytes(data)
    request = DepthRequest(str(tmp_path / "clip.mp4"), source_frames=9 if how == "few" else 0)
    assert refusal(request).reason in ("depth_shape", "depth_missing", "depth_frames", "decode_error")


def test_damaged_openexr_end_with_a_reason(tmp_path):
    data, rng, reasons = packed(maps(1)[0]), np.random.default_rng(0), set()
    for number in range(24):
        damaged = bytearray(data[: int(rng.integers(20, len(data)))] if number % 2 else data)
        for place in rng.integers(8, len(damaged), 6):
            damaged[place] = int(rng.integers(256))
        (tmp_path / "a.exr").write_bytes(damaged)
        try:
            isolation.run("depth_picture", (isolation.File(str(tmp_path / "a.exr")), SIZE, "a.exr"))
        except BadSample as error:
            reasons.add(error.reason)
    assert reasons == {"depth_shape", "decode_error"}


# ---------------------------------------------------------------- ViPE


def path(count: int) -> np.ndarray:
    return np.stack([look_at(np.array([0.1 * i, 0.02 * i, 0.05]), np.array([0.0, 0, 4])) for i in range(count)])


def vipe(root: Path, count: int = 10, name: str = "clip") -> Path:
    """Write ViPE's output for a video of that many frames."""
    for folder in ("depth", "pose", "intrinsics"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / f"depth/{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, one in enumerate(maps(count)):
            archive.writestr(f"{number:05d}.exr", packed(one))
    c2w = invert(path(count)).astype(np.float32)
    np.savez(root / f"pose/{name}.npz", data=c2w, inds=np.arange(count))
    lens = np.tile(np.array([40, 41, 16, 12], np.float32), (count, 1))
    np.savez(root / f"intrinsics/{name}.npz", data=lens, inds=np.arange(count))
    (root / f"intrinsics/{name}_camera.txt").write_text("".join(f"{number}: PINHOLE\n" for number in range(count)))
    return root / f"depth/{name}.zip"


@pytest.mark.parametrize("named", ["folder", "file"])
def test_the_folder_of_vipe_is_depth_lens_and_cameras(tmp_path, named):
    file = vipe(tmp_path / "vipe_results")
    request = DepthRequest(
        str(tmp_path / "clip.mp4"),
        str(tmp_path / "vipe_results" if named == "folder" else file),
        frame_index=np.array([2, 3, 5, 7]),
        source_frames=10,
    )
    result = taken(request)
    np.testing.assert_array_equal(result.values, maps(10)[[2, 3, 5, 7]].astype(np.float32))
    np.testing.assert_allclose(result.K, [[40, 0, 16], [0, 41, 12], [0, 0, 1]])
    w2c = path(10)[[2, 3, 5, 7]]
    np.testing.assert_allclose(result.w2c, w2c @ invert(w2c[0]), atol=1e-6)
    assert (result.kind, result.provenance["cameras"]) == ("z_depth", "estimator")
    # the poses are an input of the sample
    before = places.sha256(str(file))
    assert result.provenance["sha256"] == before
    np.savez(tmp_path / "vipe_results/pose/clip.npz", data=invert(path(10))[:, :, :], inds=np.arange(10))
    assert places.sha256(str(file)) != before


def test_the_depth_of_vipe_may_come_alone(tmp_path):
    file = vipe(tmp_path / "vipe_results")
    for name in ("pose/clip.npz", "intrinsics/clip.npz", "intrinsics/clip_camera.txt"):
        (tmp_path / "vipe_results" / name).unlink()
    result = taken(DepthRequest(str(tmp_path / "clip.mp4"), str(file)))
    assert (result.K, result.w2c) == (None, None)


@pytest.mark.parametrize("how", ["fisheye", "a gap", "few poses", "lens in shares", "no pictures", "another zip"])
def test_what_vipe_wrote_otherwise_is_refused(tmp_path, how):
    root = tmp_path / "vipe_results"
    file = vipe(root)
    if how == "fisheye":
        (root / "intrinsics/clip_camera.txt").write_text("0: MEI\n")
    elif how == "few poses":
        np.savez(root / "pose/clip.npz", data=invert(path(2)), inds=np.arange(2))
    elif how == "lens in shares":
        np.savez(root / "intrinsics/clip.npz", data=np.tile([0.8, 0.8, 0.5, 0.5], (10, 1)), inds=np.arange(10))
    else:
        with zipfile.ZipFile(file, "w") as archive:
            for number in {"a gap": (0, 2, 3, 4), "no pictures": (), "another zip": (0,)}[how]:
                data = b"text" if how == "another zip" else packed(maps()[number])
                archive.writestr(f"{number:05d}.exr", data)
    request = DepthRequest(
        str(tmp_path / "clip.mp4"), str(root), frame_index=np.arange(1 if how == "another zip" else 4)
    )
    with pytest.raises(BadSample) as caught:
        taken(request, len(request.frame_index))
    assert caught.value.reason in ("depth_shape", "depth_missing", "depth_frames", "cameras_missing")
    assert "clip" in caught.value.message


def test_a_picture_that_says_it_unpacks_to_gigabytes_is_refused(tmp_path):
    file = vipe(tmp_path / "vipe_results", 1)
    data = bytearray(file.read_bytes())
    place = data.index(b"PK\x01\x02") + 24  # the unpacked size, in the archive's directory
    data[place : place + 4] = struct.pack("<I", 2**31)
    file.write_bytes(data)
    request = DepthRequest(str(tmp_path / "clip.mp4"), str(tmp_path / "vipe_results"), frame_index=np.arange(1))
    with pytest.raises(BadSample, match="unpacks to more"):
        taken(request, 1)
