"""A run on two datasets with different clips, 3 : 1 by steps: one order on any ranks, with or without kills."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from make_run import make_base, make_dataset, make_sample
from recorded import read_keys, run
from test_exact import chosen, losses, on_two_ranks

from ex4d import config as configs
from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig
from ex4d.train import runlog
from ex4d.train.config import TrainConfig
from ex4d.train.job import run_identity

NUM_CLIPS, FIRST = (7, 5), (0, 100)  # clips of each dataset, and their first number
COMMON = {"micro_batch_size": 1, "zero_stage": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips of 5 × 32 × 32 and of 9 × 32 × 48 (validation too), and a base."""
    path = tmp_path_factory.mktemp("mixture")
    make_dataset(path / "a", NUM_CLIPS[0], val=0, first=FIRST[0])
    make_dataset(path / "b", NUM_CLIPS[1], val=2, first=FIRST[1], num_frames=9, size=(32, 48))
    make_base(path)
    return path


def mixed(folder: Path, name: str, start: int = 0, kill_at: int | None = None, **train: object) -> dict:
    data = [{"path": str(folder / "a/dataset"), "weight": 3}, {"path": str(folder / "b/dataset")}]
    return chosen(folder, name, start, kill_at, **COMMON | {"data": data} | train)


def origin(keys: list[str]) -> set[int]:
    """Return the datasets to which these keys belong."""
    of = {
        make_sample(first + n).key: index
        for index, (first, count) in enumerate(zip(FIRST, NUM_CLIPS, strict=True))
        for n in range(count)
    }
    return {of[key] for key in keys}


def test_a_step_takes_one_dataset_and_its_clips_once_an_epoch(folder: Path, alone) -> None:
    config = {"num_steps": 12, "save_every": 5, "grad_accum_steps": 2, "validate_every": 6, "validate_samples": 2}
    assert run(alone, mixed(folder, "alone", **config)) == 0
    steps = read_keys(folder / "alone")
    whose = [origin(keys) for keys in steps.values()]
    assert whose == [{0}, {0}, {1}, {0}] * 3
    logged = runlog.read(folder / "alone" / "metrics.jsonl")
    assert [{metrics["dataset"]} for metrics in logged] == whose
    assert logged[2]["tokens_per_s"] / logged[2]["samples_per_s"] == pytest.approx(
        logged[0]["tokens_per_s"] / logged[0]["samples_per_s"] * (3 * 4 * 6) / (2 * 4 * 4)
    )
    assert np.isfinite(logged[5]["validation_loss"])
    for index, count in enumerate(NUM_CLIPS):
        stream = [key for keys in steps.values() if origin(keys) == {index} for key in keys]
        assert len(set(stream[:count])) == count, "each clip once an epoch, whatever lies between"
    again = mixed(folder, "alone", 1, **config | {"num_steps": 14, "grad_accum_steps": 2})
    assert run(alone, again) == 0, "it goes on"
    assert origin(read_keys(folder / "alone")[13]) == {0}


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_killed_and_resumed_on_two_ranks_and_on_one(folder: Path, alone) -> None:
    """52 uninterrupted steps on two ranks, compared with a run that is killed, resumes on one rank and ends on two."""
    last = {"num_steps": 52}
    assert on_two_ranks(folder, [mixed(folder, "whole", **last, save_every=52)]) == [0, 0]
    killed = mixed(folder, "broken", 0, kill_at=18, **last, save_every=5)
    assert -signal.SIGKILL in on_two_ranks(folder, [killed])
    assert run(alone, mixed(folder, "broken", 1, num_steps=23, save_every=5)) == 0
    assert on_two_ranks(folder, [mixed(folder, "broken", 2, **last, save_every=52)]) == [0, 0]
    whole, broken = read_keys(folder / "whole"), read_keys(folder / "broken")
    assert broken == whole
    apart = [abs(a - b) for a, b in zip(losses(folder, "broken"), losses(folder, "whole"), strict=True)]
    assert max(apart[:15]) == 0, "the same ranks, up to the checkpoint that it went on from"
    assert max(apart) <= 1e-6
    counts = Counter(number for keys in whole.values() for number in origin(keys))
    print(counts, max(apart))
    assert sum(counts.values()) == 52, "one dataset a step"
    assert counts[0] / 52 == pytest.approx(0.75, abs=0.01)


def test_weights_and_data_are_the_run_s_identity(folder: Path) -> None:
    def identity(weight: float, order: int = 1) -> object:
        data = [{"path": str(folder / "a/dataset"), "weight": weight}, {"path": str(folder / "b/dataset")}][::order]
        return run_identity(configs.validate(TrainConfig, {"data": data}, "train"), ModelConfig())["dataset"]

    assert len({identity(3), identity(2), identity(3, -1)}) == 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], r"train\.data"),
        ([{"path": "x", "weight": 0}], r"train\.data\.weight=0"),
        ([{"path": "x", "wieght": 1}], r"train\.data.*must be text or a list"),
        ([{"weight": 1}], r"train\.data\.path=''"),
    ],
)
def test_impossible_lists_are_refused(data: list, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        configs.validate(TrainConfig, {"data": data}, "train")
