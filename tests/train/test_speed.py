"""Options that make a step faster or smaller do not change the loss: compilation, partial recomputation, swap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from make_run import make_dataset, make_sample
from recorded import run
from test_exact import chosen, losses, on_ranks, on_two_ranks

from ex4d.errors import ConfigError
from ex4d.train.config import TrainConfig

PLAIN: dict[str, object] = {}
RECOMPUTE = {"activation_checkpointing": True}
KINDS = {
    "partial": RECOMPUTE | {"checkpoint_blocks": 1},
    "selective": RECOMPUTE | {"checkpoint_keep_attention": True},
    "compiled": RECOMPUTE | {"compile": True},
    "all": RECOMPUTE | {"compile": True, "checkpoint_keep_attention": True, "block_swap": 1},
}
ALL = {"plain": PLAIN, **KINDS}
TWENTY = {"lr": 1e-3, "num_steps": 20, "save_every": 99, "micro_batch_size": 1}


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset and a base of two blocks."""
    path = tmp_path_factory.mktemp("speed")
    make_dataset(path)
    codec = tiny.fit_codec(np.stack([make_sample(index).frames for index in range(9)]), z_dim=8, num_shared=4)
    tiny.build_tiny(path / "base", codec, tiny.new_transformer(8, num_layers=2))
    return path


def test_partial_and_selective_recomputation_change_no_bit(folder: Path, alone) -> None:
    for name, kind in {"plain": PLAIN, **{name: KINDS[name] for name in ("partial", "selective")}}.items():
        assert run(alone, chosen(folder, name, num_steps=3, zero_stage=0, **kind)) == 0
    assert losses(folder, "plain") == losses(folder, "partial") == losses(folder, "selective")
    assert len(set(losses(folder, "plain"))) == 3


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_twenty_steps_at_one_and_two_ranks(folder: Path, alone) -> None:
    # One start of the ranks and one graph in each process serve both stages.
    kinds = {(stage, name): kind | {"zero_stage": stage} for stage in (0, 2) for name, kind in ALL.items()}
    runs = [chosen(folder, f"2-{stage}-{name}", **TWENTY, **kind) for (stage, name), kind in kinds.items()]
    assert on_two_ranks(folder, runs) == [0, 0]
    for (stage, name), kind in kinds.items():
        assert run(alone, chosen(folder, f"1-{stage}-{name}", **TWENTY, grad_accum_steps=2, **kind)) == 0
    plain = losses(folder, "1-0-plain")
    assert len(set(plain)) == 20
    apart = {
        (ranks, *kind): difference(losses(folder, f"{ranks}-{kind[0]}-{kind[1]}"), plain)
        for ranks in (1, 2)
        for kind in kinds
    }
    print(apart)
    assert max(apart.values()) <= 1e-6, apart


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_compiled_blocks_differ_no_more_than_another_order_of_summation(folder: Path, alone) -> None:
    """At 30 times the method's learning rate AdamW amplifies all rounding, a compiled kernel's no more than other."""
    common = TWENTY | {"lr": 1e-2, "zero_stage": 0, "grad_accum_steps": 2}
    for name, kind in {"steep": PLAIN, "steep-compiled": KINDS["compiled"]}.items():
        assert run(alone, chosen(folder, name, **common, **kind)) == 0
    # Without wide vectors the plain path adds the same numbers in another order.
    assert on_ranks(folder, [chosen(folder, "steep-narrow", **common)], 1, ATEN_CPU_CAPABILITY="default") == [0]
    compiled, narrow = (
        difference(losses(folder, f"steep-{n}"), losses(folder, "steep")) for n in ("compiled", "narrow")
    )
    print(compiled, narrow)
    assert 0 < compiled <= 2 * narrow


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
