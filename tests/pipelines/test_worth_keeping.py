"""What is dropped by default, the cost of damaged or incomplete videos, and the message of a run without a commit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from small_corpus import choices, inline

from ex4d import video
from ex4d.data import sample
from ex4d.data.tar import read_sample
from ex4d.errors import BadSample, Filtered
from ex4d.geometry.masks import MaskConfig
from ex4d.quality import SCORES, clip
from pipelines.preprocess import clips
from pipelines.preprocess.filters import FilterConfig, decide
from pipelines.preprocess.stages.shots import pack_pts
from pipelines.runtime.stage import new_row, refuse


def with_depth(path: Path, frames: np.ndarray) -> None:
    """Write a video with its own depth, so that only its pictures can be rejected."""
    video.write(path, frames, 25)
    ramp = 1 + np.arange(frames.shape[1])[:, None] / 50 + np.zeros(frames.shape[1:3])
    np.savez(path.with_suffix(".depth.npz"), z_depth=np.stack([ramp] * len(frames)).astype(np.float32))


def textured(size: tuple[int, int], count: int = 17) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (size[0], size[1] + count, 3)).astype(np.uint8)
    return np.stack([noise[:, number : number + size[1]] for number in range(count)])


def test_blank_black_and_tiny_videos_are_filtered_by_default(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    blank, black = np.full((17, 64, 64, 3), 250, np.uint8), np.zeros((17, 64, 64, 3), np.uint8)
    for number in range(17):
        blank[number, 10:13, 5 + number : 8 + number] = 0
        black[number] = textured((64, 64), 1)[0] // 80
    with_depth(folder / "blank.mp4", blank)
    with_depth(folder / "black.mp4", black)
    with_depth(folder / "tiny.mp4", textured((10, 16)))
    with_depth(folder / "good.mp4", textured((64, 64)))
    config = choices(folder, tmp_path / "out", clips_per_shot=1, near_duplicates="off")
    result = inline(config)
    assert result.counts["samples"] == 1
    assert {(reject["message"].partition(":")[0], reject["reason"]) for reject in result.rejects} == {
        ("blank.mp4", "texture"),
        ("black.mp4", "exposure"),
        ("tiny.mp4", "source_side"),
    }
    assert {reject["fate"] for reject in result.rejects} == {"filtered"}
    everything = FilterConfig(min_exposure=None, min_texture=None, min_source_side=None)
    assert inline(replace(config, filters=everything)).counts["samples"] == 4


def test_holes_of_measured_depth_are_holes_of_the_sample_and_can_be_filtered(corpus, tmp_path):
    """A hole is False in each mask in the source's pixels; its share is a score; narrow ones may be filled."""
    folder = tmp_path / "in"
    shutil.copytree(corpus, folder)
    for place in folder.glob("*.npz"):
        arrays = dict(np.load(place))
        arrays["z_depth"][:, 4:12, 6:16] = 0
        np.savez(place, **arrays)
    config = choices(folder, tmp_path / "out", masks=MaskConfig(num_masks=2, novel_view=0), members=("cond",))
    result = inline(config)
    assert result.counts["samples"] == 12
    for path in (tmp_path / "out/staging/clips").glob("*.tar"):
        one = sample.decode(read_sample(path.read_bytes(), path.name.split(".")[0]))
        assert not one.visible[:, 1:, 4:12, 6:16].any()
        assert one.visible[:, 0].all()
        assert one.provenance["scores"]["depth_holes"] == pytest.approx(80 / 32**2)
    assert inline(replace(config, filters=FilterConfig(max_depth_holes=0.05))).counts.get("samples", 0) == 0
    filled = inline(replace(config, filters=FilterConfig(max_depth_holes=0.05), depth_fill_px=8))
    assert filled.counts["samples"] == 12


def test_the_facts_of_hdr_and_interlacing_are_scores_and_can_be_filtered(tmp_path):
    record = {
        "info": {"time_base": (1, 25), "size": (64, 64), "notes": ["hdr_pq", "interlaced"]},
        "pts_runs": pack_pts(range(9)),
        "cuts": [],
        "shots": [{"box": [0, 0, 64, 64], "bars": 0.0, "logo": 0.0}],
    }
    config = choices(tmp_path, tmp_path / "out")
    scores = clips.plan("0" * 64, record, config)[0].shot_scores
    assert scores == {"bars": 0.0, "logo": 0.0, "hdr": 1.0, "interlaced": 1.0, "source_side": 64.0}
    assert set(scores) <= set(SCORES)
    decide(scores, FilterConfig())
    for name in ("hdr", "interlaced"):
        with pytest.raises(Filtered, match=name):
            decide(scores, FilterConfig(**{f"max_{name}": 0.0}))


def test_texture_tells_a_dot_from_a_picture():
    dot = np.zeros((5, 96, 96, 3), np.uint8)
    dot[:, 40:44, 40:44] = 255
    assert clip.measure(dot, 25.0)["texture"] < 0.02 < clip.measure(textured((96, 96), 5), 25.0)["texture"]


def planned(tmp_path, ticks: list[int], **more) -> list[clips.Clip]:
    record = {
        "info": {"time_base": (1, 1000), "size": (64, 64)},
        "pts_runs": pack_pts(ticks),
        "cuts": [],
        "shots": [{"box": [0, 0, 64, 64], "bars": 0.0, "logo": 0.0}],
    }
    return clips.plan("0" * 64, record, choices(tmp_path, tmp_path / "out", **more))


def test_a_gap_in_time_is_in_no_clip(tmp_path):
    ticks = [40 * number for number in range(8)]
    ticks += [ticks[-1] + 3000 + 40 * number for number in range(12)]
    found = planned(tmp_path, ticks, num_frames=7, clips_per_shot=4)
    assert [one.frame_index for one in found] == [list(range(0, 7)), list(range(10, 17))]
    assert all(one.fps == 25.0 for one in found)
    # the suitable part is used, whatever the mean rate of the whole
    at_rate = planned(tmp_path, ticks, num_frames=7, clips_per_shot=4, fps=25.0)
    assert all(max(np.diff(one.pts)) == 40 for one in at_rate)
    assert len(at_rate) == 2


@pytest.mark.parametrize("step", [1, 40, 2000])
def test_even_time_of_any_rate_gives_the_clips_that_it_gave(tmp_path, step):
    found = planned(tmp_path, [step * number for number in range(17)], clips_per_shot=3)
    assert [one.frame_index[0] for one in found] == [0, 6, 11]


def test_jitter_and_a_dropped_frame_are_no_gap(tmp_path):
    ticks = [0, 33, 67, 100, 133, 200, 233, 267, 300]
    assert planned(tmp_path, ticks, num_frames=9, clips_per_shot=1)[0].frame_index == list(range(9))


def test_a_video_without_any_even_part_is_filtered(tmp_path):
    with pytest.raises(Filtered):
        planned(tmp_path, [0, 10, 500, 510, 1000, 1010, 1500, 1510], num_frames=5)


def test_a_camera_that_stands_is_no_fault():
    row = refuse(new_row("a"), "depth", BadSample("no_parallax", "the camera does not move"))
    assert row["refusal"]["fate"] == "filtered"
    assert refuse(new_row("a"), "depth", BadSample("depth_nan", ""))["refusal"]["fate"] == "bad"


def test_a_refused_commit_says_what_still_stands(corpus, tmp_path):
    config = choices(corpus, tmp_path / "out", clips_per_shot=1)
    failed = inline(replace(config, depth_path=str(tmp_path)))
    assert failed.exit_code == 1
    assert "no dataset was written" in failed.table()
    assert inline(config).exit_code == 0
    failed = inline(replace(config, depth_path=str(tmp_path)))
    assert "the dataset of an earlier run stands as it was" in failed.table()
    assert "no dataset was written" not in failed.table()
    assert (tmp_path / "out/dataset.json").exists()


def test_one_damaged_frame_costs_the_clips_that_need_it(tmp_path):
    path = tmp_path / "in/whole.avi"
    path.parent.mkdir()
    noise = np.random.default_rng(3).integers(-20, 20, (40, 64, 64, 3))
    frames = np.clip(textured((64, 64), 40).astype(np.int64) // 2 + 60 + noise, 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25), options={"g": "10", "bf": "0"})
        stream.bit_rate = 8_000_000
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        packets = [p for frame in frames for p in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))]
        packets += stream.encode(None)
        torn = max((bytes(packet) for packet in packets[12:17]), key=len)
        container.mux(packets)
    data = bytearray(path.read_bytes())
    at = data.find(torn)
    data[at + len(torn) // 3 : at + len(torn)] = np.random.default_rng(1).bytes(len(torn) - len(torn) // 3)
    path.write_bytes(data)
    ramp = 1 + np.arange(64)[:, None] / 50 + np.zeros((64, 64))
    np.savez(path.with_suffix(".depth.npz"), z_depth=np.stack([ramp] * 40).astype(np.float32))
    result = inline(choices(path.parent, tmp_path / "out", clips_per_shot=8))
    assert result.counts["clips_planned"] == 8
    assert {reject["reason"] for reject in result.rejects} == {"decode_corrupt"}
    assert 1 <= result.counts["clips_bad"] <= 2
    assert result.counts["samples"] >= 6
