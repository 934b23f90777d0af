"""Training on precomputed latents: equal losses and adapter, no encoder loaded, latents of other models rejected."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from make_run import make_base, make_dataset
from safetensors.torch import load as load_safetensors

from ex4d import config
from ex4d.data import manifest
from ex4d.data.texts import text_key
from ex4d.errors import ConfigError, ContractError
from ex4d.models import backbone
from ex4d.models.backbone import ModelConfig
from ex4d.train import runlog
from ex4d.train.config import Place, TrainConfig
from ex4d.train.datasets import Datasets
from ex4d.train.job import build_job
from ex4d.train.trainer import Trainer
from pipelines.encode import job as encode

STEPS = {"num_steps": 6, "save_every": 3, "micro_batch_size": 2, "lr": 1e-3, "wandb_mode": "disabled", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of nine clips, a base, and the dataset's latents by that base, as float32."""
    path = tmp_path_factory.mktemp("latents")
    make_dataset(path)
    make_base(path)
    config = encode.EncodeConfig(str(path / "dataset"), str(path / "latents"), dtype="float32", prompts=("a room",))
    assert encode.run(config, model_of(path), runner_name="inline").exit_code == 0
    return path


def model_of(folder: Path, **changes) -> ModelConfig:
    return ModelConfig(base=str(folder / "base"), lora_rank=3, adapter_hidden=8, **changes)


def losses(output: Path) -> list[float]:
    return [step["loss"] for step in runlog.read(output / "metrics.jsonl")]


def train(folder: Path, data: str, output: Path, alone: Place, **changes) -> list[float]:
    values = (
        STEPS | {"data": str(folder / data), "output": str(output), "prompt": None, "condition_dropout": 0.3} | changes
    )
    config = TrainConfig(**values)
    job = build_job(config, model_of(folder), alone, torch.device("cpu"))
    assert Trainer(config, job, alone, torch.device("cpu"), lambda metrics: None).run() == 0
    return losses(output)


@pytest.fixture(scope="module")
def on_pixels(folder, alone, tmp_path_factory):
    """The losses and the adapter of a training that encodes its clips itself."""
    output = tmp_path_factory.mktemp("pixels")
    return train(folder, "dataset", output, alone), adapter(output)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_safetensors((output / "adapter" / "adapter.safetensors").read_bytes())


def test_training_on_latents_is_training_on_pixels(folder, alone, tmp_path, on_pixels, monkeypatch):
    asked = []
    load = backbone.load_base

    def watched(*args, **kwargs):
        asked.append(tuple(kwargs["components"]))
        return load(*args, **kwargs)

    monkeypatch.setattr(backbone, "load_base", watched)
    whole = train(folder, "latents", tmp_path / "whole", alone)
    assert asked == [("transformer",)]  # no VAE, no CLIP, no text encoder
    assert whole == pytest.approx(on_pixels[0], abs=1e-6)
    ours = adapter(tmp_path / "whole")
    assert ours.keys() == on_pixels[1].keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, on_pixels[1][name], atol=1e-5, rtol=0)
    train(folder, "latents", tmp_path / "broken", alone, num_steps=3)
    assert train(folder, "latents", tmp_path / "broken", alone) == whole  # and it goes on bit for bit
    assert all(torch.equal(adapter(tmp_path / "broken")[name], tensor) for name, tensor in ours.items())


def test_a_fixed_prompt_must_have_been_encoded(folder, alone, tmp_path):
    fixed = {"prompt": "a room", "num_steps": 3}
    found = [train(folder, data, tmp_path / data, alone, **fixed) for data in ("latents", "dataset")]
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    with pytest.raises(ConfigError, match=r"train\.prompt='unheard of'.*encode\.prompts"):
        train(folder, "latents", tmp_path / "c", alone, prompt="unheard of")


def test_latents_of_another_model_are_refused(folder, alone, tmp_path):
    other = tmp_path / "base"
    shutil.copytree(folder / "base", other)
    path = other / "vae" / "config.json"
    path.write_text(path.read_text().replace("\n}", ',\n  "note": "another"\n}'))
    config = TrainConfig(data=str(folder / "latents"), output=str(tmp_path / "out"), **STEPS)
    theirs = manifest.read_dataset(str(folder / "latents"))["latents"]["models"]["vae"]
    model = ModelConfig(base=str(other), lora_rank=3, adapter_hidden=8)
    with pytest.raises(ContractError, match=rf"another model: their vae is {theirs} .* is [0-9a-f]{{16}}$"):
        build_job(config, model, alone, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"model\.mask_range='released': must be 'unit'"):
        build_job(config, model_of(folder, mask_range="released"), alone, torch.device("cpu"))


def test_a_damaged_text_is_a_bad_sample_not_a_wrong_one(folder, alone, tmp_path):
    data = tmp_path / "latents"
    shutil.copytree(folder / "latents", data, ignore=shutil.ignore_patterns("staging"))
    row = next(r for r in pq.read_table(data / "text.parquet").to_pylist() if r["text"] == "clip 3")
    with open(data / row["file"], "r+b") as file:
        file.seek(row["offset"])
        file.write(b"\x55")
    config = TrainConfig(data=str(data), output=str(tmp_path / "out"), **STEPS | {"prompt": None})
    loader = build_job(config, model_of(folder), alone, torch.device("cpu")).open_loader("train", 0, 7, 1)
    batch = next(loader)
    loader.close()
    assert batch["valid"].sum() == 6
    assert [key[-1] for key, valid in zip(batch["keys"], batch["valid"], strict=True) if not valid] == ["3"]
    assert text_key("clip 3") in next(iter(loader.bad.values()))


def test_latents_of_strangers_are_decoded_in_the_child(folder, alone, monkeypatch):
    from ex4d import isolation

    def batch(trust: str) -> dict:
        values = STEPS | {"data": str(folder / "latents"), "prompt": None, "loader": {"trust": trust}}
        opened = Datasets(config.validate(TrainConfig, values, "train"), model_of(folder), alone)
        return next(opened.open("train", 0, 2))

    own, asked, run = batch("own"), [], isolation.run
    monkeypatch.setattr(isolation, "run", lambda *args, **options: asked.append(args[0]) or run(*args, **options))
    foreign = batch("foreign")
    assert set(asked) == {"decode_one"}
    assert foreign["captions"] == own["captions"]
    assert torch.equal(torch.as_tensor(foreign["latents"]), torch.as_tensor(own["latents"]))
