"""Starting from an adapter's weights, and the related settings of batch, learning rates and LoRA."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import tiny
import torch
from recorded import run
from test_exact import chosen, losses

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone, weights
from ex4d.train import checkpoint, runlog
from ex4d.train.config import BatchPlan, TrainConfig, plan_batch
from ex4d.train.deepspeed_config import deepspeed_config
from ex4d.train.identity import check_identity, identity
from ex4d.train.report import SpikeWatch
from ex4d.train.trainer import learning_rate

VALIDATED = {"validate_every": 2, "validate_samples": 2}


@pytest.fixture(scope="module")
def source(folder: Path, alone) -> Path:
    """A finished run of two steps."""
    assert run(alone, chosen(folder, "source", num_steps=2, **VALIDATED)) == 0
    return folder / "source"


def test_the_loss_goes_on_where_the_source_run_ended(folder: Path, source: Path, alone) -> None:
    last = runlog.read(source / "metrics.jsonl")[-1]["validation_loss"]
    again = chosen(folder, "again", num_steps=2, init_from=str(source / "adapter"), **VALIDATED)
    assert run(alone, again) == 0
    lines = runlog.read(folder / "again" / "metrics.jsonl")
    assert lines[0]["initial_validation_loss"] == pytest.approx(last, abs=1e-5)  # the order of sums may differ
    assert lines[-1]["validation_loss"] != pytest.approx(last, abs=1e-5)
    assert "initial_validation_loss" not in lines[1]
    # A resumed run reads its checkpoint: the source may be gone.
    (folder / "moved").mkdir()
    (source / "adapter").rename(folder / "moved" / "adapter")
    again["train"]["num_steps"] = 3
    assert run(alone, again) == 0
    (folder / "moved" / "adapter").rename(source / "adapter")
    again["train"]["output"] = str(folder / "other")
    again["train"]["init_from"] = str(folder / "nothing")
    with pytest.raises(ConfigError, match="is neither a folder"):
        run(alone, again)


def test_weights_of_a_released_file_come_in_bit_for_bit(folder: Path, alone, tmp_path: Path) -> None:
    model = adapter.build_model(
        backbone.load_base(str(folder / "base"), components=("transformer",)).transformer,
        backbone.ModelConfig(lora_rank=3, lora_alpha=3.0, adapter_hidden=8),
    )
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(value.shape, generator=generator) for name, value in weights.adapter_state(model).items()
    }
    weights.write_released(tmp_path / "ex4d.ckpt", state)
    want = chosen(folder, "released", num_steps=1, init_from=str(tmp_path / "ex4d.ckpt"), lr=1e-30, weight_decay=0.0)
    want["model"] |= {"lora_alpha": 3.0, "mask_range": "released"}
    assert run(alone, want) == 0
    found, _ = weights.read_adapter(folder / "released" / "adapter")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"lora_rank": 4}, r"model.lora_rank=4: must be 3, as in train.init_from="),
        ({"lora_targets": ["to_q"]}, r"model.lora_targets=.*must be \['ffn.net.0.proj', .*as in train.init_from="),
        ({"lora_rslora": True}, r"model.lora_alpha="),
        ({"adapter_hidden": 16}, r"model.adapter_hidden=16: must be 8"),
        ({"mask_range": "released"}, r"model.mask_range='?released'?: must be 'unit'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(folder, source, alone, model: dict, message: str) -> None:
    want = chosen(folder, "refused", num_steps=1, init_from=str(source / "adapter"))
    want["model"] |= model
    with pytest.raises(ConfigError, match=message):
        run(alone, want)


def test_an_adapter_of_another_base_is_refused(folder: Path, source: Path, alone, tmp_path: Path) -> None:
    state, metadata = weights.read_adapter(source / "adapter")
    weights.save_adapter(tmp_path, state, dataclasses.replace(metadata, base_fingerprint="0" * 16))
    with pytest.raises(ConfigError, match="was trained on the base 0000000000000000"):
        run(alone, chosen(folder, "other-base", num_steps=1, init_from=str(tmp_path)))


def test_an_adapter_that_says_nothing_of_its_base_is_refused(folder: Path, source: Path, alone, tmp_path: Path) -> None:
    state, metadata = weights.read_adapter(source / "adapter")
    weights.save_adapter(tmp_path, state, dataclasses.replace(metadata, base_fingerprint=None))
    with pytest.raises(ConfigError, match="does not say which base weights"):
        run(alone, chosen(folder, "no-base", num_steps=1, init_from=str(tmp_path)))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_learning_rates_train_and_resume_exactly(folder: Path, alone, stage: int) -> None:
    rates = {"lr": 1e-2, "lr_geometry": 1e-30, "weight_decay": 0.0, "zero_stage": stage}
    whole = chosen(folder, f"whole-{stage}", num_steps=3, **rates)
    assert run(alone, whole) == 0
    broken = chosen(folder, f"broken-{stage}", num_steps=2, **rates)
    assert run(alone, broken) == 0
    broken["train"]["num_steps"] = 3
    assert run(alone, broken) == 0
    assert losses(folder, f"whole-{stage}") == losses(folder, f"broken-{stage}")
    trained, _ = weights.read_adapter(folder / f"whole-{stage}" / "adapter")
    head = trained["geometry_adapter.latent_patch_embedding.weight"]
    assert float(head.abs().max()) < 1e-20, "the geometry hardly moved from zero"
    assert float(trained["transformer.blocks.0.attn1.to_q.lora_B.weight"].abs().max()) > 1e-3


def test_dropout_is_the_same_after_a_resume(folder: Path, alone) -> None:
    for name, stops in {"whole": (3,), "broken": (1, 3)}.items():
        for last in stops:
            want = chosen(folder, f"dropout-{name}", num_steps=last, activation_checkpointing=True)
            want["model"]["lora_dropout"] = 0.5
            assert run(alone, want) == 0
    assert losses(folder, "dropout-whole") == losses(folder, "dropout-broken")
    assert run(alone, chosen(folder, "dropout-none", num_steps=3)) == 0
    assert losses(folder, "dropout-whole")[1:] != losses(folder, "dropout-none")[1:]


def test_rank_stabilised_scale_is_written_as_alpha(tmp_path: Path) -> None:
    from ex4d.models import lora

    config = backbone.ModelConfig(lora_rank=4, lora_alpha=3.0, adapter_hidden=8, lora_rslora=True)
    model = adapter.build_model(tiny.new_transformer(8, num_layers=1), config)
    assert lora.settings(model.transformer) == (4, 6.0)
    assert model.transformer.blocks[0].attn1.to_q.scaling["default"] == 1.5


def test_global_batch_size_gives_the_accumulation() -> None:
    config = TrainConfig(micro_batch_size=2, global_batch_size=8)
    assert plan_batch(config, 1) == BatchPlan(8, 2, 4, 1)
    assert plan_batch(config, 4) == BatchPlan(8, 2, 1, 4)
    assert plan_batch(config, 8, 8) == BatchPlan(8, 1, 1, 8), "a run that goes on keeps its batch"
    with pytest.raises(ConfigError, match=r"global_batch_size=8: must be a multiple of .* 2 × 3"):
        plan_batch(config, 3)
    with pytest.raises(ConfigError, match=r"global_batch_size=8: must be 16"):
        plan_batch(config, 2, 16)
    with pytest.raises(ConfigError, match="grad_accum_steps=2: must be left out"):
        TrainConfig(grad_accum_steps=2, global_batch_size=8)


def test_linear_decay_ends_at_a_tenth() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=4, num_steps=14, lr_decay="linear")
    assert [learning_rate(config, step) for step in (2, 4, 9, 14)] == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_keys_of_deepspeed_pass_through_unless_the_engine_owns_them() -> None:
    plan = BatchPlan(1, 1, 1, 1)
    more = {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": False}}
    made = deepspeed_config(TrainConfig(deepspeed=more), plan)
    assert made["wall_clock_breakdown"] is True
    assert made["zero_optimization"]["overlap_comm"] is False
    assert made["zero_optimization"]["stage"] == 2
    for key in ({"bf16": {"enabled": True}}, {"train_batch_size": 4}, {"zero_optimization": {"stage": 3}}):
        with pytest.raises(ConfigError, match=r"train.deepspeed\.\S+: must be left out|train.deepspeed"):
            deepspeed_config(TrainConfig(deepspeed=key), plan)


def test_a_run_from_before_a_setting_existed_resumes(folder: Path, alone) -> None:
    want = chosen(folder, "old", num_steps=1)
    assert run(alone, want) == 0
    path = checkpoint.latest(folder / "old") / "state.json"
    state = json.loads(path.read_text())
    newer = ("train.init_from", "train.lr_geometry", "model.lora_dropout", "model.lora_rslora")
    for key in newer:
        del state["identity"][key]
    path.write_text(json.dumps(state))
    want["train"]["num_steps"] = 2
    assert run(alone, want) == 0
    now = identity(TrainConfig(lr_geometry=1.0), backbone.ModelConfig(), "x")
    old = identity(TrainConfig(), backbone.ModelConfig(), "x")
    del old["train.lr_geometry"]
    with pytest.raises(ConfigError, match=r"train.lr_geometry=1.0: out was started with None"):
        check_identity(old, now, "out")


def test_clips_of_a_gradient_spike_are_named(caplog: pytest.LogCaptureFixture) -> None:
    spikes = SpikeWatch()
    with caplog.at_level(logging.WARNING):
        for step in range(1, 21):
            spikes.check(step, 100.0 if step == 3 else 1.0, ["a"])
        assert not caplog.messages, "too few steps to know what is usual"
        spikes.check(21, 6.0, ["clip-7"])
    assert len(caplog.messages) == 1
    assert "step 21" in caplog.text
    assert "clip-7" in caplog.text
