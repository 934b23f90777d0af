"""Memory depends on the clip, not on the length of a video nor on the number of them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from ex4d import config
from ex4d.data.verify import verify
from ex4d.synthetic import Scene, SyntheticConfig, write_corpus

logger = logging.getLogger(__name__)

FPS, SHOTS, FRAMES = 1, 2, 30  # a minute is two shots; slow, since each of the hour's frames is decoded


def write_minute(path: Path) -> Path:
    """Write a minute of 1080p: moving scenes, rendered small and enlarged."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "threads": "1", "g": "30"})
        stream.height, stream.width, stream.pix_fmt = 1080, 1920, "yuv420p"
        for shot in range(SHOTS):
            scene = Scene.random(seed=shot)
            cameras = scene.source_cameras(FRAMES, 8.0, (108, 192), "strong")
            for number, camera in enumerate(cameras):
                image = scene.render(camera, number / 8.0)[0].repeat(10, 0).repeat(10, 1)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = shot * FRAMES + number, Fraction(1, FPS)
                container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    return path


def remux(minute: Path, path: Path, times: int) -> Path:
    """Concatenate copies of the minute without re-encoding."""
    with av.open(str(path), "w") as target:
        copy = None
        for number in range(times):
            with av.open(str(minute)) as source:
                stream = source.streams.video[0]
                copy = copy or target.add_stream_from_template(stream)
                shift = int(number * 60 / stream.time_base)
                for packet in source.demux(stream):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, copy
                        target.mux(packet)
    return path


def watched(folder: Path, num_gpus: int = 0, **choices) -> dict:
    """Return the memory figures that a run reports."""
    settings = {"output": str(folder / "out"), "masks": {"num_masks": 1}, "num_workers": 2, **choices}
    folder.mkdir(exist_ok=True)
    config.dump({"preprocess": settings}, folder / "config.yaml")
    script = Path(__file__).with_name("watched_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "config.yaml"), str(num_gpus)],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    logger.warning("%s: %s", folder.name, facts)
    return facts


def check(small: dict, large: dict) -> None:
    assert large["store_mb"] <= 500
    assert small["driver_mb"] > 50  # it was measured at all
    assert small["worker_mb"] > 50
    assert large["driver_mb"] <= small["driver_mb"] + 30
    # An hour's frames at 144 lines alone are 400 MB; frames that waited for the garbage collector once took 240.
    assert large["worker_mb"] <= small["worker_mb"] + 60


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_an_hour_of_1080p_takes_the_memory_of_two_minutes(tmp_path):
    minute = write_minute(tmp_path / "minute.mp4")
    found = {}
    for name, times in (("minutes", 2), ("hour", 60)):
        folder = tmp_path / name
        (folder / "in").mkdir(parents=True)
        remux(minute, folder / "in" / "video.mp4", times)
        clips = {"num_frames": 9, "size": [64, 64], "clips_per_video": 4, "depth": "parallax"}
        found[name] = watched(folder, input=str(folder / "in"), max_bad_fraction=1.0, **clips)
        assert found[name]["counts"]["samples"] > 0
    assert found["hour"]["counts"]["clips_planned"] == 4
    check(found["minutes"], found["hour"])


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_ten_times_the_corpus_takes_no_more_memory(tmp_path):
    found = {}
    for num_videos in (20, 200):
        folder = tmp_path / f"{num_videos}-videos"
        corpus = SyntheticConfig(num_videos=num_videos, num_frames=18, size=(64, 64), supersample=1)
        write_corpus(folder / "in", corpus)
        clips = {"num_frames": 9, "size": [64, 64], "clips_per_shot": 2}
        found[num_videos] = watched(folder, input=str(folder / "in"), **clips)
        assert found[num_videos]["counts"]["samples"] == 2 * num_videos
    check(found[20], found[200])


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_clips_that_travel_to_the_actors_of_a_gpu_are_never_many_at_once(tmp_path):
    """Only then do frames enter the object store: 308 MB in all. Ray is told of one GPU and two CPUs."""
    corpus = SyntheticConfig(num_videos=32, num_frames=49, size=(256, 256), supersample=1)
    write_corpus(tmp_path / "in", corpus)
    masks = {"num_masks": 1, "tracking": 0.0, "visibility": 1.0, "novel_view": 0.0}
    clips = {"input": str(tmp_path / "in"), "num_frames": 49, "size": [256, 256], "masks": masks}
    trees = {}
    for name, num_gpus in (("tasks", 0), ("actors", 1)):
        found = watched(tmp_path / name, num_gpus, **clips, depth_num_gpus=0.5 * num_gpus)
        assert (found["counts"]["samples"], found["actors"] > 0) == (32, num_gpus > 0)
        assert found["store_mb"] <= 500
        trees[name] = verify(str(tmp_path / name / "out")).tree_sha256
    assert trees["tasks"] == trees["actors"]
