"""One output, one training: a second start is rejected before it writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig
from ex4d.train.config import TrainConfig
from pipelines.runtime.output import exclusive
from pipelines.train import launch


def start(folder: Path, output: str) -> int:
    train = TrainConfig(data=str(folder / "data"), output=str(folder / output), num_steps=1, device="cpu")
    return launch.run(train, ModelConfig(base="tiny"), "unread.yaml", [])


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", launch.PARENT):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset.json").write_text("{}")
    return tmp_path


def test_a_second_training_of_one_output_is_refused(place):
    with exclusive(str(place / "run")), pytest.raises(ConfigError, match="another run is writing there"):
        start(place, "run")
    assert [path.name for path in (place / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("output", ["data", "data/run", "data/deep/../run"])
def test_a_run_in_its_own_dataset_is_refused(place, output):
    with pytest.raises(ConfigError, match="outside of the dataset"):
        start(place, output)
    assert [path.name for path in (place / "data").iterdir()] == ["dataset.json"]


def test_a_dataset_that_is_not_there_is_known_before_any_rank(place):
    (place / "data/dataset.json").unlink()
    with pytest.raises(ConfigError, match="is missing"):
        start(place, "run")
    assert not (place / "run").exists()
