"""The small real base under the engine: dtypes after its start, swapped blocks, and the adapter file's metadata."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from make_run import make_dataset

from ex4d.data.loader import LoaderConfig
from ex4d.errors import ConfigError
from ex4d.generate import GenerateConfig
from ex4d.models import backbone, weights
from ex4d.train import runlog
from ex4d.train.config import Place, TrainConfig
from ex4d.train.identity import FREE, identity
from ex4d.train.job import build_job
from ex4d.train.trainer import Trainer

MODEL = backbone.ModelConfig(lora_rank=3, adapter_hidden=8, dtype="bfloat16")
STEPS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("real"))


def make_trainer(dataset: Path, output: Path, place: Place, **values: Any) -> Trainer:
    defaults = {"num_steps": STEPS, "lr": 1e-2, "wandb_mode": "disabled", "micro_batch_size": 2, "shift": 3.0}
    defaults |= {"activation_checkpointing": True}
    config = TrainConfig(data=str(dataset), output=str(output), **(defaults | values))
    device = torch.device("cpu")
    return Trainer(config, build_job(config, MODEL, place, device), place, device, lambda _: None)


def losses(output: Path) -> list[float]:
    return [step["loss"] for step in runlog.read(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def resident(alone: Place, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without swapped blocks."""
    output = tmp_path_factory.mktemp("resident")
    assert make_trainer(dataset, output, alone, zero_stage=0).run() == 0
    return output


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_dtypes_and_losses_at_every_stage_with_every_block_swapped(
    stage: int, alone: Place, dataset: Path, resident: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(dataset, tmp_path, alone, zero_stage=stage, block_swap=4)
    model: Any = trainer.job.model
    trainables = model.trainable_parameters()
    assert len(trainables) == 4 * 20 + 8
    assert {value.dtype for value in trainables.values()} == {torch.float32}
    frozen = {name: value.dtype for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen["transformer.patch_embedding.weight"] == torch.bfloat16
    assert not [name for name in frozen if ".blocks." in name], "swapped weights are out of DeepSpeed's sight"
    assert trainer.run() == 0
    assert {value.dtype for value in trainer.engine.weights().values()} == {torch.float32}
    plain = resident
    if stage == 3:  # its own linear layer adds the bias after rounding to bfloat16, swapped or not: 5e-4 at step 1
        plain = tmp_path / "plain"
        make_trainer(dataset, plain, alone, zero_stage=stage).run()
    assert losses(tmp_path) == losses(plain)
    assert losses(tmp_path) == pytest.approx(losses(resident), rel=2e-3)
    assert len(set(losses(tmp_path))) == STEPS


def test_the_adapter_is_sampled_with_the_shift_that_it_was_trained_with(resident: Path) -> None:
    metadata = weights.read_metadata(resident / "adapter")
    assert metadata.shift == 3.0
    assert GenerateConfig().for_adapter(metadata).shift == 3.0
    assert GenerateConfig(shift=7.0).for_adapter(metadata).shift == 7.0
    with pytest.raises(ConfigError, match=r"generate.shift=0"):
        GenerateConfig(shift=0.0)


def test_the_adapter_is_sampled_under_the_prompt_that_it_was_trained_with(
    alone: Place, dataset: Path, tmp_path: Path
) -> None:
    make_trainer(dataset, tmp_path, alone, prompt="a street").run()
    metadata = weights.read_metadata(tmp_path / "adapter")
    sampler = GenerateConfig().for_adapter(metadata)
    assert (sampler.prompt, sampler.negative_prompt) == ("a street", "")
    assert GenerateConfig(prompt="").for_adapter(metadata).prompt == ""


def test_the_loader_is_the_configured_one(alone: Place, dataset: Path, tmp_path: Path) -> None:
    chosen = LoaderConfig(num_threads=0, prefetch_batches=0, cache_dir=str(tmp_path / "cache"))
    trainer = make_trainer(dataset, tmp_path / "run", alone, loader=chosen)
    assert trainer.batches.config == chosen
    trainer.batches.close()


def test_place_and_memory_are_free_and_a_swap_without_recomputation_is_refused(dataset: Path) -> None:
    config = TrainConfig(activation_checkpointing=True, block_swap=2, loader=LoaderConfig(num_threads=4))
    assert identity(config, MODEL, "") == identity(TrainConfig(), MODEL, "")
    assert {field.name for field in dataclasses.fields(TrainConfig)} >= FREE
    with pytest.raises(ConfigError, match=r"train.loader.num_threads=-1"):
        LoaderConfig(num_threads=-1)
    with pytest.raises(ConfigError, match=r"train.block_swap=2: .*activation_checkpointing"):
        TrainConfig(block_swap=2)
