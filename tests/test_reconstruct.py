"""`ex4d reconstruct`: one video in, condition and mask out, in files that can be read back."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ex4d import synthetic, video
from ex4d.errors import BadSample, ConfigError
from ex4d.evaluate.metrics import psnr
from ex4d.geometry import trajectory
from ex4d.geometry.camera import Camera
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


def test_a_file_of_poses_is_a_trajectory_too(clip, tmp_path):
    path = trajectory.build("orbit", 5, 20.0, 2.0)
    trajectory.save(tmp_path / "poses.json", path, "json")
    view = reconstruct(clip, trajectory_name=str(tmp_path / "poses.json"), num_frames=5, size=(64, 64))
    np.testing.assert_allclose(view.w2c, path, atol=1e-9)
    trajectory.save(tmp_path / "short.json", path[:2], "json")
    with pytest.raises(ConfigError, match="2 poses"):
        reconstruct(clip, trajectory_name=str(tmp_path / "short.json"), num_frames=5, size=(64, 64))


def test_what_cannot_be_done_is_said(clip, tmp_path, capsys):
    with pytest.raises(BadSample, match="too_short"):
        reconstruct(clip, num_frames=99)
    with pytest.raises(ConfigError, match="orbit"):
        reconstruct(clip, trajectory_name="sideways", num_frames=5, size=(64, 64))
    assert cli.main(["reconstruct", str(clip), "--depth", "guess", "--output", str(tmp_path)]) == 2
    assert "parallax" in capsys.readouterr().err
    assert cli.main(["reconstruct", str(tmp_path / "none.mp4"), "--output", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--size", "97x97"], "even"),
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
    for output, named in ((str(clip), "lost"), (str(tmp_path / "a.txt"), "mp4"), (str(tmp_path), "mp4")):
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
