"""Separate validation: equal figures, real videos, and a validator that fails in every way without any effect."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from make_run import make_base, make_config, make_dataset
from safetensors.torch import load_file
from toy import train_toy

from ex4d import generate, video
from ex4d.data.loader import ShardLoader
from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig, load_base
from ex4d.models.encoders import to_pixels
from ex4d.train import checkpoint, runlog, validation, validator
from ex4d.train.config import EXIT_PREEMPTED, Place, TrainConfig
from ex4d.train.job import build_job
from pipelines import cli
from pipelines.encode import job as encode

RUN = {"num_steps": 6, "save_every": 3, "validate_every": 3, "validate_samples": 5, "lr": 1e-2}


class Script(validator.Child):
    """A validator that executes the given code in a real process; `folder` is that of its step."""

    def __init__(self, folder: Path, code: str):
        command = [sys.executable, "-c", f"folder = {str(folder)!r}\n{code}"]
        self._process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)


BROKEN = {
    "crashes": "raise SystemExit(3)",
    "is killed as if out of memory": "import os; os.kill(os.getpid(), 9)",
    "hangs": "import time; time.sleep(600)",
    "says nothing": "",
    "lies": "open(folder + '/result.json', 'w').write('{\"validation_loss\": NaN, \"videos\": [\"../../x\"]}')",
    "writes nonsense": "open(folder + '/result.json', 'w').write('[1')",
    "removes what it judges": "import shutil; shutil.rmtree(folder)",
}


def figures(output: Path) -> list[tuple]:
    return [(m["step"], m["loss"], m["grad_norm"]) for m in runlog.read(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(alone, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    assert train_toy(str(output), alone, **RUN) == 0
    return output


@pytest.mark.parametrize("fate", BROKEN)
def test_a_broken_validator_changes_nothing(fate, alone, undisturbed, tmp_path):
    settings = {"validate_videos": 2, "validate_timeout_s": 1.0}
    started = time.monotonic()
    code = train_toy(
        str(tmp_path), alone, {"validator": lambda folder, _: Script(folder, BROKEN[fate])}, **RUN, **settings
    )
    assert code == 0
    assert time.monotonic() - started < 30
    assert figures(tmp_path) == figures(undisturbed)
    ours, theirs = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (tmp_path, undisturbed))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    said = runlog.read(tmp_path / "validation.jsonl")
    assert {result["step"] for result in said} == {3, 6}
    assert all(result["failed"] for result in said)


def test_a_validator_that_cannot_be_started_changes_nothing(alone, undisturbed, tmp_path):
    def refuse(folder, device):
        raise OSError("no more processes")

    assert train_toy(str(tmp_path), alone, {"validator": refuse}, **RUN, validate_videos=1) == 0
    assert figures(tmp_path) == figures(undisturbed)
    assert [r["failed"] for r in runlog.read(tmp_path / "validation.jsonl")] == ["no more processes"] * 2


def test_results_come_by_step_and_the_best_checkpoint_learns_of_them(alone, tmp_path):
    answer = (
        'import json; open(folder + "/result.json", "w").write(json.dumps({"validation_loss": LOSS, "videos": []}))'
    )
    given = iter((0.25, 0.5, 0.75))

    def start(folder: Path, device: str) -> Script:
        return Script(folder, answer.replace("LOSS", str(next(given))))

    settings = RUN | {"num_steps": 9, "keep_last": 1, "validate_apart": True}
    assert train_toy(str(tmp_path), alone, {"validator": start, "pause_s": 0.3}, **settings) == 0
    said = {result["step"]: result["validation_loss"] for result in runlog.read(tmp_path / "validation.jsonl")}
    assert said == {3: 0.25, 6: 0.5, 9: 0.75}
    left = {path.name: checkpoint.read_state(path).validation_loss for path in checkpoint.complete(tmp_path)}
    assert left == {"step-000003": 0.25, "step-000009": 0.75}, "the last one, and the best one"


def test_what_was_found_is_kept_where_the_run_is_stopped_within_the_next_step(alone, tmp_path):
    answer = 'import json; open(folder + "/result.json", "w").write(json.dumps({"validation_loss": 0.5, "videos": []}))'
    fate = {"validator": lambda folder, _: Script(folder, answer), "pause_s": 0.3, "term_in": 15}
    settings = RUN | {"num_steps": 9, "validate_apart": True, "micro_batch_size": 1, "grad_accum_steps": 2}
    assert train_toy(str(tmp_path), alone, fate, **settings) == EXIT_PREEMPTED  # the first micro batch of step 8
    assert [(r["step"], r["validation_loss"]) for r in runlog.read(tmp_path / "validation.jsonl")] == [
        (3, 0.5),
        (6, 0.5),
    ]


def test_a_slow_validator_is_not_waited_for_at_the_next(alone, tmp_path):
    sleep = (
        'import time; time.sleep(3); open(folder + "/result.json", "w").write(\'{"validation_loss": 1, "videos": []}\')'
    )
    assert (
        train_toy(
            str(tmp_path),
            alone,
            {"validator": lambda f, _: Script(f, sleep)},
            **RUN | {"num_steps": 9},
            validate_apart=True,
        )
        == 0
    )
    late, *done = sorted(runlog.read(tmp_path / "validation.jsonl"), key=lambda result: "failed" not in result)
    assert late["step"] == 6
    assert late["failed"].startswith("skipped")
    assert [(result["step"], result["validation_loss"]) for result in done] == [(3, 1), (9, 1)], "the last one waits"
    assert checkpoint.read_state(checkpoint.latest(tmp_path)).validation_loss == 1


@pytest.mark.parametrize("wrong", [{"validate_videos": 1}, {"validate_apart": True}])
def test_a_validation_without_a_rhythm_is_refused(wrong):
    with pytest.raises(ConfigError, match="validate_every"):
        TrainConfig(**wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("validation")
    make_dataset(path, train=4, val=3)
    make_base(path)
    return path


SETTINGS = {"num_steps": 4, "save_every": 2, "num_processes": 1, "micro_batch_size": 2}
SETTINGS |= {"validate_every": 2, "validate_samples": 3, "validate_videos": 2, "validate_video_steps": 2}


@pytest.fixture(scope="module")
def in_ranks(folder) -> Path:
    config = make_config(folder, **SETTINGS, output=str(folder / "ranks"))
    assert cli.main(["train", str(config)]) == 0
    return config


@pytest.mark.heavy
def test_videos_are_made_of_held_out_clips_by_another_process(folder, in_ranks):
    """The real child: condition, generated and real clip beside each other; the first step may outrun the second."""
    output = folder / "ranks"
    steps = runlog.read(output / "metrics.jsonl")
    assert [len(step.get("validation_videos", [])) for step in steps][1] == 2
    assert steps[1]["validation_loss"] > 0
    done = [result for result in runlog.read(output / "validation.jsonl") if "videos" in result]
    assert done
    assert done[0]["videos"] == steps[done[0]["step"] - 1]["validation_videos"]
    frames, _ = video.read(output / done[0]["videos"][0])
    assert frames.shape == (5, 32, 96, 3)
    given, made, real = np.split(frames.astype(float), 3, axis=2)
    base = load_base(str(folder / "base"), components=("vae",))
    batch = next(ShardLoader(str(folder / "dataset"), "val", 1, 0))
    clip, visible = torch.from_numpy(batch["frames"]), torch.from_numpy(batch["visible"])
    for panel, frames in ((real, clip), (given, clip * visible[..., None])):
        seen = generate.to_frames(base.decode_latents(base.encode_video(to_pixels(frames))))
        # By luma: the file halves the resolution of colour, and these clips are noise.
        assert np.abs((panel - seen) @ [0.2126, 0.7152, 0.0722]).mean() < 4, "as the codec sees it"
    assert np.abs(made - real).mean() > 1
    assert not list((output / "validation").glob("*/adapter.safetensors"))


@pytest.mark.heavy
def test_the_figure_is_the_same_apart(folder, in_ranks):
    output = folder / "apart"
    # Saved at each step only so that the second validation is not left out: the first is waited for by hand.
    changes = ("train.validate_apart=true", "train.validate_videos=0", "train.num_steps=2")
    assert cli.main(["train", str(in_ranks), f"train.output={output}", *changes]) == 0
    apart = {r["step"]: r["validation_loss"] for r in runlog.read(output / "validation.jsonl")}
    ranks = {m["step"]: m["validation_loss"] for m in runlog.read(folder / "ranks" / "metrics.jsonl")[1::2]}
    assert apart == {2: ranks[2]}
    assert checkpoint.read_state(checkpoint.latest(output)).validation_loss == ranks[2]


@pytest.mark.heavy
def test_a_latent_dataset_is_judged_as_its_pixels_are(folder):
    """In this process, with the same adapter on both; the latents' base has no VAE, so one is loaded to decode them."""
    settings = encode.EncodeConfig(
        str(folder / "dataset"), str(folder / "latents"), dtype="float32", captions=False, prompts=("",)
    )
    model = ModelConfig(base=str(folder / "base"), lora_rank=3, adapter_hidden=8)
    assert encode.run(settings, model, runner_name="inline").exit_code == 0
    results, videos = [], []
    for data in ("dataset", "latents"):
        config = TrainConfig(
            data=str(folder / data), validate_every=1, validate_samples=3, validate_videos=1, validate_apart=True
        )
        job = build_job(config, model, Place(0, 1, 0), torch.device("cpu"))
        step = validator.step_folder(folder / f"of {data}", 1)
        job.write_adapter(step, {n: p.detach().clone() for n, p in job.model.trainable_parameters().items()}, 1)
        (step / "job.json").write_text(json.dumps({name: job.facts[name] for name in ("train", "model")}))
        validation.evaluate_weights(step)
        results.append(json.loads((step / "result.json").read_text()))
        videos.append(video.read(step / "clip-0.mp4")[0].astype(float))
    assert results[0]["validation_loss"] == pytest.approx(results[1]["validation_loss"], abs=1e-6)
    assert results[0]["videos"] == results[1]["videos"] == ["clip-0.mp4"]
    assert np.abs(videos[0] - videos[1]).mean() < 0.5


def test_the_child_is_the_first_to_be_killed_and_dies_with_its_rank(tmp_path):
    """Started by a process that is then killed: its priority, its out-of-memory score, its end."""
    code = (
        "import os, sys, time; from pathlib import Path; from ex4d.train import validator\n"
        "child = validator.Child(Path(sys.argv[1]), 'cpu')\n"
        "pid = child._process.pid\n"
        "score = open(f'/proc/{pid}/oom_score_adj').read().strip()\n"
        "print(pid, os.getpriority(os.PRIO_PROCESS, pid), score, flush=True)\n"
        "time.sleep(60)\n"
    )
    os.mkfifo(tmp_path / "job.json")  # nobody writes into it: the child waits for ever
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    pid, nice, oom = map(int, rank.stdout.readline().split())
    assert (nice, oom) == (19, 1000)
    time.sleep(0.5)
    rank.send_signal(signal.SIGKILL)
    rank.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/status").exists() and "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, json.dumps({"still there": pid})
        time.sleep(0.05)
