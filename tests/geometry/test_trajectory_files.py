"""Pose files: round trips through each format, and files of other tools."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pose_writers import write

from ex4d.errors import ConfigError, ContractError
from ex4d.geometry import camera_path, trajectory
from ex4d.geometry.trajectory_files import PoseFile, read

K = np.array([[120.0, 0, 64], [0, 125, 48], [0, 0, 1]])


def own_path() -> PoseFile:
    w2c = trajectory.build("spiral", 12, 30, radius=2.5) @ trajectory.build("crane", 3, 40)[-1]
    return PoseFile(w2c, np.tile(K, (12, 1, 1)), (96, 128))


@pytest.mark.parametrize("format", ["re10k", "ex4d", "tum", "recammaster", "json"])
def test_what_is_written_is_read_again(tmp_path, format: str):
    path = tmp_path / f"poses.{'npz' if format == 'ex4d' else 'json' if format in ('recammaster', 'json') else 'txt'}"
    write(path, own_path(), format)
    again = read(path)  # the format is recognised
    np.testing.assert_allclose(again.w2c, own_path().w2c, atol=2e-6)
    if format in ("ex4d", "json"):
        np.testing.assert_allclose(again.K, own_path().K)
    if format == "re10k":
        np.testing.assert_allclose(again.K[0], np.diag([1 / 128, 1 / 96, 1]) @ K, atol=1e-8)


def test_conventions_are_those_that_are_named(tmp_path):
    w2c = np.eye(4)[None].repeat(2, 0)
    w2c[1, :3, 3] = [-1, -2, -3]  # the eye is at (1, 2, 3): right, down, forward
    write(tmp_path / "a.npz", PoseFile(w2c, K), "ex4d")
    written = np.load(tmp_path / "a.npz", allow_pickle=False)["extrinsics"]
    np.testing.assert_allclose(written[1], np.diag([1, -1, -1, 1]) @ w2c[1])
    write(tmp_path / "a.txt", PoseFile(w2c), "tum")
    np.testing.assert_allclose(np.loadtxt(tmp_path / "a.txt")[1], [1, 1, 2, 3, 0, 0, 0, 1])
    write(tmp_path / "a.json", PoseFile(w2c), "recammaster")
    text = json.loads((tmp_path / "a.json").read_text())["frame1"]["cam01"]
    assert text.replace("-0", "0").strip() == "[1 0 0 0] [0 1 0 0] [0 0 1 0] [300 100 -200 1]"  # forward, right, up; cm


def test_a_mirrored_world_is_flipped_back(tmp_path):
    w2c = trajectory.build("orbit", 5, 40)
    write(tmp_path / "a.txt", PoseFile(w2c), "tum")
    flip = np.diag([1.0, -1, 1, 1])
    np.testing.assert_allclose(read(tmp_path / "a.txt", flip_y=True).w2c, flip @ w2c @ flip, atol=1e-9)


def test_a_file_becomes_a_path_from_its_first_camera_over_any_number_of_frames(tmp_path):
    write(tmp_path / "a.json", own_path(), "json")
    options = {"resample": True, "scale": 2.0}
    path, view_K = camera_path.build(str(tmp_path / "a.json"), 34, 0.0, 1.0, K, options)
    whole = trajectory.relative_to_first(own_path().w2c)
    np.testing.assert_allclose(path[0], np.eye(4), atol=1e-9)
    np.testing.assert_allclose(path[::3, :3, :3], whole[:, :3, :3], atol=1e-9)
    np.testing.assert_allclose(path[::3, :3, 3], 2 * whole[:, :3, 3], atol=1e-9)
    np.testing.assert_array_equal(view_K, K)


@pytest.mark.parametrize("text", ["1 2 3", "a b c d e f g h", "1 0 0 0 0 0 0 nan", ""])
def test_what_is_no_file_of_poses_is_refused(tmp_path, text: str):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(ContractError):
        read(tmp_path / "bad.txt", format="tum")


def test_a_mirrored_rotation_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"axes": "opencv", "w2c": [np.diag([1, 1, -1, 1]).tolist()]}))
    with pytest.raises(ContractError, match="rigid"):
        read(tmp_path / "bad.json")


def test_bad_choices_name_their_key(tmp_path):
    with pytest.raises(ConfigError, match="trajectory"):
        read(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="format"):
        read(__file__, format="none")


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", extrinsics=np.array([{"a": 1}], dtype=object), intrinsics=K)
    with pytest.raises(ContractError, match="pickle"):
        read(tmp_path / "a.npz")


def test_re10k_files_round_trip(media, tmp_path):
    for path in sorted((media / "re10k_poses").glob("*.txt")):
        poses = read(path)
        assert len(poses.w2c) == 16
        source, *rows = path.read_text().splitlines()
        write(tmp_path / "again.txt", poses, "re10k", [float(row.split()[0]) for row in rows], source)
        again = read(tmp_path / "again.txt")
        np.testing.assert_allclose(again.w2c, poses.w2c, atol=1e-9)
        np.testing.assert_allclose(again.K, poses.K, atol=1e-9)
        assert (tmp_path / "again.txt").read_text().split() == path.read_text().split()


def test_tum_files_round_trip(media, tmp_path):
    paths = sorted((media / "tum_trajectories").rglob("*.txt"))
    assert paths
    for path in paths:
        poses = read(path)
        times = np.loadtxt(path)[:, 0]
        write(tmp_path / "again.txt", poses, "tum", times)
        again = read(tmp_path / "again.txt")
        np.testing.assert_allclose(again.w2c, poses.w2c, atol=1e-6)
        np.testing.assert_allclose(np.loadtxt(tmp_path / "again.txt")[:, 0], times, atol=1e-6)


def test_recammaster_cameras_round_trip(media, tmp_path):
    path = media / "recammaster_cameras" / "camera_extrinsics.json"
    for index in range(1, 11):
        poses = read(path, camera=f"cam{index:02d}")
        assert len(poses.w2c) == 81
        write(tmp_path / "again.json", poses, "recammaster")
        np.testing.assert_allclose(read(tmp_path / "again.json").w2c, poses.w2c, atol=1e-5)
    with pytest.raises(ConfigError, match="camera"):
        read(path, camera="cam99")


def test_the_released_poses_round_trip(media, tmp_path):
    path = media / "ex4d_flower" / "camera_180.npz"
    write(tmp_path / "again.npz", read(path), "ex4d")
    with np.load(path, allow_pickle=False) as before, np.load(tmp_path / "again.npz", allow_pickle=False) as after:
        np.testing.assert_array_equal(before["extrinsics"], after["extrinsics"])
        np.testing.assert_array_equal(before["intrinsics"], after["intrinsics"])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("deep.json", b"[" * 200_000),
        ("list.json", b'["frame0"]'),
        ("large.json", b'{"axes": "opencv", "w2c": [[[1' + b"0" * 400 + b"]]]}"),
        ("empty.npz", b""),
        ("cut.npz", b"PK\x03\x04" + b"\0" * 40),
        ("row.json", json.dumps({"axes": "opencv", "w2c": [[*np.eye(4)[:3].tolist(), [1, 2, 3, 0]]]}).encode()),
    ],
)
def test_damaged_files_of_poses_are_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ContractError, match=name):
        read(tmp_path / name)


def bombs(folder: Path) -> list[Path]:
    """Write files of kilobytes, or full of holes, that announce or unpack to gigabytes."""
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**26, 4, 4)}
    for name in ("w2c", "extrinsics", "camera_poses", "data"):
        with zipfile.ZipFile(folder / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for key in {name, "intrinsics", "inds"}:
                with archive.open(f"{key}.npy", "w") as member:
                    np.lib.format.write_array_header_1_0(member, header)
    with open(folder / "poses.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(2**33)
    (folder / "long_header.npy").write_bytes(b"\x93NUMPY\x02\x00" + (2**30).to_bytes(4, "little") + b" " * 1000)
    for name in ("zeros.json", "zeros.txt", "zeros.csv"):
        with open(folder / name, "wb") as file:
            file.truncate(2**33)
    return sorted(folder.iterdir())


def test_files_that_announce_gigabytes_are_refused_in_little_memory(tmp_path):
    tracemalloc.start()
    for path in bombs(tmp_path):
        for given in (None, "w2c", "ex4d", "pi3", "vipe", "json", "nerfstudio", "recammaster", "tum", "colmap"):
            with pytest.raises(ContractError):
                read(path, given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20


def test_the_depth_beside_the_poses_of_a_file_is_not_read(tmp_path):
    w2c = np.tile(np.eye(4), (3, 1, 1))
    np.savez(tmp_path / "a.npz", extrinsics=w2c[:, :3], intrinsics=w2c[:, :3, :3], depth=np.zeros((3, 600, 600, 8)))
    tracemalloc.start()
    np.testing.assert_array_equal(read(tmp_path / "a.npz").w2c, w2c)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
