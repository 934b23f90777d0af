"""Two-camera videos, from files to samples: the right frames, the right camera, equal bytes."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import flaky_store
import numpy as np
import pytest
from pair_corpus import FEW, WORLD, film, rewrite, samples
from sight import visible_from
from small_corpus import choices, inline

from ex4d import remote, storage, synthetic, video
from ex4d.data import manifest
from ex4d.data.verify import verify
from ex4d.evaluate.metrics import psnr
from ex4d.geometry import masks, trajectory, trajectory_files
from ex4d.geometry.camera import Camera, intrinsics, relative_to
from ex4d.geometry.masks import KINDS, MaskConfig
from ex4d.quality import SCORES
from ex4d.viewer import sample_page
from pipelines.inputs import Source
from pipelines.preprocess import clips, pairs
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.stages import isolated, pair


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    synthetic.write_corpus(folder, WORLD)
    return folder


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """(configuration, result) of a run over two videos, four clips."""
    config = choices(corpus, tmp_path_factory.mktemp("out") / "dataset", **FEW)
    result = inline(config)
    assert (result.exit_code, result.rejects, result.counts["samples"]) == (0, [], 4)
    return config, result


def test_the_second_camera_is_no_video_of_its_own_and_verify_knows_its_member(done):
    config, result = done
    assert result.counts["videos_in"] == 2
    assert verify(config.output, full=True).problems == ()
    assert {"cond.mp4", "source.mp4"} <= set(manifest.read_dataset(config.output)["members"])
    shown = sample_page.samples_page(config.output, count=1).rows[0]
    assert [clip.label for clip in shown.clips][:2] == ["the clip", "the other camera"]
    alone = replace(config, output=config.output + "-one", members=())
    assert inline(alone).counts["videos_in"] == 4  # without the member they are four videos


def test_frames_cameras_and_mask_are_those_of_the_scene(done, corpus):
    """The slow twin: the scene itself gives what the other camera films and which pixels of the clip it sees."""
    config, _ = done
    for sample in samples(config.output):
        path = corpus / sample.provenance["source_path"]
        scene, cameras = synthetic.clip_scene(WORLD, int(path.stem[-5:]))
        pts, time_base = video.frame_pts(path)
        first = int(np.searchsorted(pts, sample.provenance["start_pts"]))
        index = slice(first, first + 5)
        second = trajectory_files.read(pairs.files_of(str(path)).camera).w2c
        np.testing.assert_allclose(
            sample.w2c[0], relative_to(np.stack([c.w2c for c in cameras]), second)[index], atol=1e-9
        )
        K = cameras[0].K - [[0, 0, 16], [0, 0, 0], [0, 0, 0]]  # the middle 64 of 96 columns
        np.testing.assert_allclose(sample.K, K, atol=1e-9)
        files = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in pairs.files_of(str(path))]
        assert sample.provenance["pair"]["source_sha256"] == files[0]
        assert sample.provenance["pair"]["cameras_sha256"] == files[1:]
        assert 0 < sample.provenance["scores"]["warp_error"] < 0.03
        assert set(sample.provenance["scores"]) == set(SCORES) - {"generation_holes", "camera_depth_error"}
        assert sample.kind.tolist() == [KINDS.index("visibility")]
        for t in range(5):
            time_s = float((pts[first + t] - pts[0]) * time_base)
            ours, theirs = (Camera(K, w2c[first + t], (64, 64)) for w2c in (second, [c.w2c for c in cameras]))
            filmed = [scene.render(camera, time_s, WORLD.supersample)[0] for camera in (ours, theirs)]
            assert psnr(sample.frames[t], filmed[0]) > 26  # H.264 was between, twice
            assert psnr(sample.source[t], filmed[1]) > 26
            truly, _ = visible_from(scene, ours, time_s, theirs)
            seen = sample.visible[0, t]
            if t == 0:
                assert seen.all()  # frame 0 of a clip is complete, and its own
                assert psnr(sample.cond[0], sample.frames[0]) > 35
                continue
            assert (seen & truly).sum() > 0.99 * seen.sum()
            assert (seen & truly).sum() > 0.8 * truly.sum()  # the rest lies along depth edges: thin at 64 px
            assert psnr(sample.cond[t], sample.frames[t], seen) > 27
            assert psnr(sample.cond[t], sample.frames[t], seen) > psnr(sample.source[t], sample.frames[t], seen) + 5


def test_ray_writes_the_same_and_a_second_run_has_nothing_to_do(done, corpus, tmp_path):
    config, _ = done
    again = inline(config)
    assert again.worked["clip"] == 0
    other = replace(config, output=str(tmp_path / "ray"))
    assert preprocess.run(other, runner_name="ray").exit_code == 0
    assert verify(other.output).tree_sha256 == verify(config.output).tree_sha256


def test_out_of_a_flaky_store_come_the_same_bytes(corpus, done, tmp_path, monkeypatch):
    import boto3

    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    with flaky_store.object_store(share=0.0) as (address, flaky):
        flaky_store.use(monkeypatch, address)
        boto3.client("s3").create_bucket(Bucket="bucket")
        for path in corpus.iterdir():
            storage.write_bytes(f"s3://bucket/in/{path.name}", path.read_bytes())
        flaky.share = 0.05
        config = replace(
            done[0], input="s3://bucket/in", output=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")
        )
        result = inline(config)
        assert flaky.failed.total() > 0
    assert result.rejects == []
    assert verify(config.output).tree_sha256 == verify(done[0].output).tree_sha256


def test_a_camera_without_K_has_that_of_the_depth(corpus, done, tmp_path):
    shutil.copytree(corpus, tmp_path / "in")
    for path in (tmp_path / "in").glob("*.camera.json"):
        rewrite(path, lambda tree: tree.update(K=None, size=None))
    config = choices(tmp_path / "in", tmp_path / "out", **FEW)
    assert inline(config).rejects == []
    for ours, theirs in zip(samples(config.output), samples(done[0].output), strict=True):
        np.testing.assert_allclose(ours.K, theirs.K)
        np.testing.assert_array_equal(ours.visible, theirs.visible)


def test_a_replaced_camera_makes_its_clips_new(corpus, done, tmp_path):
    shutil.copytree(corpus, tmp_path / "in")
    config = choices(tmp_path / "in", tmp_path / "out", **FEW)
    assert inline(config).worked["clip"] == 4
    rewrite(next((tmp_path / "in").glob("*-00001.camera.json")), lambda tree: tree.update(note="measured again"))
    assert inline(config).worked["clip"] == 2


@pytest.mark.parametrize(("bars", "stored"), [(0, 1), (12, 2)])
def test_each_camera_has_its_lens_its_bars_and_its_file_s_pixels(tmp_path, bars, stored):
    (tmp_path / "in").mkdir()
    own = film(tmp_path / "in", "a", 70.0, 50.0, bars, stored)
    config = choices(tmp_path / "in", tmp_path / "out", **FEW | {"num_frames": 9, "clips_per_shot": 1})
    assert inline(config).rejects == []
    (sample,) = samples(config.output)
    other_K, source_K = intrinsics(WORLD.size, 50.0), np.array(sample.provenance["pair"]["source_K"])
    # The middle square inside the bars, which are found to a pixel, fills the clip.
    scale = next(
        64 / side for side in range(64 - 2 * bars, 0, -2) if abs(source_K[0, 0] * side / 64 - other_K[0, 0]) < 1e-6
    )
    assert 64 - 2 * bars - 64 / scale <= 2
    other_K = np.array([[other_K[0, 0] * scale, 0, 32], [0, other_K[1, 1] * scale, 32], [0, 0, 1]])
    np.testing.assert_allclose(sample.K, own[0].K - [[0, 0, 16], [0, 0, 0], [0, 0, 0]], atol=1e-9)
    np.testing.assert_allclose(source_K, other_K, atol=1e-9)
    scene, cameras = synthetic.clip_scene(WORLD, 0)
    assert sample.provenance["start_s"] == pytest.approx(1 / WORLD.fps)
    for t in range(1, 9):
        ours, theirs = (Camera(K, lens[t + 1].w2c, (64, 64)) for K, lens in ((sample.K, own), (other_K, cameras)))
        truly, _ = visible_from(scene, ours, (t + 1) / WORLD.fps, theirs)
        seen = sample.visible[0, t]
        both = seen & truly  # not seen, and marked: what a body outside the other picture hides
        assert both.sum() > 0.9 * seen.sum()
        assert both.sum() > 0.75 * truly.sum()
        assert psnr(sample.cond[t], sample.frames[t], both) > 25
        hidden = np.abs(sample.cond[t].astype(int) - sample.frames[t])[~seen]
        assert hidden.mean() < 6  # clean where nothing is shown, so that the codec has no edges there


def test_rounded_poses_are_made_rigid_again(corpus, done, tmp_path):
    shutil.copytree(corpus, tmp_path / "in")
    for path in (tmp_path / "in").glob("*.camera.json"):
        rewrite(path, lambda tree: tree.update(w2c=np.round(tree["w2c"], 4).tolist()))
    config = choices(tmp_path / "in", tmp_path / "out", **FEW)
    assert inline(config).rejects == []
    for ours, theirs in zip(samples(config.output), samples(done[0].output), strict=True):
        np.testing.assert_allclose(ours.w2c[0], theirs.w2c[0], atol=1e-3)


def test_what_one_model_is_given_no_other_is_asked_for(corpus, tmp_path):
    """Whatever shares a video, as clip or as source, is in one split."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):  # six clips of one source
        for path in corpus.glob("*-00000.*"):
            shutil.copy(path, folder / path.name.replace("-00000", f"-{number}"))
        frames, fps = video.read(folder / f"{path.name.split('-00000')[0]}-{number}.mp4")
        (folder / f"{path.name.split('-00000')[0]}-{number}.mp4").write_bytes(video.encode(frames // (number + 1), fps))
    for end, other in ((".mp4", ".source.mp4"), (".camera.json", ".source.camera.json")):  # and a pair turned around
        for one, two in ((end, other), (other, end)):
            shutil.copy(next(corpus.glob(f"*-00001{one}")), folder / f"turned{two}")
            shutil.copy(next(corpus.glob(f"*-00001{one}")), folder / f"plain{one}")
    for name in ("turned", "plain"):
        ends = (".depth.npz", ".source.depth.npz")
        for end, other in zip(ends, ends if name == "plain" else ends[::-1], strict=True):
            shutil.copy(next(corpus.glob(f"*-00001{end}")), folder / f"{name}{other}")
    for near in ("group", "off"):
        config = choices(folder, tmp_path / near, **FEW | {"near_duplicates": near, "val_fraction": 0.5})
        result = inline(config)
        assert (result.rejects, result.counts["samples"]) == ([], 16)
        groups = {
            sample.provenance["source_path"]: sample.provenance["source_group"] for sample in samples(config.output)
        }
        assert len({groups[name] for name in groups if "synthetic" in name}) == 1
        assert groups["turned.mp4"] == groups["plain.mp4"]
        assert len(set(groups.values())) == 2
        assert verify(config.output).problems == ()


def test_one_clip_may_have_two_sources(corpus, tmp_path):
    """A video is identified by its content and that of its pair; one without a pair reuses nothing from another."""
    folder = tmp_path / "in"
    shutil.copytree(corpus, folder)
    stem = next(corpus.glob("*-00000.mp4")).stem
    for path in corpus.glob(f"{stem}.*"):
        shutil.copy(path, folder / f"again{path.name.removeprefix(stem)}")
    shutil.copy(corpus / f"{stem}.mp4", folder / "alone.mp4")
    frames, fps = video.read(corpus / f"{stem}.source.mp4")
    (folder / "again.source.mp4").write_bytes(video.encode(255 - frames, fps))
    config = choices(folder, tmp_path / "out", **FEW)
    result = inline(config)
    assert result.counts["samples"] == 6
    assert [(row["key"], row["reason"]) for row in result.rejects] == [("alone.mp4", "pair_missing")]
    same = [sample for sample in samples(config.output) if sample.provenance["source_path"] != f"{stem[:-1]}1.mp4"]
    assert len({sample.key for sample in same}) == 4
    assert len({sample.provenance["source_sha256"] for sample in same}) == 1


def test_the_other_video_is_read_once_whatever_its_clips(corpus, tmp_path, monkeypatch):
    asked = []
    call = isolated.call
    monkeypatch.setattr(
        isolated,
        "call",
        lambda config, name, *args, **more: asked.append((name, str(args[0]))) or call(config, name, *args, **more),
    )
    inline(choices(corpus, tmp_path / "out", **FEW))
    whole = [what for what in asked if what[0] in ("probe", "find_shots")]
    assert len(whole) == len(set(whole)) == 8


@pytest.mark.parametrize(("first", "box"), [(0, "a"), (4, "a"), (5, "b"), (8, "b"), (9, "c")])
def test_a_clip_has_the_bars_of_its_own_shot(first, box):
    other = {"pts_runs": [100, [40, 11]], "cuts": [5, 9], "boxes": ["a", "b", "c"]}
    clip = clips.Clip("key", [first, first + 1], [], (1, 8), 8.0, [], {})
    found = pair.columns({"info": {"size": [8, 6]}, "other": other}, clip, crop_bars=True)
    pts = [100 + 40 * first, 140 + 40 * first]
    assert found == {"other_pts": pts, "other_box": box, "other_cut": first in (4, 8)}
    assert pair.columns({"info": {"size": [8, 6]}, "other": other}, clip, crop_bars=False)["other_box"] == [0, 0, 8, 6]


def test_scores_name_the_stage_that_the_pipeline_has():
    assert {score.stage for score in SCORES.values()} <= {stage.name for stage in preprocess.Stages().clip_pair} | {
        "shots"
    }


def test_the_camera_of_a_camera_stays(tmp_path):
    names = ["a.mp4", "a.source.mp4", "a.source.source.mp4", "b.source.mp4", "c.mp4", "c.source.mkv"]
    kept = pairs.without_sources([Source(name, name) for name in names])
    assert [source.name for source in kept] == ["a.mp4", "a.source.source.mp4", "b.source.mp4", "c.mp4", "c.source.mkv"]


def test_the_mask_is_eroded_as_simulated_ones_are(corpus, done, tmp_path):
    eroded = choices(corpus, tmp_path / "out", **FEW | {"masks": MaskConfig(num_masks=1, erosion_px=(40, 40))})
    assert inline(eroded).rejects == []
    for ours, plain in zip(samples(eroded.output), samples(done[0].output), strict=True):
        np.testing.assert_array_equal(ours.visible[0], masks.erode(plain.visible[0], 40))
        assert ours.visible.sum() < plain.visible.sum()


@pytest.mark.parametrize("near", ["group", "off"])
def test_a_source_that_was_encoded_again_is_the_same_source(corpus, tmp_path, near):
    shutil.copytree(corpus, tmp_path / "in")
    first = next(corpus.glob("*-00000.mp4"))
    for path in corpus.glob(f"{first.stem}.*"):
        shutil.copy(path, tmp_path / "in" / f"again{path.name.removeprefix(first.stem)}")
    frames, fps = video.read(first)
    (tmp_path / "in" / "again.mp4").write_bytes(video.encode(np.flip(frames, 1).copy(), fps))
    frames, fps = video.read(pairs.files_of(str(first)).source)
    (tmp_path / "in" / "again.source.mp4").write_bytes(video.encode(frames, fps, crf=28))
    config = choices(tmp_path / "in", tmp_path / "out", **FEW | {"near_duplicates": near})
    assert inline(config).counts["samples"] == 6
    groups = {sample.provenance["source_path"]: sample.provenance["source_group"] for sample in samples(config.output)}
    assert (groups["again.mp4"] == groups[first.name]) == (near == "group")


@pytest.mark.parametrize("crop_bars", [True, False])
def test_bars_are_kept_in_both_pictures_or_in_none(tmp_path, crop_bars):
    (tmp_path / "in").mkdir()
    film(tmp_path / "in", "a", 60.0, 60.0, 12)
    config = choices(tmp_path / "in", tmp_path / "out", **FEW | {"crop_bars": crop_bars})
    assert inline(config).rejects == []
    for sample in samples(config.output):
        assert (sample.source[:, :10].mean() < 3) == (not crop_bars)


def test_metres_of_depth_pro_follow_the_lens():
    """Its metres depend on the focal length that it assumes; a known camera rescales them."""
    rng = np.random.default_rng(0)
    K = intrinsics((32, 32), 54.0)
    poses = trajectory.build("orbit", 3, 20.0, 3.0).tolist()
    still = np.tile(np.eye(4), (3, 1, 1)).tolist()
    frames = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    row = {
        "frames": frames,
        "other_frames": frames,
        "z_depth": rng.uniform(2, 4, (3, 32, 32)).astype(np.float32),
        "K": K,
        "absolute": True,
        "camera": {"w2c": poses, "K": (2 * K * [[1], [1], [0.5]]).tolist()},
        "other_camera": {"w2c": still, "K": (2 * K * [[1], [1], [0.5]]).tolist()},
        "pair": {"sha256": ["a", "b", "c"], "size_bytes": 1},
        "seed": 0,
        "valid": None,
    }
    config = preprocess.PreprocessConfig(output="out", size=(32, 32))
    network = pair.warp({**row, "depth_facts": {"estimator": "depth-pro"}}, config)
    file = pair.warp({**row, "depth_facts": {"estimator": "sidecar"}, "z_depth": row["z_depth"] * 2}, config)
    np.testing.assert_array_equal(network["cond"], file["cond"])
    other = pair.warp({**row, "depth_facts": {"estimator": "sidecar"}}, config)
    assert (network["visible"] != other["visible"]).any()
