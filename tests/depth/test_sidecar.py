"""Depth from files: selection, scaling, conventions, and every way in which a file can be invalid."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from ex4d.depth import ESTIMATORS, DepthRequest, Geometry, arrays, check, estimate, sidecar
from ex4d.errors import BadSample, ConfigError
from ex4d.video import Fit

SIZE = (24, 32)
FRAMES = np.zeros((4, *SIZE, 3), np.uint8)
K = np.array([[40.0, 0, 16], [0, 40, 12], [0, 0, 1]])


def depth(num_frames: int = 10, size: tuple[int, int] = SIZE) -> np.ndarray:
    rows = np.arange(size[0])[:, None] + np.zeros(size[1])
    return np.stack([1 + index + 0.01 * rows for index in range(num_frames)]).astype(np.float32)


def ask(folder, **values) -> DepthRequest:
    return DepthRequest(video_path=str(folder / "clip.mp4"), **values)


def test_it_takes_the_frames_of_the_clip(tmp_path):
    np.savez(tmp_path / "clip.depth.npz", z_depth=depth(), K=K)
    index = np.array([1, 3, 5, 9])
    result = estimate("sidecar", FRAMES, ask(tmp_path, frame_index=index))
    assert result.kind == "z_depth"
    np.testing.assert_array_equal(result.values, depth()[index])
    np.testing.assert_allclose(result.K, K)
    assert result.provenance["file"] == "clip.depth.npz"
    assert len(result.provenance["sha256"]) == 64


def test_it_is_cut_and_scaled_like_the_frames(tmp_path):
    np.savez(tmp_path / "clip.npz", z_depth=depth(4), K=K)
    fit = Fit(SIZE, (12, 12), "crop")
    result = estimate("sidecar", np.zeros((4, 12, 12, 3), np.uint8), ask(tmp_path, fit=fit))
    np.testing.assert_array_equal(result.values, fit.apply_depth(depth(4)))
    np.testing.assert_allclose(result.K, fit.apply_K(K))


def test_maps_of_another_scale_fit_and_of_another_aspect_do_not(tmp_path):
    np.savez(tmp_path / "clip.npz", z_depth=depth(4, (48, 64)), K=np.diag([2, 2, 1]) @ K)
    result = estimate("sidecar", FRAMES, ask(tmp_path))
    assert result.values.shape == (4, *SIZE)
    np.testing.assert_allclose(result.K, K)
    np.savez(tmp_path / "clip.npz", z_depth=depth(4, (48, 48)))
    with pytest.raises(BadSample, match="depth_shape"):
        estimate("sidecar", FRAMES, ask(tmp_path))


@pytest.mark.parametrize(
    ("arrays", "kind"),
    [
        ({"depth": depth() / 20}, "disparity"),  # DepthCrafter
        ({"depth": depth(), "conf": depth()}, "z_depth"),  # Depth Anything 3 without cameras, mini_npz
        ({"depth": depth(), "image": np.zeros((10, 24, 32, 3), np.uint8)}, "z_depth"),  # and npz
        ({"depths": depth()}, "z_depth"),
        ({"disparity": 1 / depth()}, "disparity"),
        ({"depths": 1 / depth(), "kind": np.array("disparity")}, "disparity"),
        ({"z_depth": depth().astype(np.float16)}, "z_depth"),
        ({"z_depth": (depth() * 1000).astype(np.uint16)}, "z_depth"),
        ({"z_depth": depth()[:, None]}, "z_depth"),
    ],
)
def test_the_key_names_the_convention(tmp_path, arrays: dict, kind: str):
    np.savez_compressed(tmp_path / "clip.npz", **arrays)
    result = estimate("sidecar", FRAMES, ask(tmp_path))
    assert (result.kind, result.values.dtype, result.values.shape) == (kind, np.float32, FRAMES.shape[:3])


def test_a_path_may_be_a_file_or_a_folder(tmp_path):
    (tmp_path / "maps").mkdir()
    np.save(tmp_path / "maps" / "clip.npy", depth())
    for path in ("maps", "maps/clip.npy"):
        assert estimate("sidecar", FRAMES, ask(tmp_path, depth_path=str(tmp_path / path))).kind == "z_depth"


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the payload ran')",))


def bad_arrays() -> dict[str, tuple[dict, str]]:
    blind, negative = depth(), depth()
    blind[2], negative[2, 0, 0] = np.nan, -1
    return {
        "a frame without any": ({"z_depth": blind}, "depth_holes"),
        "zeros": ({"z_depth": np.zeros((4, *SIZE))}, "depth_holes"),
        "negative": ({"z_depth": negative}, "depth_nonpositive"),
        "negative disparity": ({"disparity": negative}, "depth_nonpositive"),
        "constant": ({"z_depth": np.ones((10, *SIZE))}, "depth_constant"),
        "one frame too few": ({"z_depth": depth(3)}, "depth_frames"),
        "flat": ({"z_depth": depth()[0]}, "depth_shape"),
        "empty": ({"z_depth": depth()[:0]}, "depth_shape"),
        "strings": ({"z_depth": np.full((4, *SIZE), "1")}, "depth_shape"),
        "complex": ({"z_depth": depth() * 1j}, "depth_shape"),
        "no key": ({"maps": depth()}, "depth_missing"),
        "bad K": ({"z_depth": depth(), "K": np.eye(4)}, "depth_shape"),
        "bad kind": ({"z_depth": depth(), "kind": np.array("ray")}, "depth_shape"),
        "pickle": ({"z_depth": np.array([Payload()] * 4, dtype=object)}, "depth_pickle"),
    }


@pytest.mark.parametrize("case", bad_arrays())
def test_a_bad_file_is_a_bad_sample_with_its_reason(tmp_path, case: str):
    arrays, reason = bad_arrays()[case]
    np.savez(tmp_path / "clip.npz", **arrays)
    with pytest.raises(BadSample) as caught:
        estimate("sidecar", FRAMES, ask(tmp_path))
    assert caught.value.reason == reason


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, np.save])
def test_frames_are_read_as_numpy_reads_them_and_no_others_are_held(tmp_path, save):
    """numpy's own reading is the slow twin: it holds the file's 40 MB."""
    whole = np.random.default_rng(0).uniform(1, 9, (600, 128, 128)).astype(np.float32)
    path = tmp_path / ("a.npy" if save is np.save else "a.npz")
    save(path, whole) if save is np.save else save(path, z_depth=whole)
    index = np.array([7, 3, 599, 7, 0])
    tracemalloc.start()
    with path.open("rb") as file:
        found = arrays.read(file, path.name, arrays.Wanted(index))["values"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(found, whole[index])
    np.testing.assert_array_equal(sidecar.read(str(path), arrays.Wanted(index))[0], whole[index])
    assert peak < 0.2 * whole.nbytes


def test_an_array_in_columns_is_read_too(tmp_path):
    whole = np.asfortranarray(np.random.default_rng(0).uniform(1, 9, (5, 8, 6)))
    np.savez(tmp_path / "a.npz", z_depth=whole)
    found, *_ = sidecar.read(str(tmp_path / "a.npz"), arrays.Wanted(np.array([4, 0])))
    np.testing.assert_array_equal(found, whole[[4, 0]])


def test_a_missing_or_damaged_file(tmp_path):
    with pytest.raises(BadSample, match="depth_missing"):
        estimate("sidecar", FRAMES, ask(tmp_path))
    (tmp_path / "clip.npz").write_bytes(b"PK\x03\x04 this is no archive")
    with pytest.raises(BadSample, match="depth_"):
        estimate("sidecar", FRAMES, ask(tmp_path))
    np.savez(tmp_path / "whole.npz", z_depth=depth())
    (tmp_path / "clip.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-200])
    with pytest.raises(BadSample, match="depth_"):
        estimate("sidecar", FRAMES, ask(tmp_path))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ex4d.depth.arrays.MAX_BYTES", 10_000)
    path = tmp_path / "clip.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("z_depth.npy", b"\0" * 100_000)
    with path.open("rb") as file, pytest.raises(BadSample, match="unpacks to 100000 bytes"):
        arrays.read(file, path.name, arrays.Wanted(np.arange(4)))


def test_what_a_child_says_that_was_taken_over_is_checked(tmp_path, monkeypatch):
    """Answers that the protocol accepts but that are not depth: each rejects only its clip."""
    good = {"values": depth(4), "kind": "z_depth", "key": "z_depth", "K": K, "w2c": None}
    np.savez(tmp_path / "clip.npz", z_depth=depth(4))
    for bad in (
        {"values": depth(3)}, {"values": depth(4)[0]}, {"values": depth(4) > 2}, {"values": 7}, {"kind": "ray"},
        {"K": np.eye(2)}, {"K": 5}, {"K": np.zeros((0, 3, 3))}, {"w2c": np.eye(4)}, {"w2c": "cameras"},
    ):  # fmt: skip
        monkeypatch.setattr("ex4d.isolation.run", lambda *call, bad=bad: good | bad)
        with pytest.raises(BadSample, match="depth_shape"):
            estimate("sidecar", FRAMES, ask(tmp_path))


def test_frames_that_are_not_needed_may_be_bad(tmp_path):
    values = depth()
    values[0] = np.nan
    np.savez(tmp_path / "clip.npz", z_depth=values)
    assert np.isfinite(estimate("sidecar", FRAMES, ask(tmp_path, frame_index=np.arange(1, 5))).values).all()


def test_estimators_are_checked_and_named():
    with pytest.raises(ConfigError, match="parallax"):
        estimate("moge", FRAMES, DepthRequest())
    with pytest.raises(BadSample, match="depth_shape"):
        check(Geometry(np.ones((4, 5, 5), np.float32), "z_depth"), FRAMES.shape[:3])
    assert "sidecar" in ESTIMATORS


def test_files_of_other_programs(media):
    folder = media / "derived_depth"
    frames = np.zeros((5, 240, 320, 3), np.uint8)
    kinds = {
        "icl_depthcrafter.npz": "disparity",
        "icl_metric_depths.npz": "z_depth",
        "icl_metric_depths_f16.npy": "z_depth",
    }
    results = {name: estimate("sidecar", frames, DepthRequest(depth_path=str(folder / name))) for name in kinds}
    assert {name: result.kind for name, result in results.items()} == kinds
    # the same scene: near in one is near in the other
    order = np.corrcoef(
        results["icl_depthcrafter.npz"].values.ravel(), 1 / results["icl_metric_depths.npz"].values.ravel()
    )
    assert order[0, 1] > 0.99
    for name, reason in {
        "icl_metric_depths_bad.npz": "depth_nonpositive",
        "pickled_object_array.npz": "depth_pickle",
    }.items():
        with pytest.raises(BadSample, match=reason):
            estimate("sidecar", frames, DepthRequest(depth_path=str(folder / name)))


def damaged(name: str) -> bytes:
    """Return an npz of good depth, damaged in one way."""
    whole = io.BytesIO()
    np.savez_compressed(whole, z_depth=depth())
    data = bytearray(whole.getvalue())
    directory = data.find(b"PK\x01\x02")
    if name == "stream":
        data[60 : len(data) // 2] = b"\xff" * (len(data) // 2 - 60)
    elif name == "method":
        data[8] = data[directory + 10] = 99
    elif name == "encrypted":
        data[6] |= 1
        data[directory + 8] |= 1
    return bytes(data)


@pytest.mark.parametrize("name", ["stream", "method", "encrypted"])
def test_damaged_archives_are_bad_samples(tmp_path, name):
    (tmp_path / "clip.npz").write_bytes(damaged(name))
    with pytest.raises(BadSample, match="depth_shape"):
        estimate("sidecar", FRAMES, ask(tmp_path))


def test_a_shape_beyond_all_numbers_is_a_bad_sample(tmp_path):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**22},)}}\n".encode()
    (tmp_path / "clip.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(BadSample, match="depth_shape"):
        estimate("sidecar", FRAMES, ask(tmp_path))


@pytest.mark.parametrize("K", [np.zeros((3, 3)), -np.eye(3), 1e300 * np.eye(3), np.eye(4)])
def test_intrinsics_in_a_file_are_data_and_no_choice(tmp_path, K):
    np.savez(tmp_path / "clip.npz", z_depth=depth(), K=K)
    with pytest.raises(BadSample, match="intrinsics"):
        estimate("sidecar", FRAMES, ask(tmp_path))


@pytest.mark.parametrize("focal", [0.3, 1e300, 1e-300])
def test_a_K_that_is_no_camera_s_in_px_costs_the_clip_alone(tmp_path, focal):
    """0.3: in shares of the width, as some programs write it."""
    np.savez(tmp_path / "clip.depth.npz", z_depth=depth(), K=np.array([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]]))
    with pytest.raises(BadSample, match=r"depth_shape.*in px") as caught:
        estimate("sidecar", np.zeros((4, 96, 128, 3), np.uint8), ask(tmp_path, fit=Fit(SIZE, (96, 128), "squeeze")))
    assert caught.value.reason == "depth_shape"


def source_path(num_frames: int = 10) -> np.ndarray:
    """Return w2c [N, 4, 4] of a camera that turns and moves, the first not the identity."""
    poses = np.tile(np.eye(4), (num_frames, 1, 1))
    angle = 0.05 * (1 + np.arange(num_frames))
    poses[:, 0, 0] = poses[:, 2, 2] = np.cos(angle)
    poses[:, 0, 2], poses[:, 2, 0] = np.sin(angle), -np.sin(angle)
    poses[:, :3, 3] = np.arange(3 * num_frames).reshape(-1, 3) / 7
    return poses


def points_of(values: np.ndarray) -> np.ndarray:
    rays = (np.stack(np.meshgrid(np.arange(32) + 0.5, np.arange(24) + 0.5), -1) - K[:2, 2]) / K[[0, 1], [0, 1]]
    return np.concatenate([rays * values[..., None], values[..., None]], axis=-1)


def files_with_cameras() -> dict[str, dict]:
    """Return the files that each program writes for one clip, in its own layout."""
    z, w2c, lens = depth(), source_path(), np.tile(K, (10, 1, 1))
    c2w = np.linalg.inv(w2c)
    return {
        "ours": {"z_depth": z, "K": K, "w2c": w2c},
        "depth anything 3": {"depth": z, "conf": z, "extrinsics": w2c[:, :3], "intrinsics": lens},
        "depth anything 3, npz": {
            **{"image": np.zeros((10, *SIZE, 3), np.uint8), "depth": z, "conf": z},
            **{"extrinsics": w2c[:, :3], "intrinsics": lens},
        },
        "vggt": {
            **{"depth": z[..., None], "depth_conf": z, "extrinsic": w2c[:, :3], "intrinsic": lens},
            **{"pose_enc": np.zeros((10, 9)), "pose_enc_list": None},  # its demo pickles what is None
        },
        "megasam": {"images": np.zeros((10, *SIZE, 3), np.uint8), "depths": z, "intrinsic": K, "cam_c2w": c2w},
        "pi3x": {"local_points": points_of(z), "camera_poses": c2w, "conf": z[..., None]},
        "pi3's demo": {
            **{"points": points_of(z) @ c2w[:, None, :3, :3].swapaxes(-1, -2) + c2w[:, None, None, :3, 3]},
            **{"camera_poses": c2w, "conf": z[..., None]},
        },
    }


@pytest.mark.parametrize("program", files_with_cameras())
def test_cameras_of_the_source_come_with_the_depth(tmp_path, program: str):
    np.savez(tmp_path / "clip.npz", **files_with_cameras()[program])
    index = np.array([2, 3, 7, 9])
    result = estimate("sidecar", FRAMES, ask(tmp_path, frame_index=index))
    truth = source_path()[index] @ np.linalg.inv(source_path()[2])
    assert result.kind == "z_depth"
    np.testing.assert_allclose(result.values, depth()[index], rtol=1e-6)
    np.testing.assert_allclose(result.K, K, rtol=1e-6)
    np.testing.assert_allclose(result.w2c, truth, atol=1e-6)


@pytest.mark.parametrize("w2c", [np.zeros((10, 4, 4)), source_path(3), source_path()[0], np.full((10, 4, 4), "1")])
def test_cameras_that_are_none_are_refused(tmp_path, w2c: np.ndarray):
    np.savez(tmp_path / "clip.npz", z_depth=depth(), w2c=w2c)
    with pytest.raises(BadSample, match=r"w2c|pose") as caught:
        estimate("sidecar", FRAMES, ask(tmp_path))
    assert caught.value.reason == "depth_shape"


def test_a_lens_that_zooms_is_refused_and_one_that_trembles_is_taken(tmp_path):
    file = files_with_cameras()["depth anything 3"]
    for spread, refused in ((0.02, False), (0.3, True)):
        scales = np.linspace(1 - spread, 1 + spread, 10)
        lens = file["intrinsics"] * np.stack([scales, scales, np.ones(10)], axis=1)[:, :, None]
        lens[:, :2, 2] = K[:2, 2]
        np.savez(tmp_path / "clip.npz", **{**file, "intrinsics": lens})
        if refused:
            with pytest.raises(BadSample, match="zoom"):
                estimate("sidecar", FRAMES, ask(tmp_path))
        else:
            np.testing.assert_allclose(estimate("sidecar", FRAMES, ask(tmp_path)).K, K, rtol=0.01)
