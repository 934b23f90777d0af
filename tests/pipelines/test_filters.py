"""Clip scores through the whole pipeline: bars are cropped, geometry is scored, score_only measures first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_corpus import inline
from vision_networks import WORDS, make_llava

from ex4d import hub, video
from ex4d.data import sample
from ex4d.data.tar import read_sample
from ex4d.data.verify import verify
from ex4d.errors import ConfigError
from ex4d.geometry.cotracker import CHECKPOINT
from ex4d.geometry.mask_config import MaskConfig
from ex4d.quality import SCORES
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip
from pipelines.preprocess import fingerprints
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.filters import FilterConfig
from pipelines.preprocess.run import RayConfig
from pipelines.preprocess.settings import CaptionerConfig, PreprocessConfig


def samples(config):
    """Return every finished sample of the staging folder."""
    found = []
    for path in sorted(Path(config.output, "staging/clips").glob("*.tar")):
        found.append(sample.decode(read_sample(path.read_bytes(), path.name.split(".")[0])))
    return found


def test_every_sample_holds_every_score(config):
    inline(config)
    for one in samples(config):
        assert set(one.provenance["scores"]) == set(SCORES) - {
            "warp_error",  # which needs two cameras
            "camera_depth_error",  # which needs estimated cameras
        }
        assert one.provenance["crop_box"] == [0, 0, 32, 32]


@pytest.mark.parametrize(
    ("threshold", "choice", "allowed"),
    [
        ("max_warp_error", {"members": ("depth",)}, {"members": ("source",), "masks": MaskConfig(num_masks=1)}),
        ("max_camera_depth_error", {"cameras": "auto"}, {"cameras": "parallax"}),
        ("max_camera_depth_error", {"cameras": "parallax", "depth": "parallax"}, {"cameras": "colmap"}),
    ],
)
def test_a_threshold_of_a_score_that_nothing_measures_is_refused(threshold, choice, allowed):
    filters = FilterConfig(**{threshold: 0.1})
    with pytest.raises(ConfigError, match=rf"filters\.{threshold}=0\.1: must be null"):
        PreprocessConfig(filters=filters, **choice)
    PreprocessConfig(filters=filters, **allowed)


def test_weights_of_a_tracker_are_known_by_their_content(tmp_path):
    def settings(folder):
        fingerprints._tracker_weights.cache_clear()
        masks = MaskConfig(tracker="cotracker3", tracker_path=str(folder))
        return fingerprints.sample_settings(PreprocessConfig(masks=masks))

    for name, content in (("one", b"1"), ("copy", b"1"), ("two", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / CHECKPOINT).write_bytes(content)
    assert settings(tmp_path / "one") == settings(tmp_path / "copy") != settings(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"masks\.tracker_path"):
        settings(tmp_path)


def _letterboxed(folder, top):
    """Write a scene of 96 × 128 with its depth and K, and the same between bars of `top` px; return their names."""
    settings = SyntheticConfig(num_frames=9, size=(96, 128), supersample=1, fps=8.0, seed=4)
    scene, cameras = clip_scene(settings, 0)
    frames, z_depth = render_clip(scene, cameras, settings.fps)
    pad = ((0, 0), (top, top), (0, 0))
    tall_K = cameras[0].K + np.array([[0, 0, 0], [0, 0, top], [0, 0, 0]])
    files = {
        "plain": (frames, z_depth, cameras[0].K),
        "barred": (np.pad(frames, (*pad, (0, 0))), np.pad(z_depth, pad, mode="edge"), tall_K),
    }
    for name, (picture, depth, K) in files.items():
        (folder / name).mkdir()
        video.write(folder / name / "clip.mp4", picture, settings.fps)
        np.savez(folder / name / "clip.depth.npz", z_depth=depth, K=K)


@pytest.mark.parametrize("fit", ["crop", "pad", "squeeze"])
def test_letterboxed_video_gives_the_picture_its_depth_and_its_intrinsics_inside_the_bars(config, tmp_path, fit):
    """The crop is the picture without its border line; compare with the unbarred video, cropped alike."""
    _letterboxed(tmp_path, top=24)
    found = {}
    for name in ("plain", "barred"):
        one = replace(config, input=str(tmp_path / name), output=str(tmp_path / f"out-{name}"), clips_per_shot=1)
        one = replace(one, num_frames=9, size=(64, 64), fit=fit, members=("depth",))
        assert inline(one).counts["samples"] == 1
        found[name] = samples(one)[0]
    y, x, height, width = found["barred"].provenance["crop_box"]
    assert (x, width) == (0, 128)
    assert 24 <= y <= 26
    assert 92 <= height <= 96
    assert found["barred"].provenance["scores"]["bars"] == pytest.approx(1 - height / 144)
    assert found["barred"].frames.min(axis=(0, 3)).max() > 8
    inner = video.Fit((96, 128), (64, 64), fit, (y - 24, 0, height, 128))
    scene, cameras = clip_scene(SyntheticConfig(num_frames=9, size=(96, 128), supersample=1, fps=8.0, seed=4), 0)
    assert np.allclose(found["barred"].K, inner.apply_K(cameras[0].K))
    truth = inner.apply_image(render_clip(scene, cameras, 8.0)[0])
    assert np.abs(found["barred"].frames.astype(int) - truth).mean() < 6
    kept = inline(replace(one, crop_bars=False, output=str(tmp_path / "whole")))
    assert kept.counts["samples"] == 1
    assert samples(replace(one, output=str(tmp_path / "whole")))[0].provenance["crop_box"] == [0, 0, 144, 128]


def test_depth_that_flickers_is_filtered_before_masks_and_the_truth_is_not(config, corpus, tmp_path):
    folder = tmp_path / "flickering"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, path in enumerate(sorted(corpus.glob("*.mp4"))):
        (folder / path.name).write_bytes(path.read_bytes() + bytes([number]))  # other bytes, the same picture
        with np.load(path.with_suffix(".depth.npz")) as arrays:
            jitter = np.exp(rng.normal(0, 0.08, (17, 1, 1))) if number < 2 else 1.0
            z_depth = (arrays["z_depth"] * jitter).astype(np.float32)
            np.savez(folder / f"{path.stem}.depth.npz", z_depth=z_depth, K=arrays["K"])
    result = inline(replace(config, input=str(folder), filters=FilterConfig(max_depth_flicker=0.01)))
    assert (result.counts["samples"], result.counts["clips_filtered"]) == (6, 6)
    assert {(row["stage"], row["reason"]) for row in result.rejects} == {("depth_quality", "depth_flicker")}
    assert result.stages["masks"].done == 6


def test_hole_share_is_a_filter(config):
    everything = inline(config)
    holes = sorted(pq.read_table(f"{config.output}/manifest.parquet")["score_holes"].to_pylist())
    fewer = inline(replace(config, filters=FilterConfig(max_holes=holes[8])))
    assert (everything.counts["samples"], fewer.counts["samples"]) == (12, 9)
    assert {row["stage"] for row in fewer.rejects} == {"mask_quality"}


def test_score_only_measures_every_clip_makes_none_and_a_full_run_takes_its_work(config, tmp_path):
    looking = replace(config, score_only=True, filters=FilterConfig(min_motion=1.0))
    looked = inline(looking)
    assert (looked.exit_code, looked.committed, looked.scored) == (0, False, 12)
    assert looked.worked == {"hash": 4, "split": 4, "score": 12}
    assert not Path(config.output, "shards").exists()
    table = pq.read_table(f"{config.output}/report/scores.parquet").to_pylist()
    assert len(table) == 12
    rows = json.loads(Path(config.output, "report/scores.json").read_text())
    assert [row["key"] for row in rows] == [row["key"] for row in table]
    assert {row["refused_by"] for row in table} == {"motion"}
    assert inline(looking).worked == {"hash": 4, "split": 0, "score": 0}
    motions = sorted(row["motion"] for row in table)
    half = replace(config, filters=FilterConfig(min_motion=motions[6]))
    after = inline(half)
    assert (after.counts["samples"], after.counts["clips_filtered"]) == (6, 6)
    assert after.worked == {"hash": 4, "split": 0, "clip": 6}  # clips rejected by a threshold are not decoded again
    assert after.stages["measure"].done == 6
    alone = replace(half, output=str(tmp_path / "alone"))
    inline(alone)
    assert verify(half.output, full=True).tree_sha256 == verify(alone.output, full=True).tree_sha256


@pytest.mark.ray
def test_scores_are_the_same_on_ray(config, tmp_path, ray_local):
    tables = []
    for name in ("inline", "ray"):
        one = replace(config, score_only=True, output=str(tmp_path / name))
        assert preprocess.run(one, RayConfig(), runner_name=name).exit_code == 0
        tables.append(Path(one.output, "report/scores.json").read_bytes())
    assert tables[0] == tables[1]


def test_captions_come_from_files_first_and_else_from_a_vision_language_model(config, corpus, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number, path in enumerate(sorted(corpus.glob("*.mp4"))[:2]):
        for suffix in (".mp4", ".depth.npz", *([".txt"] if number else [])):
            (folder / f"{path.stem}{suffix}").write_bytes(path.with_suffix(suffix).read_bytes())
    (tmp_path / "llava").mkdir()
    weights = make_llava(tmp_path / "llava")
    captioner = CaptionerConfig(model=str(weights), max_new_tokens=8)
    one = replace(config, input=str(folder), clips_per_shot=1, captioner=captioner)
    assert inline(one).counts["samples"] == 2
    found = {sample.caption: sample.provenance["caption"] for sample in samples(one)}
    (made,) = [text for text, facts in found.items() if facts["source"] == "model"]
    assert made
    assert set(made.split()) <= set(WORDS)
    digest = hub.fingerprint([weights], ("*.safetensors",))
    assert found[made] == {"source": "model", "model": "llava", "revision": "", "weights_sha256": digest}
    (theirs,) = [facts for text, facts in found.items() if text != made]
    assert theirs == {"source": "sidecar", "model": "", "revision": "", "weights_sha256": ""}
    assert str(tmp_path) not in json.dumps(fingerprints.sample_settings(one))
    with pytest.raises(ConfigError, match=r"preprocess\.captioner\.model"):
        inline(replace(one, captioner=CaptionerConfig(model="nobody/has-this"), output=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()


def test_weights_of_depth_are_known_by_content_and_not_by_where_they_lie(config, tmp_path):
    found = set()
    for place in ("here", "there"):
        folder = tmp_path / place
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        one = replace(config, depth="depth-anything-v2", depth_path=str(folder))
        found.add(json.dumps(fingerprints.dataset_settings(one)))
    assert len(found) == 1
    assert str(tmp_path) not in found.pop()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"others")
    other = replace(config, depth="depth-anything-v2", depth_path=str(tmp_path / "other"))
    assert fingerprints.sample_settings(other) != fingerprints.sample_settings(one)


@pytest.mark.parametrize(("rate", "spacing"), [({"stride": 1}, 1), ({"stride": 3}, 3), ({"fps": 4.0}, 2)])
def test_clips_of_a_shot_are_disjoint_capped_and_of_the_wanted_rate(config, corpus, rate, spacing):
    """17 frames at 8 a second."""
    many = replace(config, clips_per_shot=10, num_frames=2, size=(32, 32), **rate)
    result = inline(replace(many, score_only=True))
    table = pq.read_table(f"{config.output}/report/scores.parquet").to_pylist()
    assert {row["end_frame"] - row["start_frame"] for row in table} == {spacing}
    taken = [(row["source_path"], frame) for row in table for frame in (row["start_frame"], row["end_frame"])]
    assert len(set(taken)) == len(taken)
    per_video = min(10, (16 // spacing + 1) // 2)
    assert result.scored == 4 * per_video
    capped = inline(replace(many, score_only=True, clips_per_shot=2))
    assert capped.scored == 8


def test_no_clip_crosses_a_fade(config, tmp_path):
    """Two shots with a fade through black between them: frames 0 to 29, black to 41, 42 to 71."""
    rng = np.random.default_rng(0)
    pictures = [np.kron(rng.integers(60, 220, (8, 8, 3)), np.ones((12, 12, 1))) for _ in range(2)]
    gains = np.concatenate([np.ones(24), np.linspace(1, 0, 7), np.zeros(10), np.linspace(0, 1, 7), np.ones(24)])
    frames = np.stack([pictures[t > 35] * gain for t, gain in enumerate(gains)]).astype(np.uint8)
    frames[..., 0] += (np.arange(72)[:, None, None] % 3).astype(np.uint8)
    folder = tmp_path / "in"
    folder.mkdir()
    video.write(folder / "fade.mp4", frames, 24.0)
    one = replace(config, input=str(folder), score_only=True, num_frames=16, size=(64, 64), clips_per_shot=1)
    assert inline(one).scored == 2
    table = pq.read_table(f"{config.output}/report/scores.parquet").to_pylist()
    (first, second) = sorted((row["start_frame"], row["end_frame"]) for row in table)
    assert first[1] < 36 <= second[0]
