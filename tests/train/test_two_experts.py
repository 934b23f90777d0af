"""A base with two experts: each trains at its own noise levels and resumes exactly; the adapters then work together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from make_run import make_dataset
from recorded import run
from run_command import losses
from test_exact import on_ranks

from ex4d import generate
from ex4d.errors import ConfigError
from ex4d.generate_config import GenerateConfig
from ex4d.models import experts, weights
from ex4d.models.backbone import ModelConfig
from ex4d.train import runlog, validation
from ex4d.train.config import Place, TrainConfig
from ex4d.train.job import build_job
from pipelines import cli

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from wan_checkpoint import TRANSFORMER, save_checkpoint

WITHOUT_CLIP = {"image_dim": None, "added_kv_proj_dim": None}
VALIDATED = {"validate_every": 6, "validate_samples": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset, and a base of two transformers that take the first frame without CLIP, as Wan2.2-I2V-A14B does."""
    from diffusers import WanTransformer3DModel

    path = tmp_path_factory.mktemp("experts")
    make_dataset(path)
    save_checkpoint(path / "base", **WITHOUT_CLIP)
    torch.manual_seed(1)
    second: Any = WanTransformer3DModel(**(TRANSFORMER | WITHOUT_CLIP))
    second.save_pretrained(path / "base" / "transformer_2")
    (path / "base" / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    return path


def chosen(folder: Path, name: str, expert: str | None, kill_at: int | None = None, **train: object) -> dict:
    common = {"data": str(folder / "dataset"), "output": str(folder / name), "lr": 1e-2, "wandb_mode": "disabled"}
    common |= {"num_steps": 6, "save_every": 2, "device": "cpu", "expert": expert, "micro_batch_size": 2}
    model = {"base": str(folder / "base"), "lora_rank": 3, "adapter_hidden": 8}
    return {"kill_at": kill_at, "model": model, "train": common | train}


@pytest.fixture(scope="module")
def trained(folder: Path, alone: Place) -> Path:
    """A folder of two uninterrupted trainings, high and low."""
    for expert in experts.EXPERTS:
        assert run(alone, chosen(folder, f"whole/{expert}", expert, **VALIDATED)) == 0
    return folder / "whole"


def test_two_trainings_are_resumed_exactly(folder: Path, trained: Path, alone: Place) -> None:
    for expert in experts.EXPERTS:
        assert run(alone, chosen(folder, f"parts/{expert}", expert, num_steps=3, save_every=3)) == 0
        assert run(alone, chosen(folder, f"parts/{expert}", expert)) == 0
        assert losses(folder / "parts" / expert) == losses(trained / expert)
        assert same_adapter(folder / "parts" / expert, trained / expert)
    assert losses(trained / "high") != losses(trained / "low")


def same_adapter(one: Path, other: Path) -> bool:
    pair = [weights.read_adapter(output / "adapter") for output in (one, other)]
    (left, first), (right, second) = pair
    return first == second and all(torch.equal(left[name], right[name]) for name in left | right)


@pytest.mark.heavy
@pytest.mark.parametrize("expert", experts.EXPERTS)
def test_a_killed_training_on_two_ranks_goes_on_as_it_was(folder: Path, expert: str) -> None:
    one = {"micro_batch_size": 1, "zero_stage": 2}
    assert on_ranks(folder, [chosen(folder, f"two/{expert}", expert, **one)], 2) == [0, 0]
    assert any(on_ranks(folder, [chosen(folder, f"killed/{expert}", expert, kill_at=4, **one)], 2))
    assert on_ranks(folder, [chosen(folder, f"killed/{expert}", expert, **one)], 2) == [0, 0]
    assert losses(folder / "killed" / expert) == losses(folder / "two" / expert)
    assert same_adapter(folder / "killed" / expert, folder / "two" / expert)


def test_noise_and_validation_lie_within_the_expert_s_range(folder: Path, trained: Path, alone: Place) -> None:
    for expert, ends in {"high": (0.9, 1.0), "low": (0.0, 0.9)}.items():
        config = TrainConfig(**chosen(folder, "none", expert)["train"])
        job = build_job(config, ModelConfig(**chosen(folder, "none", expert)["model"]), alone, torch.device("cpu"))
        batches = job.open_loader("train", 0, 2, 1)
        noises = [validation.NamedNoise(0, step, "clip") for step in range(2)]
        for _ in range(8):
            sigma = job.encoder.encode(next(batches), noises, 5.0, "diffsynth").sigma
            assert ((sigma >= ends[0]) & (sigma <= ends[1])).all()
            assert ((sigma >= 0.9) == (expert == "high")).all()
        batches.close()
    last = [runlog.read(trained / expert / "metrics.jsonl")[-1]["validation_loss"] for expert in experts.EXPERTS]
    assert last[0] != last[1]


def test_validation_videos_use_the_expert_s_own_steps() -> None:
    steps: list[float] = []

    def velocity(latents: torch.Tensor, timestep: torch.Tensor, *_: object) -> torch.Tensor:
        steps.append(float(timestep))
        return torch.zeros_like(latents)

    config, real = TrainConfig(validate_video_steps=8), torch.full((1, 2, 2, 2, 2), 100.0)
    given = (real, None, None)
    whole = validation.sample(velocity, given, config, real)
    both = []
    for ends in ((900.0, float("inf")), (0.0, 900.0)):
        before = len(steps)
        both.append(validation.sample(velocity, given, config, real, ends))
        assert all(ends[0] <= step < ends[1] for step in steps[before:])
    assert steps[:8] == steps[8:], "together, both ranges are the whole way"
    assert torch.equal(whole, both[0])  # from noise alone
    assert float(both[1].mean()) > 5, "the low one starts from the noised clip"


def test_both_adapters_generate_together(trained: Path) -> None:
    found = experts.read(trained)
    assert [metadata.expert for _, metadata in found.values()] == ["high", "low"]
    assert len({metadata.base_fingerprint for _, metadata in found.values()}) == 2
    config = GenerateConfig(num_inference_steps=4, guidance_scale=1.0, vae_tiling=True)
    base, model = generate.load(trained, device="cpu", config=config)
    assert base.vae.use_tiling
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (5, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    visible = (torch.rand(5, 32, 32, generator=generator) > 0.3).numpy()
    made = generate.generate(base, model, frames, visible, config, 0)
    assert made.shape == (5, 32, 32, 3)


def test_a_start_from_the_other_expert_or_without_one_is_refused(
    folder: Path, trained: Path, alone: Place, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    again = chosen(folder, "again", "high", num_steps=2, init_from=str(trained), **(VALIDATED | {"validate_every": 2}))
    assert run(alone, again) == 0
    first = runlog.read(folder / "again" / "metrics.jsonl")[0]["initial_validation_loss"]
    last = runlog.read(trained / "high" / "metrics.jsonl")[-1]["validation_loss"]
    assert first == pytest.approx(last, abs=1e-6)
    with pytest.raises(ConfigError, match=r"train.expert=.*must be low, as in train.init_from"):
        run(alone, chosen(folder, "other", "high", init_from=str(trained / "low" / "adapter")))
    with pytest.raises(ConfigError, match=r"train.expert=.*was started with 'high'"):
        run(alone, chosen(folder, "whole/high", "low"))
    config = tmp_path / "config.yaml"
    for expert, base, message in ((None, folder / "base", "must be high"), ("low", "tiny", "must be null")):
        want = chosen(folder, "refused", expert)
        config.write_text(yaml.safe_dump({"model": want["model"] | {"base": str(base)}, "train": want["train"]}))
        assert cli.main(["train", str(config)]) == 2
        assert message in capsys.readouterr().err
        assert cli.main(["train", str(config), "train.dry_run=true"]) == 2
        assert message in capsys.readouterr().err
