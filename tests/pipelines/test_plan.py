"""The predictions of `ex4d plan`, compared with arithmetic by hand and with a run on the same corpus."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import pytest

from ex4d import storage
from ex4d.errors import ConfigError
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.inputs import Source
from pipelines.preprocess import cost as plan
from pipelines.preprocess import cost_history
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.cost import Measured, PlanConfig
from pipelines.preprocess.settings import CaptionerConfig, PreprocessConfig


@pytest.fixture(autouse=True)
def own_history(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def measured(cpu_s: float, gpu_s: float = 0.0, samples: int = 2, sample_bytes: int = 1 << 20) -> Measured:
    return Measured({"masks": cpu_s, "depth": 2 * gpu_s}, cpu_s, gpu_s, samples, sample_bytes, video_s=30.0)


def test_a_mean_is_scaled_to_the_corpus_and_laid_out_on_the_cluster():
    config = PreprocessConfig(output="out", shard_size_mb=100, depth_num_gpus=0.5)
    choice = PlanConfig(num_videos=3600, num_cpus=4, num_gpus=1, usd_per_cpu_hour=0.5, usd_per_gpu_hour=2.0)
    made = plan.scale([measured(1.0, 2.0), measured(3.0, 2.0)], 10, config, choice)
    assert (made.cpu_h, made.gpu_h, made.video_h, made.samples) == (2.0, 2.0, 30.0, 7200)
    assert made.usd == 2.0 * 0.5 + 2.0 * 2.0
    assert made.shards == 36
    assert made.disk_gb == pytest.approx(2 * 3600 * 2**20 / 1e9)
    # The GPU is the scarcer: 2 h of it, against 2 h over 4 CPUs.
    assert made.wall_h == pytest.approx((plan.RAY_START_S + 7200 / plan.EFFICIENCY) / 3600)
    # A clip takes 0.5 s on the CPUs and holds half a GPU for 4 s.
    assert made.gpu_actors == 8
    # The standard error of two of 3600, with the correction for a finite corpus.
    assert made.cpu_s.error == pytest.approx(math.sqrt(2) * math.sqrt((1 - 2 / 3600) / 2))


def test_one_price_alone_is_no_cost_if_the_other_machine_is_used_too():
    config, choice = PreprocessConfig(output="out"), PlanConfig(num_gpus=1, usd_per_cpu_hour=0.5)
    assert plan.scale([measured(1.0)], 7200, config, choice).usd == 1.0
    assert plan.scale([measured(1.0, 1.0)], 7200, replace(config, depth_num_gpus=1.0), choice).usd is None


def test_a_gpu_that_only_the_captioner_reserves_is_planned_for():
    config = PreprocessConfig(output="out", captioner=CaptionerConfig(model="any", num_gpus=0.5))
    choice = PlanConfig(num_videos=3600, num_cpus=4, num_gpus=1)
    assert plan.scale([measured(1.0, 2.0), measured(3.0, 2.0)], 10, config, choice).gpu_actors == 8


def test_a_corpus_that_was_measured_whole_leaves_no_error():
    made = plan.scale([measured(1.0), measured(3.0)], 2, PreprocessConfig(output="out"), PlanConfig())
    assert (made.cpu_s.value, made.cpu_s.error) == (2.0, 0.0)


def test_a_gpu_stage_without_gpus_is_an_invalid_choice():
    with pytest.raises(ConfigError, match=r"plan\.num_gpus"):
        plan.scale([measured(1.0, 1.0)], 2, PreprocessConfig(output="out", depth_num_gpus=1), PlanConfig())


def test_the_sample_is_spread_over_file_sizes(tmp_path):
    sources = []
    for index in range(9):
        path = tmp_path / f"{(7 * index) % 9}.mp4"
        path.write_bytes(b"x" * (1 + (7 * index) % 9))
        sources.append(Source(str(path), path.name, True))
    assert [source.name for source in plan.spread(sorted(sources, key=lambda one: one.name), 3)] == [
        "1.mp4",
        "4.mp4",
        "7.mp4",
    ]
    assert len(plan.spread(sources, 20)) == 9


def test_sizes_in_a_store_count_too_and_few_are_asked_for(monkeypatch):
    sources = []
    for index in range(9):
        url = f"memory://plan/{(7 * index) % 9}.mp4"
        storage.write_bytes(url, b"x" * (1 + (7 * index) % 9))
        sources.append(Source(url, url.rpartition("/")[2]))
    assert [source.name for source in plan.spread(sorted(sources, key=lambda one: one.name), 3)] == [
        "1.mp4",
        "4.mp4",
        "7.mp4",
    ]
    asked = []
    size = storage.size
    monkeypatch.setattr(storage, "size", lambda url: asked.append(url) or size(url))
    monkeypatch.setattr(plan, "MOST_ASKED", 4)
    sources.append(Source("memory://plan/gone.mp4", "gone.mp4"))
    assert len(plan.spread(sources, 3)) == 3
    assert len(asked) == 4


def test_a_plan_of_a_corpus_and_its_judgement_by_the_run(tmp_path):
    paths = write_corpus(tmp_path / "videos", SyntheticConfig(num_videos=3, num_frames=9, size=(64, 64), supersample=1))
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    few = {"num_frames": 9, "size": (64, 64), "num_workers": 1, "keep_staging": "none"}  # the plan still counts samples
    config = PreprocessConfig(output=str(tmp_path / "out"), input=str(tmp_path / "videos"), **few)
    sections = {"preprocess": config, "plan": PlanConfig(num_cpus=2), "synthetic": SyntheticConfig()}
    made, earlier = plan.write(sections)
    assert earlier == []
    assert "no earlier plan" in cost_history.judgement(earlier)
    assert (made.num_videos, made.sample_videos, made.samples) == (4, 4, len(paths))
    assert made.cpu_s.value == pytest.approx(sum(mean.value for mean in made.stage_s.values()))
    assert made.stage_s["masks"].value > 0
    assert json.loads((tmp_path / "out" / plan.FILE).read_text())["samples"] == 3
    assert "4 videos" in made.table()

    preprocess.run(config, runner_name="inline")
    line = json.loads((tmp_path / "out" / "run.jsonl").read_text().splitlines()[-1])
    actual = sum(stage["worker_s"] for stage in line["stages"].values()) / 4
    (error,) = cost_history.earlier_errors()
    assert error == pytest.approx(made.cpu_s.value / actual - 1)
    assert f"{error:+.0%} (median)" in cost_history.judgement([error])


def test_a_run_from_before_the_plan_does_not_judge_it(tmp_path):
    stages = {"masks": {"worker_s": 8.0, "num_cpus": 1.0}}
    line = {"wall_s": 1.0, "stages": stages, "committed": True, "counts": {"videos_in": 4}}
    (tmp_path / "run.jsonl").write_text(json.dumps({**line, "started": "2020-01-01T00:00:00Z"}) + "\n")
    made = plan.scale([measured(4.0)], 4, PreprocessConfig(output=str(tmp_path)), PlanConfig())
    cost_history.remember(str(tmp_path), made.cpu_s.value)
    assert cost_history.earlier_errors() == []
    later = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write(json.dumps({**line, "started": later}) + "\n")
    assert cost_history.earlier_errors() == [1.0]


@pytest.mark.parametrize("choice", [{"sample_videos": 0}, {"num_cpus": 0}, {"num_gpus": -1}, {"usd_per_gpu_hour": -1}])
def test_choices_that_cannot_be_are_refused(choice):
    with pytest.raises(ConfigError, match="plan"):
        PlanConfig(**choice)
