"""Every file in configs/ loads, section by section, into the dataclass that its command reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from ex4d import config
from pipelines import demo, encode, sweep

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {**demo.SECTIONS, **encode.SECTIONS, "sweep": sweep.SweepConfig}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_config_loads(path):
    present = config.read_yaml(path)
    assert present, "an empty config says nothing"
    assert set(present) <= set(CLASSES)
    loaded = config.load(path, {name: CLASSES[name] for name in present})
    assert all(isinstance(loaded[name], CLASSES[name]) for name in present)


def test_the_paper_s_training_is_the_paper_s():
    loaded = config.load(ROOT / "configs" / "train_14b.yaml", {name: CLASSES[name] for name in ("model", "train")})
    assert (loaded["train"].lr, loaded["train"].micro_batch_size, loaded["train"].num_processes) == (3e-5, 4, 8)
    assert (loaded["model"].lora_rank, loaded["model"].lora_alpha) == (16, 16)
