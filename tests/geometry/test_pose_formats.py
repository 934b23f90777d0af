"""Poses of other tools: each format is read correctly, and each kind of error is reported by name."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable

import numpy as np
import pytest
from pose_writers import write
from scipy.spatial.transform import Rotation

from ex4d.errors import ConfigError, ContractError
from ex4d.geometry import camera_path, trajectory
from ex4d.geometry.trajectory_files import READERS, PoseFile, read
from ex4d.text import in_natural_order

W2C = trajectory.build("spiral", 12, 30, radius=2.5)
C2W = np.linalg.inv(W2C)
GL = np.diag([1.0, -1, -1, 1])
QUATERNIONS = Rotation.from_matrix(C2W[:, :3, :3]).as_quat()
COUNT = len(W2C)


def lines(rows: np.ndarray, between: str = " ") -> str:
    return "".join(between.join(f"{number:.9g}" for number in row) + "\n" for row in rows)


def tum(c2w: np.ndarray) -> str:
    return lines(np.column_stack([np.arange(len(c2w)) / 30, c2w[:, :3, 3], QUATERNIONS[: len(c2w)]]))


def euroc(c2w: np.ndarray) -> str:
    head = "#timestamp [ns],p_RS_R_x [m],p_RS_R_y [m],p_RS_R_z [m],q_RS_w [],q_RS_x [],q_RS_y [],q_RS_z []\n"
    rows = np.column_stack([np.arange(len(c2w)) * 33_333_333, c2w[:, :3, 3], QUATERNIONS[:, [3, 0, 1, 2]]])
    return head + lines(rows, ",")


def colmap(c2w: np.ndarray) -> str:
    w2c = np.linalg.inv(c2w)
    quaternions = Rotation.from_matrix(w2c[:, :3, :3]).as_quat()[:, [3, 0, 1, 2]]
    images = []
    for index in reversed(range(len(c2w))):  # COLMAP lists pictures in the order in which it placed them
        numbers = " ".join(f"{number:.9g}" for number in [*quaternions[index], *w2c[index, :3, 3]])
        points = "" if index % 2 else "1.5 2.5 -1 3.5 4.5 7"
        images.append(f"{index + 1} {numbers} 1 frame_{index}.png\n{points}\n")
    return "# Image list with two lines of data per image:\n" + "".join(images)


def colmap_binary(c2w: np.ndarray) -> bytes:
    """Return the bytes of images.bin that COLMAP 4.2 writes for these poses."""
    w2c = np.linalg.inv(c2w)
    quaternions = Rotation.from_matrix(w2c[:, :3, :3]).as_quat()[:, [3, 0, 1, 2]]
    images = [struct.pack("<Q", len(c2w))]
    for index in reversed(range(len(c2w))):
        images.append(struct.pack("<I7dI", index + 1, *quaternions[index], *w2c[index, :3, 3], 1))
        images.append(f"frame_{index}.png".encode() + b"\0" + struct.pack("<Q", index % 3))
        images.append(struct.pack("<ddq", 1.5, 2.5, -1) * (index % 3))
    return b"".join(images)


def nerfstudio(c2w: np.ndarray) -> str:
    frames = [{"file_path": f"images/f{i}.png", "transform_matrix": (c2w[i] @ GL).tolist()} for i in range(len(c2w))]
    lens = {"fl_x": 400, "fl_y": 410, "cx": 256, "cy": 200, "w": 512, "h": 400}
    return json.dumps({**lens, "frames": frames[::-1]})


def blender(c2w: np.ndarray) -> str:
    frames = [{"file_path": f"./train/r_{i}", "transform_matrix": (c2w[i] @ GL).tolist()} for i in range(len(c2w))]
    return json.dumps({"camera_angle_x": 0.69, "frames": frames})


def camera_path_json(c2w: np.ndarray) -> str:
    cameras = [{"camera_to_world": (pose @ GL).ravel().tolist(), "fov": 50, "aspect": 1} for pose in c2w]
    return json.dumps({"render_height": 512, "render_width": 512, "camera_path": cameras})


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def llff(c2w: np.ndarray) -> bytes:
    gl = c2w @ GL
    down_right_back = np.concatenate([-gl[:, :3, 1:2], gl[:, :3, 0:1], gl[:, :3, 2:]], axis=2)
    sides = np.tile(np.array([[[400.0], [512.0], [380.0]]]), (len(c2w), 1, 1))
    table = np.concatenate([down_right_back, sides], axis=2).reshape(len(c2w), 15)
    return npy(np.column_stack([table, np.ones(len(c2w)), 10 * np.ones(len(c2w))]))


# name -> (file name, content of poses c2w, the options that it needs)
FORMATS: dict[str, tuple[str, Callable[[np.ndarray], str | bytes], dict]] = {
    "tum": ("a.txt", tum, {}),
    "tum with a header": ("a.txt", lambda c2w: "timestamp tx ty tz qx qy qz qw\n" + tum(c2w), {}),
    "tum with commas": ("a.csv", lambda c2w: tum(c2w).replace(" ", ","), {}),
    "tum out of order": ("a.txt", lambda c2w: "\n".join(tum(c2w).splitlines()[::-1]), {}),
    "euroc": ("data.csv", euroc, {}),
    "kitti": ("00.txt", lambda c2w: lines(c2w[:, :3].reshape(len(c2w), 12)), {}),
    "flat matrices": ("a.txt", lambda c2w: lines(c2w.reshape(len(c2w), 16)), {"format": "c2w"}),
    "colmap": ("images.txt", colmap, {}),
    "colmap, binary": ("images.bin", colmap_binary, {}),
    "nerfstudio": ("transforms.json", nerfstudio, {}),
    "blender": ("transforms_train.json", blender, {}),
    "nerfstudio's viewer": ("camera_path.json", camera_path_json, {}),
    "llff": ("poses_bounds.npy", llff, {}),
    "npy of w2c": ("a.npy", lambda c2w: npy(np.linalg.inv(c2w)), {"format": "w2c"}),
    "npy of 3x4": ("a.npy", lambda c2w: npy(c2w[:, :3]), {"format": "c2w"}),
    "npz that says its axes": ("a.npz", lambda c2w: npz(c2w=c2w, axes=np.array("opencv")), {}),
    "npz of MegaSaM": ("a.npz", lambda c2w: npz(cam_c2w=c2w, depths=np.ones((2, 3, 3))), {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_path(tmp_path, name):
    file, content, options = FORMATS[name]
    data = content(C2W)
    (tmp_path / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    poses = read(tmp_path / file, **options)
    found = trajectory.relative_to_first(poses.w2c)
    np.testing.assert_allclose(found, trajectory.relative_to_first(W2C), atol=1e-6)


def test_the_lens_of_other_tools_is_read(tmp_path):
    (tmp_path / "a.json").write_text(nerfstudio(C2W))
    poses = read(tmp_path / "a.json")
    np.testing.assert_array_equal(poses.K[3], [[400, 0, 256], [0, 410, 200], [0, 0, 1]])
    assert poses.size == (400, 512)
    (tmp_path / "b.json").write_text(camera_path_json(C2W))
    assert read(tmp_path / "b.json").K[0, 0, 0] == pytest.approx(256 / np.tan(np.radians(25)))


ENCODINGS = ("utf-8-sig", "utf-16", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", [name for name in FORMATS if isinstance(FORMATS[name][1](C2W), str)])
def test_text_with_a_byte_order_mark_is_read(tmp_path, name, encoding):
    file, content, options = FORMATS[name]
    (tmp_path / file).write_bytes(content(C2W).replace("\n", "\r\n").encode(encoding))
    np.testing.assert_allclose(
        trajectory.relative_to_first(read(tmp_path / file, **options).w2c),
        trajectory.relative_to_first(W2C),
        atol=1e-6,
    )


def test_names_are_ordered_by_their_numbers():
    names = ["²1.png", "b10.png", "b9.png", "a.png"]
    assert [names[place] for place in in_natural_order(names)] == ["a.png", "b9.png", "b10.png", "²1.png"]


@pytest.mark.parametrize("name", ["images.txt", "images.bin"])
def test_files_that_colmap_itself_wrote(tmp_path, name):
    pycolmap = pytest.importorskip("pycolmap")
    pycolmap.set_random_seed(1)
    options = pycolmap.SyntheticDatasetOptions(num_frames_per_rig=12, num_points3D=20, num_rigs=1)
    truth = pycolmap.synthesize_dataset(options)
    truth.write_text(tmp_path) if name.endswith("txt") else truth.write_binary(tmp_path)
    images = sorted(truth.images.values(), key=lambda image: image.name)
    wanted = np.tile(np.eye(4), (len(images), 1, 1))
    order = in_natural_order([image.name for image in images])
    wanted[:, :3] = [images[place].cam_from_world().matrix() for place in order]
    np.testing.assert_allclose(read(tmp_path / name).w2c, wanted, atol=1e-9)


@pytest.mark.parametrize("cut", [0, 7, 8, 60, 90, -1])
def test_images_of_colmap_that_are_cut_short_are_refused(tmp_path, cut):
    (tmp_path / "images.bin").write_bytes(colmap_binary(C2W)[:cut])
    with pytest.raises(ContractError, match=r"images\.bin"):
        read(tmp_path / "images.bin")


def our(format: str) -> Callable[[np.ndarray], bytes]:
    def content(c2w: np.ndarray) -> bytes:
        import tempfile

        K = np.array([[120.0, 0, 64], [0, 125, 48], [0, 0, 1]])
        w2c = c2w if np.isnan(c2w).any() else np.linalg.inv(c2w)
        with tempfile.NamedTemporaryFile(suffix=".npz" if format == "ex4d" else ".json") as file:
            write(file.name, PoseFile(w2c, K, size=(96, 128)), format)
            with open(file.name, "rb") as written:
                return written.read()

    return content


MATRICES = {
    **{name: FORMATS[name] for name in FORMATS if "tum" not in name and name != "euroc" and "colmap" not in name},
    "ex4d": ("a.npz", our("ex4d"), {}),
    "json": ("a.json", our("json"), {}),
    "recammaster": ("a.json", our("recammaster"), {}),
    "re10k": ("a.txt", our("re10k"), {}),
}


def spoilt(how: str) -> np.ndarray:
    c2w = C2W.copy()
    if how == "scaled":
        c2w[:, :3, :3] *= 1.5
    elif how == "mirrored":
        c2w[:, :3, 0] *= -1
    elif how == "sheared":
        c2w[5, 0, 1] += 0.2
    elif how == "not finite":
        c2w[4, 1, 3] = np.nan
    elif how == "endless":
        c2w[4, 1, 3] = 1e30
    return c2w


@pytest.mark.parametrize("how", ["scaled", "mirrored", "sheared", "not finite", "endless"])
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_that_are_no_camera_are_refused(tmp_path, name, how):
    file, content, options = MATRICES[name]
    data = content(spoilt(how))
    (tmp_path / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ContractError) as caught:
        read(tmp_path / file, **options)
    refused_in_our_words(str(caught.value), file)


def refused_in_our_words(message: str, file: str) -> None:
    assert message.startswith(file)
    assert "\n" not in message
    foreign = (
        "inhomogeneous",
        "reshape",
        "could not convert",
        "broadcast",
        "Traceback",
        "setting an array",
        "dimension",
    )
    assert not [word for word in foreign if word in message], message


TABLES = {
    **{name: FORMATS[name] for name in ("tum", "euroc", "kitti", "flat matrices")},
    "re10k": ("a.txt", our("re10k"), {}),
}
ROW_FAULTS: dict[str, Callable[[list[str], str], list[str]]] = {
    "a cell too few": lambda rows, comma: [*rows[:5], rows[5].rpartition(comma)[0], *rows[6:]],
    "a cell too many": lambda rows, comma: [*rows[:5], rows[5] + comma + "1", *rows[6:]],
    "a word": lambda rows, comma: [*rows[:5], "x" + rows[5], *rows[6:]],
    "nan": lambda rows, comma: [*rows[:5], rows[5].rpartition(comma)[0] + comma + "nan", *rows[6:]],
    "inf": lambda rows, comma: [*rows[:5], rows[5].rpartition(comma)[0] + comma + "-inf", *rows[6:]],
    "cut within a row": lambda rows, comma: [*rows[:5], rows[5][: len(rows[5]) // 3]],
    "an underscore": lambda rows, comma: [*rows[:5], "1_0" + comma + rows[5].partition(comma)[2], *rows[6:]],
}


@pytest.mark.parametrize("how", ROW_FAULTS)
@pytest.mark.parametrize("name", TABLES)
def test_a_row_of_another_kind_is_named(tmp_path, name, how):
    file, content, options = TABLES[name]
    data = content(C2W)
    rows = (data.decode() if isinstance(data, bytes) else data).splitlines()
    start = next(index for index, row in enumerate(rows) if row[0].isdigit() and len(row) > 8)
    comma = "," if "," in rows[start] else " "
    (tmp_path / file).write_text("\n".join(rows[:start] + ROW_FAULTS[how](rows[start:], comma)))
    with pytest.raises(ContractError, match="row 6") as caught:
        read(tmp_path / file, **options)
    refused_in_our_words(str(caught.value), file)


@pytest.mark.parametrize("how", ["zero", "long", "twice the same time"])
@pytest.mark.parametrize("name", ["tum", "euroc"])
def test_quaternions_and_times_are_checked(tmp_path, name, how):
    file, content, _ = FORMATS[name]
    comma = "," if name == "euroc" else " "
    rows = content(C2W).splitlines()
    cells = rows[-1].split(comma)
    if how == "twice the same time":
        cells[0] = rows[-2].split(comma)[0]
    else:
        cells[4:] = [str(0.0 if how == "zero" else 3 * float(cell)) for cell in cells[4:]]
    (tmp_path / file).write_text("\n".join([*rows[:-1], comma.join(cells)]))
    with pytest.raises(ContractError, match="time" if "time" in how else "quaternion"):
        read(tmp_path / file)


REFUSED = {
    "flat matrices, unsaid": ("a.txt", lines(C2W.reshape(COUNT, 16)), "format=w2c or format=c2w"),
    "npy, unsaid": ("a.npy", npy(C2W), "format=w2c or format=c2w"),
    "npz, axes unsaid": ("a.npz", npz(c2w=C2W), "format=c2w"),
    "npz of something else": ("a.npz", npz(arr_0=C2W), "keys are arr_0"),
    "nine columns": ("a.txt", lines(np.ones((4, 9))), "9 columns; read are"),
    "three rows of angles": ("a.txt", "0 2 10 15\n0 -3 -10 -20\n0 0.02 0.09 0.16\n", "4 columns; read are"),
    "nanoseconds without names": (
        "a.csv",
        lines(np.array([[1.4e18, 0, 0, 0, 1, 0, 0, 0], [1.5e18, 0, 0, 0, 1, 0, 0, 0]]), ","),
        "format=euroc",
    ),
    "latin-1": ("a.txt", "# caméra\n".encode("latin-1") + tum(C2W).encode(), "UTF-8"),
    "utf-16 without its mark": ("a.txt", tum(C2W).encode("utf-16-le"), "UTF-8"),
    "nothing": ("a.txt", "", "no rows"),
    "a comment": ("a.txt", "# nothing\n", "no rows"),
    "another json": ("a.json", '{"cameras": []}', "keys are cameras; read are"),
    "a list": ("a.json", "[1, 2]", "no JSON object"),
    "words as numbers": ("a.json", json.dumps({"axes": "opencv", "w2c": W2C.astype(str).tolist()}), "numbers"),
    "ragged": ("a.json", json.dumps({"axes": "opencv", "w2c": [[1, 2], [3]]}), "numbers"),
    "no axes": ("a.json", json.dumps({"w2c": W2C.tolist()}), "axes"),
    "K too often": ("a.json", json.dumps({"axes": "opencv", "w2c": W2C.tolist(), "K": [np.eye(3).tolist()] * 5}), "K"),
    "no frames": ("a.json", '{"frames": []}', "frames"),
    "a flat extrinsics": ("a.npz", npz(extrinsics=C2W.reshape(COUNT, 16), intrinsics=np.eye(3)), "shape"),
    "a gap between frames": ("a.json", '{"frame0": {"cam01": ""}, "frame2": {"cam01": ""}}', "without a gap"),
    "K in px in re10k": ("a.txt", "u\n" + lines(np.column_stack([np.arange(3), np.full((3, 18), 500.0)])), "fractions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_no_format_is_refused_with_what_is_read(tmp_path, name):
    file, data, told = REFUSED[name]
    (tmp_path / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(ContractError, match=told) as caught:
        read(tmp_path / file)
    refused_in_our_words(str(caught.value), file)


def test_a_table_of_another_format_never_passes_for_the_one_that_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(lines(C2W[:, :3].reshape(COUNT, 12)))
    for format in set(READERS) - {"kitti", "w2c", "c2w"}:
        with pytest.raises(ContractError, match=f"not a {format} pose file"):
            read(tmp_path / "a.txt", format=format)


@pytest.mark.parametrize("suffix", [".txt", ".json", ".npz", ".npy", ".csv"])
def test_noise_and_folders_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0)
    for size in (1, 30, 5000):
        (tmp_path / f"a{suffix}").write_bytes(noise.bytes(size))
        for format in (None, *READERS):
            with pytest.raises(ContractError) as caught:
                read(tmp_path / f"a{suffix}", format=format)
            assert "\n" not in str(caught.value)
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(ConfigError, match="no such pose file"):
        read(tmp_path / f"folder{suffix}")


def test_lengths_of_another_unit_are_refused_unless_the_scale_is_said(tmp_path):
    w2c = trajectory.build("orbit", 5, 40, radius=2.0)
    write(tmp_path / "metres.txt", PoseFile(w2c), "tum")
    K = np.array([[120.0, 0, 64], [0, 125, 48], [0, 0, 1]])
    where = str(tmp_path / "metres.txt")
    for radius in (2000.0 * 1e3, 2e-4):  # depth in millimetres or larger, and vice versa
        with pytest.raises(ConfigError, match="scale"):
            camera_path.build(where, 5, 0, radius, K)
        with pytest.raises(ConfigError, match="scale"):
            camera_path.source_poses(where, 5, radius=radius)
        camera_path.build(where, 5, 0, radius, K, {"scale": 1.0})
    camera_path.build(where, 5, 0, 2.0, K)
    still = np.tile(np.eye(4), (5, 1, 1))
    write(tmp_path / "still.txt", PoseFile(still), "tum")
    camera_path.build(str(tmp_path / "still.txt"), 5, 0, 2000.0, K)


@pytest.mark.parametrize("network", ["da3", "vggt", "pi3", "vipe"])
def test_poses_of_networks_that_estimate_cameras(tmp_path, network: str):
    from scipy.spatial.transform import Rotation

    w2c = np.tile(np.eye(4), (5, 1, 1))
    w2c[:, :3, :3] = Rotation.from_euler("yx", [[3 * t, t] for t in range(5)], degrees=True).as_matrix()
    w2c[:, :3, 3] = [[t, 0.1 * t * t, -t] for t in range(5)]
    c2w, depth = np.linalg.inv(w2c), np.ones((5, 4, 4), np.float32)
    arrays = {
        "da3": {"depth": depth, "extrinsics": w2c[:, :3], "intrinsics": np.tile(np.eye(3), (5, 1, 1))},
        "vggt": {"depth": depth[..., None], "extrinsic": w2c[:, :3], "intrinsic": np.tile(np.eye(3), (5, 1, 1))},
        "pi3": {"camera_poses": c2w, "local_points": np.ones((5, 4, 4, 3), np.float32)},
        "vipe": {"data": c2w, "inds": np.arange(5)},
    }
    np.savez(tmp_path / "poses.npz", **arrays[network])
    np.testing.assert_allclose(read(tmp_path / "poses.npz").w2c, w2c, atol=1e-6)
