"""What makes a step faster or smaller changes no loss: compiled blocks, partial and selective recomputation, swap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from make_run import make_dataset, make_sample
from recorded import run
from test_exact import chosen, losses, on_two_ranks

from ex4d.errors import ConfigError
from ex4d.models import linear_codec, tiny
from ex4d.train.config import TrainConfig

PLAIN: dict[str, object] = {}
RECOMPUTE = {"activation_checkpointing": True}
KINDS = {
    "partial": RECOMPUTE | {"checkpoint_blocks": 1},
    "selective": RECOMPUTE | {"checkpoint_keep_attention": True},
    "compiled": RECOMPUTE | {"compile": True},
    "all": RECOMPUTE | {"compile": True, "checkpoint_keep_attention": True, "block_swap": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset and a base of two blocks."""
    path = tmp_path_factory.mktemp("speed")
    make_dataset(path)
    codec = linear_codec.fit(np.stack([make_sample(index).frames for index in range(9)]), z_dim=8, num_shared=4)
    tiny.build_tiny(path / "base", codec, tiny.new_transformer(8, num_layers=2))
    return path


def test_partial_and_selective_recomputation_change_no_bit(folder: Path, alone) -> None:
    for name, kind in {"plain": PLAIN, **{name: KINDS[name] for name in ("partial", "selective")}}.items():
        assert run(alone, chosen(folder, name, num_steps=3, zero_stage=0, **kind)) == 0
    assert losses(folder, "plain") == losses(folder, "partial") == losses(folder, "selective")
    assert len(set(losses(folder, "plain"))) == 3


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", [0, 2])
def test_twenty_steps_at_one_and_two_ranks(folder: Path, alone, stage: int) -> None:
    # At 1e-2, thirty times the method's rate, AdamW carries a compiled kernel's rounding on to 1.3e-5 in twenty steps.
    common = {"lr": 1e-3, "num_steps": 20, "save_every": 99, "zero_stage": stage, "micro_batch_size": 1}
    kinds = {"plain": PLAIN, **KINDS}
    runs = {name: chosen(folder, f"2-{stage}-{name}", **common, **kind) for name, kind in kinds.items()}
    assert on_two_ranks(folder, list(runs.values())) == [0, 0]
    for name, kind in kinds.items():
        assert run(alone, chosen(folder, f"1-{stage}-{name}", **common, grad_accum_steps=2, **kind)) == 0
    plain = losses(folder, f"1-{stage}-plain")
    assert len(plain) == 20
    differences = {
        f"{ranks} {name}": max(
            abs(a - b) for a, b in zip(losses(folder, f"{ranks}-{stage}-{name}"), plain, strict=True)
        )
        for ranks in (1, 2)
        for name in kinds
    }
    print(differences)
    assert max(differences.values()) <= 1e-6, differences


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("checkpoint_blocks: 2", "activation_checkpointing=true"),
        ("checkpoint_keep_attention: true", "must be false"),
        ("{activation_checkpointing: true, checkpoint_blocks: -1}", "at least 0"),
        ("{activation_checkpointing: true, checkpoint_blocks: auto, block_swap: 1}", "null with train.block_swap"),
        ("{compile: true, zero_stage: 3}", "false with train.zero_stage=3"),
    ],
)
def test_what_cannot_be_is_refused(setting: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed):
        TrainConfig(**yaml.safe_load(setting))
