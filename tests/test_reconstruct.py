"""`ex4d reconstruct`: one video in, condition and mask out, in files that can be read back."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from pose_writers import write

from ex4d import isolation, synthetic, video
from ex4d.errors import BadSample, ConfigError, ContractError
from ex4d.evaluate.metrics import psnr
from ex4d.geometry import trajectory
from ex4d.geometry.camera import Camera
from ex4d.geometry.pose_file import PoseFile
from ex4d.reconstruct import reconstruct
from pipelines import cli

WORLD = synthetic.SyntheticConfig(num_videos=1, num_frames=5, size=(64, 64), seed=31, camera_motion="static")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return synthetic.write_corpus(tmp_path_factory.mktemp("clip"), WORLD)[0]


def test_what_is_marked_visible_is_what_the_new_camera_would_see(clip):
    view = reconstruct(clip, angle_deg=30.0, num_frames=5, size=(64, 64))
    scene, _ = synthetic.clip_scene(WORLD, 0)
    truth = np.stack(
        [
            scene.render(Camera(view.K, pose, (64, 64)), t / WORLD.fps, supersample=2)[0]
            for t, pose in enumerate(view.w2c)
        ]
    )
    assert view.visible[0].all()
    assert 0.2 < view.visible[-1].mean() < 0.98
    assert (view.cond_video[~view.visible] == 0).all()
    assert psnr(view.cond_video, truth, view.visible) > 24
    assert psnr(view.cond_video, truth, view.visible) > psnr(view.frames, truth) + 5


def test_videos_are_decoded_in_the_child_only_and_to_the_same_bytes(clip, tmp_path, monkeypatch):
    pts, _ = video.frame_pts(clip)
    frames = video.decode(clip, pts[:3], (64, 64), "crop")
    for name in ("probe", "frame_pts", "decode"):
        monkeypatch.setattr(video, name, lambda *_: pytest.fail("decoded outside the child"))
    assert reconstruct(clip, num_frames=3, size=(64, 64)).frames.tobytes() == frames.tobytes()
    assert cli.main(["view", str(clip), "--size", "64x64", "--output", str(tmp_path / "page.html")]) == 0


def test_a_video_of_a_few_pixels_is_a_refusal(tmp_path):
    video.write(tmp_path / "small.mp4", np.zeros((3, 8, 10, 3), np.uint8), 5)
    with pytest.raises(BadSample) as caught:
        reconstruct(tmp_path / "small.mp4", num_frames=3, size=None)
    assert caught.value.reason == "too_small"


def test_a_decoder_that_hangs_is_a_refusal(clip, monkeypatch):
    run = isolation.run
    monkeypatch.setattr(isolation, "run", lambda name, args: run(name, args, isolation.Limits(wall_s=1e-6)))
    with pytest.raises(BadSample) as caught:
        reconstruct(clip, num_frames=3, size=(64, 64))
    assert caught.value.reason == "decode_timeout"


def test_the_command_writes_files_that_say_the_same(clip, tmp_path, capsys):
    argv = [
        "reconstruct",
        str(clip),
        "--angle-deg",
        "45",
        "--num-frames",
        "3",
        "--save-mesh",
        "--output",
        str(tmp_path),
    ]
    assert cli.main(argv) == 0
    assert "preview.png" in capsys.readouterr().out
    cameras = json.loads((tmp_path / "camera.json").read_text())
    visible = np.load(tmp_path / "mask.npz")["visible"]
    shown, _ = video.read(tmp_path / "mask.mp4")
    assert cameras["axes"] == "opencv"
    assert cameras["size"] == [64, 64]
    assert np.shape(cameras["w2c"]) == (3, 4, 4)
    assert visible.shape == (3, 64, 64)
    assert ((shown[..., 0] > 127) == visible).all()
    assert video.read(tmp_path / "cond.mp4")[0].shape == (3, 64, 64, 3)
    assert sorted(p.name for p in (tmp_path / "mesh").iterdir()) == ["000000.ply", "000001.ply", "000002.ply"]


def test_a_folder_of_pictures_is_a_video(clip, tmp_path, capsys):
    import cv2

    frames, _ = video.read(clip)
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"clip/frame_{number}.png"), frame[..., ::-1])
    (tmp_path / "clip.depth.npz").write_bytes(clip.with_suffix(".depth.npz").read_bytes())
    choices = {"angle_deg": 30.0, "num_frames": 5, "size": (64, 64)}
    view, twin = reconstruct(tmp_path / "clip", image_fps=12.5, **choices), reconstruct(clip, **choices)
    assert view.fps == 12.5
    np.testing.assert_array_equal(view.frames, twin.frames)
    np.testing.assert_array_equal(view.z_depth, twin.z_depth)
    np.testing.assert_array_equal(view.visible, twin.visible)
    flags = ["--depth", "auto", "--image-fps", "10", "--num-frames", "3", "--size", "32x32"]
    assert cli.main(["reconstruct", str(tmp_path / "clip"), *flags, "--output", str(tmp_path / "out")]) == 0
    assert "depth=auto: sidecar" in capsys.readouterr().out
    assert video.read(tmp_path / "out/cond.mp4")[1] == 10
    assert cli.main(["view", str(tmp_path / "clip"), "--size", "32x32", "--output", str(tmp_path / "a.html")]) == 0
    assert '"shape": [5, 32, 32]' in (tmp_path / "a.html").read_text()
    (tmp_path / "bare").mkdir()
    assert cli.main(["reconstruct", str(tmp_path / "bare"), "--output", str(tmp_path / "no")]) == 1
    assert "holds no JPEG or PNG" in capsys.readouterr().err


def test_a_file_of_poses_is_a_trajectory_too(clip, tmp_path):
    path = trajectory.build("orbit", 5, 20.0, 2.0)
    write(tmp_path / "poses.json", PoseFile(path), "json")
    view = reconstruct(clip, trajectory=str(tmp_path / "poses.json"), num_frames=5, size=(64, 64))
    np.testing.assert_allclose(view.w2c, path, atol=1e-9)
    write(tmp_path / "short.json", PoseFile(path[:2]), "json")
    with pytest.raises(ConfigError, match="2 poses"):
        reconstruct(clip, trajectory=str(tmp_path / "short.json"), num_frames=5, size=(64, 64))


def test_what_cannot_be_done_is_said(clip, tmp_path, capsys):
    with pytest.raises(BadSample, match="too_short"):
        reconstruct(clip, num_frames=99)
    with pytest.raises(ConfigError, match="orbit"):
        reconstruct(clip, trajectory="sideways", num_frames=5, size=(64, 64))
    assert cli.main(["reconstruct", str(clip), "--depth", "guess", "--output", str(tmp_path)]) == 2
    assert "parallax" in capsys.readouterr().err
    assert cli.main(["reconstruct", str(tmp_path / "none.mp4"), "--output", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--size", "97x97"], "multiple of 2"),
        (["--size", "0x0"], "size"),
        (["--size", "16x100000"], "8192"),
        (["--num-frames", "0"], "at least 1"),
        (["--num-frames", "-1"], "at least 1"),
        (["--fov-deg", "nan"], "fov_deg"),
        (["--angle-deg", "nan"], "angle_deg"),
        (["--trajectory", "custom"], "key_poses"),
    ],
)
def test_a_number_out_of_range_ends_with_2_and_leaves_no_file(clip, tmp_path, capsys, flags, named):
    assert cli.main(["reconstruct", str(clip), "--output", str(tmp_path / "view"), *flags]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "view").exists()


def test_an_output_that_cannot_be_is_said_before_the_work(clip, tmp_path, capsys):
    (tmp_path / "file").touch()
    for output in ("file", "file/below"):
        assert cli.main(["reconstruct", str(tmp_path / "no.mp4"), "--output", str(tmp_path / output)]) == 2
        assert "output" in capsys.readouterr().err
    argv = ["generate", "--video", str(clip), "--adapter", "nowhere", "--output"]
    for output, named in ((str(clip), "overwritten"), (str(tmp_path / "a.txt"), "mp4"), (str(tmp_path), "mp4")):
        assert cli.main([*argv, output]) == 2
        assert named in capsys.readouterr().err


def test_a_video_of_odd_sides_is_taken_without_its_last_line(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 33, 47, 3), np.uint8)
    video.write(tmp_path / "odd.mkv", frames, 10, lossless=True)
    z_depth = np.linspace(1, 3, frames[..., 0].size, dtype=np.float32).reshape(frames.shape[:3])
    np.savez(tmp_path / "odd.depth.npz", z_depth=z_depth)
    assert reconstruct(tmp_path / "odd.mkv", num_frames=2, size=None).cond_video.shape == (2, 32, 46, 3)


def test_the_reason_names_the_video(tmp_path, capsys):
    assert cli.main(["reconstruct", str(tmp_path / "none.mp4"), "--output", str(tmp_path / "view")]) == 1
    assert "none.mp4" in capsys.readouterr().err


def write_poses(path, w2c, **facts) -> str:
    path.write_text(json.dumps({"axes": "opencv", "w2c": np.asarray(w2c).tolist(), **facts}))
    return str(path)


def truth_of(world, w2c, K) -> np.ndarray:
    """Return the exact views of the new cameras: w2c [T, 4, 4] from the first source camera, K [3, 3] or [T, 3, 3]."""
    scene, cameras = synthetic.clip_scene(world, 0)
    K = np.broadcast_to(K, (len(w2c), 3, 3))
    pictures = [
        scene.render(Camera(K[t], pose @ cameras[0].w2c, world.size), t / world.fps, supersample=2)[0]
        for t, pose in enumerate(w2c)
    ]
    return np.stack(pictures)


@pytest.mark.parametrize("zoom", [2.0, 0.7])
def test_a_zoom_is_what_the_lens_would_see(clip, tmp_path, zoom):
    argv = ["reconstruct", str(clip), "--trajectory", "zoom", "-t", f"zoom={zoom}", "--output", str(tmp_path)]
    assert cli.main(argv) == 0
    cameras = json.loads((tmp_path / "camera.json").read_text())
    K = np.array(cameras["K"])
    assert K.shape == (5, 3, 3)
    np.testing.assert_allclose(K[:, 0, 0] / K[0, 0, 0], zoom ** np.linspace(0, 1, 5))
    np.testing.assert_allclose(cameras["w2c"], np.tile(np.eye(4), (5, 1, 1)))
    visible, cond_video = np.load(tmp_path / "mask.npz")["visible"], video.read(tmp_path / "cond.mp4")[0]
    truth = truth_of(WORLD, np.array(cameras["w2c"]), K)
    assert visible[0].all()
    assert visible[-1].mean() > 0.3
    assert psnr(cond_video[-1], truth[-1], visible[-1]) > 22
    assert psnr(cond_video[-1], truth[-1], visible[-1]) > psnr(truth[0], truth[-1], visible[-1]) + 5
    again = reconstruct(clip, trajectory=str(tmp_path / "camera.json"), num_frames=5, size=(64, 64))
    np.testing.assert_allclose(again.view_K, K)  # a zoom that was written is a path like any other
    assert np.array_equal(again.visible, visible)


def test_a_moving_source_camera_is_taken_out(tmp_path):
    """New poses are relative to the first camera; if the source's poses are known, its motion leaves no trace."""
    world = dataclasses.replace(WORLD, seed=33, camera_motion="strong", moving_bodies=False)
    path = synthetic.write_corpus(tmp_path, world)[0]
    _, cameras = synthetic.clip_scene(world, 0)
    poses = write_poses(tmp_path / "source.json", [camera.w2c for camera in cameras])
    size = {"num_frames": 5, "size": (64, 64)}
    held = {"trajectory": "orbit", "angle_deg": 15.0}
    view = reconstruct(path, **held, **size, source_poses=poses)
    blind = reconstruct(path, **held, **size, cameras="none")
    known = reconstruct(path, **held, **size)  # the depth file of the corpus has the cameras too
    assert np.array_equal(known.visible, view.visible)
    assert known.choices["cameras"] == "estimator"
    assert blind.source_w2c is None
    truth = truth_of(world, view.w2c, view.K)
    last = view.visible[-1]
    assert last.mean() > 0.2
    assert psnr(view.cond_video[-1], truth[-1], last) > 24
    assert psnr(view.cond_video[-1], truth[-1], last) > psnr(blind.cond_video[-1], truth[-1], last) + 5
    np.testing.assert_allclose(view.source_w2c, [c.w2c @ np.linalg.inv(cameras[0].w2c) for c in cameras], atol=1e-9)
    argv = ["reconstruct", str(path), "--source-poses", poses, "--angle-deg", "15", "--output", str(tmp_path / "view")]
    assert cli.main(argv) == 0
    assert np.array_equal(np.load(tmp_path / "view" / "mask.npz")["visible"], view.visible)
    assert np.shape(json.loads((tmp_path / "view" / "camera.json").read_text())["source_w2c"]) == (5, 4, 4)


def test_cameras_of_parallax_take_the_motion_of_the_source_out(tmp_path, capsys):
    """A hand-held clip without poses: fixed in the world, the view is what a still camera would see."""
    world = dataclasses.replace(WORLD, size=(96, 96), num_frames=9, seed=5, camera_motion="strong", moving_bodies=False)
    path = synthetic.write_corpus(tmp_path, world)[0]
    asked = {"trajectory": "orbit", "angle_deg": 15.0, "num_frames": 9, "size": (96, 96)}
    view = reconstruct(path, depth="parallax", **asked)
    scale = np.median(np.load(path.with_suffix(".depth.npz"))["z_depth"]) / np.median(view.z_depth)
    errors = {}
    for motion in ("remove", "keep"):
        shown = view if motion == "remove" else reconstruct(path, depth="parallax", source_motion="keep", **asked)
        fixed = view.w2c.copy()
        fixed[:, :3, 3] *= scale
        truth = truth_of(world, fixed, view.K)
        errors[motion] = psnr(shown.cond_video[-1], truth[-1], shown.visible[-1])
    print(errors)
    assert errors["remove"] > errors["keep"] + 3
    assert view.choices["source_motion"] == "remove"
    argv = [
        "reconstruct",
        str(path),
        "--angle-deg",
        "15",
        "--output",
        str(tmp_path / "view"),
        "--persistent-frames",
        "2",
    ]
    assert cli.main([*argv, "--num-frames", "2", "--cameras", "none"]) == 0
    assert "stand still" in capsys.readouterr().out
    written = json.loads((tmp_path / "view" / "camera.json").read_text())
    assert written["version"] == 2
    assert written["source_w2c"] is None
    assert written["source_motion"] is None


def test_what_another_camera_sees_is_asked_by_poses_that_stay_where_they_are(tmp_path):
    """Cameras A and B in one world: A filmed, B's poses are no path that begins at A (`rebase=false`)."""
    world = dataclasses.replace(WORLD, seed=33, camera_motion="strong", moving_bodies=False)
    path = synthetic.write_corpus(tmp_path, world)[0]
    _, cameras = synthetic.clip_scene(world, 0)
    source = np.stack([camera.w2c for camera in cameras])
    radius = reconstruct(path, num_frames=5, size=(64, 64)).choices["radius"]
    beside = trajectory.build("orbit", 2, 20.0, radius)[-1] @ source[:1].repeat(5, 0)  # 20° beside A's first, still
    places = [np.linalg.inv(np.diag([1, 1, 1, 1.0])), np.array(trajectory.build("orbit", 2, 50.0, 3.0)[-1])]
    for world_of in places:  # the same two cameras, told in two worlds
        a = write_poses(tmp_path / "a.json", source @ world_of)
        b = write_poses(tmp_path / "b.json", beside @ world_of)
        asked = {"trajectory": b, "source_poses": a, "num_frames": 5, "size": (64, 64)}
        view = reconstruct(path, trajectory_options={"rebase": False}, **asked)
        np.testing.assert_allclose(view.w2c, beside @ np.linalg.inv(source[0]), atol=1e-6)
        assert not view.visible[0].all()
        assert not view.starts_at_source
        truth = truth_of(world, view.w2c, view.K)
        assert psnr(view.cond_video, truth, view.visible) > 23
        rebased = reconstruct(path, **asked)
        np.testing.assert_allclose(rebased.w2c[0], np.eye(4), atol=1e-6)
    own = write_poses(tmp_path / "own.json", beside @ np.linalg.inv(source[0]))  # in the world of A's first picture
    alone = {"trajectory": own, "trajectory_options": {"rebase": False}, "num_frames": 5, "size": (64, 64)}
    np.testing.assert_allclose(reconstruct(path, **alone).w2c, view.w2c, atol=1e-6)
    with pytest.raises(ConfigError, match="rebase"):
        reconstruct(path, **(alone | {"trajectory_options": {"rebase": 1.0}}))


def test_source_poses_in_another_unit_are_scaled(tmp_path):
    world = dataclasses.replace(WORLD, seed=33, camera_motion="strong")
    path = synthetic.write_corpus(tmp_path, world)[0]
    _, cameras = synthetic.clip_scene(world, 0)
    w2c = np.stack([camera.w2c for camera in cameras])
    metres = write_poses(tmp_path / "m.json", w2c)
    w2c[:, :3, 3] *= 100
    centimetres = write_poses(tmp_path / "cm.json", w2c)
    first = reconstruct(path, num_frames=5, size=(64, 64), source_poses=metres)
    second = reconstruct(path, num_frames=5, size=(64, 64), source_poses=centimetres, source_scale=0.01)
    np.testing.assert_allclose(first.source_w2c, second.source_w2c, atol=1e-9)
    short = write_poses(tmp_path / "short.json", w2c[:2])
    for wrong, scale, named in ((metres, float("nan"), "source_scale"), (short, 1.0, "source_poses.*2 poses")):
        with pytest.raises(ConfigError, match=named):
            reconstruct(path, num_frames=5, size=(64, 64), source_poses=wrong, source_scale=scale)


def test_key_poses_become_a_smooth_path_in_radii(clip, tmp_path):
    keys = [{"eye": [0, 0, 0], "look_at": [0, 0, 1]}, {"eye": [0.5, 0, 0.1], "look_at": [0, 0, 1]}]
    keys.append({"eye": [0.8, -0.2, 0.4], "look_at": [0, 0, 1]})
    (tmp_path / "keys.json").write_text(json.dumps({"axes": "opencv", "key_poses": keys}))
    argv = ["reconstruct", str(clip), "--trajectory", str(tmp_path / "keys.json"), "--output", str(tmp_path / "view")]
    assert cli.main(argv) == 0
    w2c = np.array(json.loads((tmp_path / "view" / "camera.json").read_text())["w2c"])
    radius = reconstruct(clip, num_frames=5, size=(64, 64)).choices["radius"]
    eyes = np.linalg.inv(w2c)[:, :3, 3] / radius
    np.testing.assert_allclose(eyes[[0, 2, 4]], [key["eye"] for key in keys], atol=1e-9)  # through each of the three
    assert np.linalg.norm(eyes[1] - (eyes[0] + eyes[2]) / 2) > 1e-3  # a spline, not a polygon
    seen = w2c @ [0, 0, radius, 1]
    np.testing.assert_allclose(seen[[0, 2, 4], :2], 0, atol=1e-9)
    with pytest.raises(ConfigError, match="only rebase"):
        reconstruct(clip, trajectory=str(tmp_path / "keys.json"), trajectory_options={"scale": 3.0}, num_frames=5)
    for bad in ([], [{"eye": [0, 0, 0]}], [[1, 2], [3, 4]], [{"eye": [0, 0, 1], "look_at": [0, 0, 1]}], 7):
        (tmp_path / "bad.json").write_text(json.dumps({"axes": "opencv", "key_poses": bad}))
        with pytest.raises(ContractError, match=r"bad\.json"):
            reconstruct(clip, trajectory=str(tmp_path / "bad.json"), num_frames=5, size=(64, 64))


def zoomed(num_frames: int) -> list:
    """Return K [T, 3, 3] whose focal lengths grow evenly from 50 to 100 px."""
    return [[[f, 0, 32], [0, f, 32], [0, 0, 1]] for f in np.linspace(50, 100, num_frames)]


def test_options_of_paths_and_files(clip, tmp_path):
    where = {"num_frames": 5, "size": (64, 64)}
    view = reconstruct(clip, trajectory="dolly", trajectory_options={"distance": 0.25}, **where)
    np.testing.assert_allclose(view.w2c[-1, 2, 3], -0.25 * view.choices["radius"])
    file = write_poses(tmp_path / "poses.json", trajectory.build("orbit", 5, 20.0, 2.0))
    view = reconstruct(clip, trajectory=file, trajectory_options={"scale": 0.5}, **where)
    np.testing.assert_allclose(view.w2c, trajectory.build("orbit", 5, 20.0, 1.0), atol=1e-9)
    longer = write_poses(tmp_path / "longer.json", trajectory.build("orbit", 9, 20.0, 1.0), K=zoomed(9))
    view = reconstruct(clip, trajectory=longer, trajectory_options={"resample": True}, **where)
    np.testing.assert_allclose(view.w2c, trajectory.build("orbit", 9, 20.0, 1.0)[::2], atol=1e-9)
    np.testing.assert_allclose(view.view_K[:, 0, 0] / view.K[0, 0], 1 + np.arange(0, 9, 2) / 8)
    for name, options, key in (
        ("orbit", {"zoom": 2.0}, "zoom"),
        ("zoom", {"zoom": -1.0}, "zoom"),
        ("zoom", {"zoom": "far"}, "zoom"),
        (file, {"distance": 1.0}, "distance"),
        (file, {"scale": 0.0}, "scale"),
        (file, {"format": "matlab"}, "format"),
    ):
        with pytest.raises(ConfigError) as caught:
            reconstruct(clip, trajectory=name, trajectory_options=options, **where)
        assert caught.value.key == key
    assert cli.main(["reconstruct", str(clip), "-t", "zoom", "--output", str(tmp_path / "none")]) == 2


def test_glb_holds_seen_and_occluded_faces_apart(clip, tmp_path):
    import trimesh

    assert (
        cli.main(["reconstruct", str(clip), "--num-frames", "2", "--save-mesh", "glb", "--output", str(tmp_path)]) == 0
    )
    assert sorted(p.name for p in (tmp_path / "mesh").iterdir()) == ["000000.glb", "000001.glb"]
    scene = trimesh.load(tmp_path / "mesh" / "000001.glb")
    assert set(scene.geometry) == {"visible", "occluded"}
    assert len(np.unique(scene.geometry["visible"].visual.vertex_colors[:, :3], axis=0)) > 100
    assert (scene.geometry["occluded"].visual.vertex_colors[:, :3] == 0).all()
    assert sum(len(part.faces) for part in scene.geometry.values()) == 2 * 63 * 63 + 2 * (64 + 64 - 2)


def test_metric_depth_keeps_its_scale(tmp_path, monkeypatch):
    """Metric disparity is inverted, not stretched between percentiles."""
    from ex4d import depth

    path = synthetic.write_corpus(tmp_path, WORLD)[0]

    def metric(frames, request):
        z_depth = np.load(path.with_suffix(".depth.npz"))["z_depth"][: len(frames)]
        return depth.Geometry((1 / z_depth).astype(np.float32), "disparity", None, True, {})

    monkeypatch.setitem(depth.ESTIMATORS, "depth-pro", metric)
    exact = reconstruct(path, num_frames=2, size=(64, 64)).z_depth
    np.testing.assert_allclose(
        reconstruct(path, depth="depth-pro", num_frames=2, size=(64, 64)).z_depth, exact, rtol=1e-5
    )


HOSTILE = {
    "empty.mp4": b"",
    "text.mp4": b"no video at all\n",
    "concat.mp4": b"ffconcat version 1.0\nfile secret.mp4\n",
    "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n",
    "cut.mp4": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_video_is_named_with_its_reason(clip, tmp_path, capsys, name):
    (tmp_path / "secret.mp4").write_bytes(clip.read_bytes())
    data = HOSTILE[name]
    (tmp_path / name).write_bytes(clip.read_bytes()[: clip.stat().st_size // 3] if data is None else data)
    (tmp_path / name).with_suffix(".depth.npz").write_bytes(clip.with_suffix(".depth.npz").read_bytes())
    assert cli.main(["reconstruct", str(tmp_path / name), "--output", str(tmp_path / "view")]) == 1
    assert name in capsys.readouterr().err
    assert not (tmp_path / "view").exists()


def test_hostile_media_end_with_a_reason(media, tmp_path, capsys):
    for path in sorted((media / "derived_hostile").iterdir()):
        if path.is_dir() or path.name.startswith(("README", "bitflips")):
            continue
        argv = ["reconstruct", str(path), "--num-frames", "2", "--size", "64x64", "--output", str(tmp_path / "view")]
        status = cli.main(argv)  # no depth file lies beside any of them: none can succeed
        assert status == 1, path.name
        assert path.name in capsys.readouterr().err
