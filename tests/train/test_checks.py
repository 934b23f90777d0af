"""Impossible settings are rejected before a run starts, in one sentence and with exit status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from make_run import make_base, make_config, make_dataset

from ex4d.errors import ConfigError
from ex4d.models import backbone
from ex4d.train import validation
from ex4d.train.checks import check_run
from ex4d.train.config import TrainConfig
from pipelines import cli

APART = {"validate_every": 2, "validate_apart": True}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_dataset(tmp_path_factory.mktemp("checks"), train=2, val=1))


def test_float16_is_refused(dataset: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype='float16': must be bfloat16 or float32"):
        check_run(TrainConfig(data=dataset), backbone.ModelConfig(dtype="float16"), 1)
    for dtype in ("auto", "bfloat16", "float32"):
        check_run(TrainConfig(data=dataset), backbone.ModelConfig(dtype=dtype), 1)


@pytest.mark.parametrize("apart", [True, False])
def test_a_validation_without_samples_is_refused(apart: bool, tmp_path: Path) -> None:
    data = str(make_dataset(tmp_path, train=2, val=0))
    with pytest.raises(ConfigError, match=r"train\.validate_every=2: must be null, since .* no validation samples"):
        check_run(TrainConfig(data=data, validate_every=2, validate_apart=apart), backbone.ModelConfig(), 1)
    check_run(TrainConfig(data=data), backbone.ModelConfig(), 1)


def test_devices_that_cannot_be_are_refused(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(gpus: int, **train: object) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        check_run(TrainConfig(data=dataset, **train), backbone.ModelConfig(), 2)

    with pytest.raises(ConfigError, match=r"train\.device='cuda': must be cpu or auto"):
        check(0, device="cuda")
    check(1, device="cuda")
    check(0, device="cuda", launcher="ray")
    for gpus, device in ((0, "cuda:0"), (3, "cuda"), (3, "cuda:3"), (3, "cuda:1"), (3, "gpu"), (3, "cuda:-1")):
        with pytest.raises(ConfigError, match=r"train\.validate_device"):
            check(gpus, validate_device=device, **APART)
    check(3, validate_device="cuda:2", **APART)
    check(3, validate_device="cuda:1", device="cpu", **APART)
    check(0, validate_device="cuda:9")  # nothing is validated apart
    for device in ("cpu", "cuda", "cuda:0"):
        check(0, validate_device=device, launcher="ray", **APART)
    with pytest.raises(ConfigError, match=r"train\.validate_device='cuda:7': must be cpu or, under Ray, cuda"):
        check(8, validate_device="cuda:7", launcher="ray", **APART)


def test_the_command_says_it_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    make_dataset(tmp_path, train=2, val=1)
    config = make_config(tmp_path, device="cuda", output=str(tmp_path / "out"))
    assert cli.main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "PyTorch finds no GPU" in said
    assert not (tmp_path / "out").exists()


def test_apart_on_a_cpu_loads_the_base_in_the_ranks_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path, train=2, val=1)
    make_base(tmp_path)
    asked = []

    class Stop(Exception):
        pass

    def watched(*arguments: object, **_: object) -> None:
        asked.append(arguments[2])
        raise Stop

    monkeypatch.setattr(backbone, "load_base", watched)
    train = {"data": str(tmp_path / "dataset"), "validate_every": 2, "validate_apart": True}
    for dtype, wanted in (("bfloat16", "bfloat16"), (None, "auto")):
        body = {"train": train, "model": {"base": str(tmp_path / "base")}, "dtype": dtype}
        (tmp_path / "job.json").write_text(json.dumps(body))
        with pytest.raises(Stop):
            validation.evaluate_weights(tmp_path)
        assert asked.pop() == wanted


def test_what_serves_the_ranks_gpus_is_off_in_a_validation_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a validation on a GPU opens no other: what is pinned, for one, belongs to the current one."""
    found: list[tuple[TrainConfig, torch.device]] = []
    current: list[torch.device] = []

    def watched(config: TrainConfig, model: object, place: object, device: torch.device) -> None:
        found.append((config, device))
        raise InterruptedError

    monkeypatch.setattr(validation, "build_job", watched)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    gpu = {"attention": "cudnn", "compile": True, "block_swap": 4, "activation_checkpointing": True}
    for device in ("cpu", "cuda:3", "cuda"):
        train = {"validate_every": 2, "validate_apart": True, "validate_device": device, **gpu}
        (tmp_path / "job.json").write_text(json.dumps({"train": train, "model": {}}))
        with pytest.raises(InterruptedError):
            validation.evaluate_weights(tmp_path)
    (on_cpu, _), (on_gpu, _), _ = found
    assert (on_cpu.attention, on_cpu.compile, on_cpu.block_swap) == ("auto", False, 0)
    assert (on_gpu.attention, on_gpu.compile, on_gpu.block_swap) == ("cudnn", True, 4)
    assert [device for _, device in found] == [torch.device(name) for name in ("cpu", "cuda:3", "cuda")]
    assert current == [torch.device("cuda:3")]
