"""MultiCamVideo and SynCamVideo, as published, become pairs of cameras: the right frames, poses and lens."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from pair_corpus import samples
from pose_writers import write
from small_corpus import choices, inline

from ex4d import synthetic, video
from ex4d.data.verify import verify
from ex4d.geometry import trajectory, trajectory_files
from ex4d.geometry.camera import Camera, intrinsics, relative_to
from ex4d.geometry.masks import MaskConfig
from ex4d.geometry.pose_file import PoseFile
from pipelines import cli
from pipelines.inputs import multi_camera

WORLD = synthetic.SyntheticConfig(num_videos=1, num_frames=11, size=(64, 64), seed=3)
FOCAL_MM = 24.0
FOV_DEG = float(np.degrees(2 * np.arctan(multi_camera.SENSOR_MM / 2 / FOCAL_MM)))


def film(scene_folder, angles, is_still):
    """Write a scene in the published layout, filmed by a camera at each angle; return {camNN: (cameras, z_depth)}."""
    scene, path = synthetic.clip_scene(WORLD, 0)
    path = [path[0]] * len(path) if is_still else path
    (scene_folder / "videos").mkdir(parents=True)
    (scene_folder / "cameras").mkdir()
    frames_of, filmed = {}, {}
    for number, angle_deg in enumerate(angles, 1):
        swings = trajectory.build("orbit", len(path), angle_deg, 2.0)
        last = swings[-1]
        lens = intrinsics(WORLD.size, FOV_DEG)
        cameras = [Camera(lens, last @ camera.w2c, WORLD.size) for camera in path]
        frames, z_depth = synthetic.render_clip(scene, cameras, WORLD.fps, WORLD.supersample)
        (scene_folder / "videos" / f"cam{number:02d}.mp4").write_bytes(video.encode(frames, WORLD.fps))
        poses = PoseFile(np.stack([camera.w2c for camera in cameras]))
        write(scene_folder / "one.json", poses, "recammaster")
        for name, entry in json.loads((scene_folder / "one.json").read_text()).items():
            frames_of.setdefault(name, {})[f"cam{number:02d}"] = entry["cam01"]
        filmed[f"cam{number:02d}"] = (cameras, z_depth)
    (scene_folder / "one.json").unlink()
    (scene_folder / "cameras" / "camera_extrinsics.json").write_text(json.dumps(frames_of))
    return filmed


@pytest.fixture(scope="module", params=["MultiCamVideo-Dataset", "SynCamVideo-Dataset"])
def published(request, tmp_path_factory):
    """(the dataset's folder, what each camera of its scene filmed); in SynCamVideo the cameras stand still."""
    folder = tmp_path_factory.mktemp("published") / request.param
    filmed = film(folder / "train/f24_aperture5/scene1", (0.0, 12.0, -15.0), request.param.startswith("Syn"))
    return folder, filmed


def test_a_scene_becomes_samples_with_its_cameras_and_its_lens(published, tmp_path, capsys):
    folder, filmed = published
    pairs = tmp_path / "pairs"
    assert cli.main(["import", str(folder), "--output", str(pairs), "--pairs-per-scene", "3"]) == 0
    assert "3 pairs of 1 scenes, 0 skipped" in capsys.readouterr().out
    scene = pairs / "train/f24_aperture5/scene1"
    names = sorted(path.stem for path in scene.glob("*.mp4") if ".source" not in path.name)
    assert [name[:5] for name in names] == ["cam01", "cam02", "cam03"]  # each is a target once
    assert all(name[:5] != name[6:] for name in names)
    for name in names:
        target, source = name.split("-")
        for stem, camera in ((name, target), (f"{name}.source", source)):
            video_file = folder / f"train/f24_aperture5/scene1/videos/{camera}.mp4"
            assert (scene / f"{stem}.mp4").samefile(video_file)
            poses = trajectory_files.read(scene / f"{stem}.camera.json")
            np.testing.assert_allclose(poses.w2c, [one.w2c for one in filmed[camera][0]], atol=1e-5)
        np.savez(scene / f"{name}.source.depth.npz", z_depth=filmed[source][1])
    few = {"members": ("source",), "num_frames": 5, "size": (64, 64), "clips_per_shot": 1, "near_duplicates": "off"}
    config = choices(pairs, tmp_path / "out", **few, masks=MaskConfig(num_masks=1, erosion_px=(1, 1)))
    result = inline(config)
    assert (result.exit_code, result.counts["samples"], list(result.rejects)) == (0, 3, [])
    assert verify(config.output, full=True).problems == ()
    for sample in samples(config.output):
        target, source = sample.provenance["source_path"].rpartition("/")[2].removesuffix(".mp4").split("-")
        np.testing.assert_allclose(sample.K, filmed[target][0][0].K, rtol=1e-6)
        first = round(sample.provenance["start_s"] * WORLD.fps)
        own, other = (np.stack([one.w2c for one in filmed[name][0]]) for name in (target, source))
        expected = relative_to(other, own)[first : first + 5]
        np.testing.assert_allclose(sample.w2c[0], expected, atol=1e-5)
        assert 0 < sample.provenance["scores"]["warp_error"] < 0.06


def test_the_draw_of_pairs_is_the_same_for_a_scene_and_a_seed(published, tmp_path):
    folder, _ = published
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        assert cli.main(["import", str(folder), "--output", str(tmp_path / name), "--seed", str(seed)]) == 0
        drawn.append(sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.mp4")))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2 * 6  # all that three cameras have, where ten were asked for
    assert cli.main(["import", str(folder), "--output", str(tmp_path / "a"), "--pairs-per-scene", "1"]) == 0


def test_a_scene_that_cannot_be_used_costs_itself_alone(published, tmp_path, capsys):
    folder, _ = published
    shutil.copytree(folder, tmp_path / "in")
    scene = tmp_path / "in/train/f24_aperture5/scene1"
    for name, extrinsics in (("scene2", "no JSON"), ("scene3", '{"frame0": {"cam01": "[1 2 3]"}}')):
        shutil.copytree(scene, scene.parent / name)
        (scene.parent / name / multi_camera.EXTRINSICS).write_text(extrinsics)
    assert cli.main(["import", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--pairs-per-scene", "2"]) == 0
    told = capsys.readouterr()
    assert "2 pairs of 1 scenes, 2 skipped" in told.out
    assert told.err.count("skipped:") == 2
    for arguments in (["nowhere"], [str(tmp_path / "out" / "train")]):
        assert cli.main(["import", *arguments, "--output", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()
    assert cli.main(["import", str(folder), "--output", str(folder / "inside")]) == 2
