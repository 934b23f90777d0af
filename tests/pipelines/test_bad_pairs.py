"""Unusable pairs, by accident or on purpose: each is rejected alone, with its reason."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pose_writers
import pytest
from pair_corpus import FEW, WORLD, film, rewrite, write
from small_corpus import choices, inline

from ex4d import synthetic, video
from ex4d.errors import ConfigError
from ex4d.geometry import trajectory_files
from ex4d.geometry.masks import MaskConfig
from ex4d.geometry.pose_file import PoseFile
from pipelines.preprocess import pairs
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.filters import FilterConfig
from pipelines.preprocess.stages import pair


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    synthetic.write_corpus(folder, WORLD)
    return folder


def cut(path: Path, **changes) -> None:
    """Write a video again with other frames, rate or size."""
    frames, fps = video.read(path)
    frames = frames[changes.get("first", 0) : changes.get("count")][
        :, :: changes.get("step", 1), :: changes.get("step", 1)
    ]
    path.write_bytes(video.encode(np.ascontiguousarray(frames), changes.get("fps", fps)))


def zoomed(tree: dict) -> None:
    tree["K"] = [[[40 + t, 0, 48], [0, 40 + t, 32], [0, 0, 1]] for t in range(11)]


def as_disparity(path: Path) -> None:
    with np.load(path, allow_pickle=False) as file:
        np.savez(path, disparity=1 / file["z_depth"])


def as_relative(path: Path) -> None:
    with np.load(path, allow_pickle=False) as file:
        np.savez(path, depths=1 / file["z_depth"], kind="disparity")


def as_recammaster(path: Path) -> None:
    pose_writers.write(path, trajectory_files.read(path), "recammaster")


def move(tree: dict, distance: float) -> None:
    for pose in tree["w2c"]:
        pose[0][3] = distance


def shares(files: pairs.PairFiles) -> None:
    for path in files[1:]:
        write(path, K=None, size=None)
    depth = Path(files.source).with_suffix(".depth.npz")
    with np.load(depth, allow_pickle=False) as file:
        np.savez(depth, z_depth=file["z_depth"], K=[[0.6, 0, 0.5], [0, 0.6, 0.5], [0, 0, 1]])


def change_resolution(path: Path) -> None:
    frames, fps = video.read(path)
    parts = []
    for number, piece in enumerate((frames[:5], np.ascontiguousarray(frames[5:, ::2, ::2]))):
        part = path.with_suffix(f".{number}.ts")
        with av.open(str(part), "w", format="mpegts") as file:
            stream = file.add_stream("libx264", rate=int(fps))
            stream.height, stream.width, stream.pix_fmt = *piece.shape[1:3], "yuv420p"
            for t, frame in enumerate(piece):
                picture = av.VideoFrame.from_ndarray(frame)
                picture.pts = 5 * number + t
                picture.time_base = Fraction(1, int(fps))
                file.mux(stream.encode(picture))
            file.mux(stream.encode())
        parts.append(part.read_bytes())
        part.unlink()
    path.write_bytes(b"".join(parts))


HARM = {
    "no video": ("pair_missing", lambda f: Path(f.source).unlink()),
    "an empty video": ("empty_file", lambda f: Path(f.source).write_bytes(b"")),
    "no frames before the clip": ("pair_frames", lambda f: cut(Path(f.source), first=2)),
    "another resolution in the middle": ("resolution_changed", lambda f: change_resolution(Path(f.source))),
    "no camera": ("pair_missing", lambda f: Path(f.camera).unlink()),
    "no depth": ("depth_missing", lambda f: Path(f.source).with_suffix(".depth.npz").unlink()),
    "short": ("pair_frames", lambda f: cut(Path(f.source), count=4)),
    "another rate": ("pair_frames", lambda f: cut(Path(f.source), fps=5.0)),
    "small": ("pair_size", lambda f: cut(Path(f.source), step=2)),
    "no mp4": ("unknown_container", lambda f: Path(f.source).write_bytes(b"text " * 99)),
    "few poses": (
        "pair_cameras",
        lambda f: rewrite(Path(f.source_camera), lambda tree: tree.update(w2c=tree["w2c"][:4])),
    ),
    "no JSON": ("pair_cameras", lambda f: Path(f.camera).write_text("{")),
    "no motion": (
        "pair_cameras",
        lambda f: rewrite(Path(f.camera), lambda tree: tree.update(w2c=[[[2.0] * 4] * 4] * 11)),
    ),
    "zoom": ("pair_cameras", lambda f: rewrite(Path(f.camera), zoomed)),
    "K of zeros": ("pair_cameras", lambda f: rewrite(Path(f.camera), lambda tree: tree.update(K=[[0.0] * 3] * 3))),
    "an endless K": ("pair_cameras", lambda f: write(f.camera, K=[[1e300, 0, 48], [0, 1e300, 32], [0, 0, 1]])),
    "a K of nothing": (
        "pair_cameras",
        lambda f: write(f.source_camera, K=[[1e-300, 0, 48], [0, 1e-300, 32], [0, 0, 1]]),
    ),
    "a far centre": ("pair_cameras", lambda f: write(f.camera, K=[[90.0, 0, 1e300], [0, 90.0, 32], [0, 0, 1]])),
    "no numbers in K": ("pair_cameras", lambda f: write(f.camera, K=[["a", 0, 0], [0, 1, 0], [0, 0, 1]])),
    "NaN in K": ("pair_cameras", lambda f: write(f.camera, K=[[float("nan"), 0, 0], [0, 1, 0], [0, 0, 1]])),
    "far away": ("pair_cameras", lambda f: rewrite(Path(f.camera), lambda tree: move(tree, 1.7e308))),
    "another unit": ("pair_cameras", lambda f: rewrite(Path(f.camera), lambda tree: move(tree, 1e5))),
    "size of nothing": ("pair_cameras", lambda f: write(f.camera, size=[0, 0])),
    "size of text": ("pair_cameras", lambda f: write(f.camera, size=["a", "b"])),
    "size of truth": ("pair_cameras", lambda f: write(f.camera, size=[True, True])),
    "size of three": ("pair_cameras", lambda f: write(f.camera, size=[64, 96, 3])),
    "long words": ("pair_cameras", lambda f: write(f.camera, axes="A" * 1_000_000)),
    "too long": ("pair_cameras", lambda f: write(f.camera, axes="A" * 9_000_000)),
    "deep": ("pair_cameras", lambda f: Path(f.camera).write_text("[" * 200_000)),
    "of all cameras": ("pair_cameras", lambda f: as_recammaster(Path(f.camera))),
    "relative under another name": ("pair_cameras", lambda f: as_relative(Path(f.source).with_suffix(".depth.npz"))),
    "K of the depth in shares": ("depth_shape", lambda f: shares(f)),
    "nothing in view": ("pair_cameras", lambda f: rewrite(Path(f.camera), lambda tree: move(tree, 60.0))),
    "disparity": ("pair_cameras", lambda f: as_disparity(Path(f.source).with_suffix(".depth.npz"))),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_bad_pair_costs_itself_alone(harm, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "in")
    reason, do = HARM[harm]
    do(pairs.files_of(str(sorted((tmp_path / "in").glob("*-00000.mp4"))[0])))
    result = inline(choices(tmp_path / "in", tmp_path / "out", **FEW))
    assert result.counts["samples"] == 2
    assert {row["reason"] for row in result.rejects} - {"not_a_video"} == {reason}
    assert max(len(row["message"]) for row in result.rejects) < 400
    assert not any(str(tmp_path) in row["message"] for row in result.rejects)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"members": ("source", "cond")}, "members"),
        ({"masks": MaskConfig(num_masks=2)}, "masks.num_masks"),
        ({"depth": "parallax"}, "depth"),
        ({"input": None}, "second_camera_deg"),
    ],
)
def test_choices_that_cannot_go_with_pairs_are_refused(corpus, tmp_path, changes, named):
    one_camera = replace(WORLD, num_videos=1, second_camera_deg=None)
    with pytest.raises(ConfigError, match=named):
        inline(replace(choices(corpus, tmp_path / "out", **FEW), **changes), synthetic_config=one_camera)
    assert not list(tmp_path.glob("**/*.mp4"))


@pytest.mark.parametrize("angle", [0.0, -5.0, 91.0])
def test_an_angle_of_the_second_camera_is_checked(tmp_path, angle):
    with pytest.raises(ConfigError, match=r"synthetic\.second_camera_deg"):
        synthetic.write_corpus(tmp_path, replace(WORLD, second_camera_deg=angle))
    assert list(tmp_path.iterdir()) == []


def test_a_clip_without_K_needs_pictures_like_the_other_camera_s(tmp_path):
    (tmp_path / "in").mkdir()
    film(tmp_path / "in", "a", 60.0, 60.0, 12)
    write(str(tmp_path / "in" / "a.camera.json"), K=None)
    result = inline(choices(tmp_path / "in", tmp_path / "out", **FEW))
    assert {row["reason"] for row in result.rejects} == {"pair_cameras"}
    assert "black bars" in result.rejects[0]["message"]
    film(tmp_path / "in", "a", 60.0, 60.0, 12)
    write(str(tmp_path / "in" / "a.source.camera.json"), K=None)
    assert inline(choices(tmp_path / "in", tmp_path / "out", **FEW)).rejects == []


def test_a_camera_that_changes_after_it_was_hashed_is_not_taken(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "in")
    victim = next((tmp_path / "in").glob("*-00000.source.camera.json"))

    def late(row, config):
        if "-00000" in row["path"]:
            rewrite(victim, lambda tree: tree.update(note="measured again"))
        return pair.cameras(row, config)

    changed = tuple(replace(s, function=late) if s is pair.CAMERAS else s for s in preprocess.Stages().clip_pair)
    stages = replace(preprocess.Stages(), find_shots=preprocess.Stages().find_shots_pair, clip=changed)
    result = inline(choices(tmp_path / "in", tmp_path / "out", **FEW), stages=stages)
    assert [row["reason"] for row in result.rejects] == ["source_changed"] * 2


@pytest.mark.parametrize("wrong", ["nothing", "c2w", "another scene", "millimetres"])
def test_a_threshold_drops_what_does_not_fit(corpus, tmp_path, wrong):
    shutil.copytree(corpus, tmp_path / "in")
    for path in (tmp_path / "in").glob("*-00000.*camera.json"):
        if wrong == "c2w":
            rewrite(path, lambda tree: tree.update(w2c=np.linalg.inv(tree["w2c"]).tolist()))
    if wrong == "another scene":
        shutil.copy(next(corpus.glob("*-00001.source.mp4")), next((tmp_path / "in").glob("*-00000.source.mp4")))
    if wrong == "millimetres":
        depth = next((tmp_path / "in").glob("*-00000.source.depth.npz"))
        with np.load(depth, allow_pickle=False) as file:
            np.savez(depth, z_depth=file["z_depth"] * 1000)
    result = inline(choices(tmp_path / "in", tmp_path / "out", **FEW | {"filters": FilterConfig(max_warp_error=0.05)}))
    refused = [(row["stage"], row["reason"], row["fate"]) for row in result.rejects]
    assert refused == ([] if wrong == "nothing" else [("mask_quality", "warp_error", "filtered")] * 2)


def test_a_cut_of_the_other_video_within_a_clip_is_found(tmp_path):
    """Two scenes in sequence, of 22 and 18 frames: of eight clips, the one across the cut is rejected."""
    world = replace(WORLD, num_frames=22, size=(64, 64))
    parts = []
    for index in range(2):
        scene, cameras = synthetic.clip_scene(world, index)
        parts.append(synthetic.render_clip(scene, cameras, world.fps)[0])
    scene, cameras = synthetic.clip_scene(replace(world, num_frames=40), 0)
    frames, z_depth = synthetic.render_clip(scene, cameras, world.fps)
    (tmp_path / "in").mkdir()
    video.write(tmp_path / "in" / "a.mp4", frames, world.fps)
    video.write(tmp_path / "in" / "a.source.mp4", np.concatenate([parts[0], 255 - parts[1][:18]]), world.fps)
    np.savez(tmp_path / "in" / "a.source.depth.npz", z_depth=z_depth)
    w2c = np.stack([camera.w2c for camera in cameras])
    for name in ("a.camera.json", "a.source.camera.json"):
        pose_writers.write(tmp_path / "in" / name, PoseFile(w2c), "json")
    config = choices(tmp_path / "in", tmp_path / "out", **FEW | {"clips_per_shot": 8})
    result = inline(config)
    assert [row["message"] for row in result.rejects] == ["a.mp4: the other camera's video is cut within the clip"]
    assert result.counts["samples"] == 7
