"""Every file in configs/ loads, section by section, into the dataclass that its command reads; trainings dry-run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ex4d import config
from pipelines.commands import demo
from pipelines.encode import job as encode
from pipelines.preprocess import fingerprints
from pipelines.train import launch as train
from pipelines.train import sweep

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CLASSES = {**demo.sections(), **encode.SECTIONS, "sweep": sweep.SweepConfig}
TRAININGS = [path for path in CONFIGS if "train" in config.read_yaml(path)]
# GB of memory that the file states, with which its dry run must agree.
PROMISED = {"train_14b_48gb.yaml": 48, "train_14b_24gb.yaml": 24}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_loads(path):
    present = config.read_yaml(path)
    assert present, "an empty config says nothing"
    assert set(present) <= set(CLASSES)
    loaded = config.load(path, {name: CLASSES[name] for name in present})
    assert all(isinstance(loaded[name], CLASSES[name]) for name in present)
    if "preprocess" in loaded:
        # The settings refer to a depth network's weights, which do not exist here.
        fingerprints.sample_settings(dataclasses.replace(loaded["preprocess"], depth="sidecar"))


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.name)
def test_a_training_says_what_it_needs_before_it_starts(path, capsys):
    assert train.command(str(path), ["train.dry_run=true", "train.usd_per_gpu_hour=2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"], f"{path.name} does not fit the GPU that it names: {said['memory_bytes']}"
    assert said["memory_bytes"]["total"] < 1e9 * PROMISED.get(path.name, 141)
    assert said["hours"] > 0
    assert said["memory_bytes"]["total"] == pytest.approx(sum([*said["memory_bytes"].values()][:-1]))
    assert said["host_bytes_loading"] > 0
    assert said["usd"] == pytest.approx(2 * said["gpu_hours"])
    chosen = config.load(path, {"train": CLASSES["train"], "model": CLASSES["model"]})
    assert ("vae" in said["memory_bytes"]) == (
        chosen["model"].base != "tiny" and "encode" not in config.read_yaml(path)
    )
    assert (said["host_bytes"] > 0) == (chosen["train"].block_swap > 0)


def test_the_readme_calls_the_figures_of_gpus_estimated():
    measured = (ROOT / "benchmarks" / "results" / "system.md").exists()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert measured or ("No GPU figure is measured yet" in readme and "estimated 33 GB" in readme)


def test_the_paper_s_training_is_the_paper_s():
    loaded = config.load(ROOT / "configs" / "train_14b.yaml", {name: CLASSES[name] for name in ("model", "train")})
    chosen = loaded["train"]
    assert (chosen.lr, chosen.micro_batch_size * chosen.grad_accum_steps, chosen.num_processes) == (3e-5, 4, 8)
    assert (loaded["model"].lora_rank, loaded["model"].lora_alpha) == (16, 16)
    smaller = [
        config.load(ROOT / "configs" / name, {"model": CLASSES["model"], "train": CLASSES["train"]})
        for name in PROMISED
    ]
    assert all(one["train"].lr == 3e-5 and one["train"].grad_accum_steps == 32 for one in smaller)
