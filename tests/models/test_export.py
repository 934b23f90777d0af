"""`ex4d export`: to other programs' files and back without changing a bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ex4d.models import adapter, backbone, weights
from pipelines import cli

METADATA = weights.AdapterMetadata("tiny", None, None, lora_rank=4, lora_alpha=4.0, adapter_hidden=16, shift=3.0)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """An adapter none of whose tensors is zero."""
    return save(tmp_path / "trained", 4.0)


def save(folder: Path, alpha: float) -> Path:
    transformer = tiny.new_transformer(8, num_layers=2, num_attention_heads=2, ffn_dim=48)
    model = adapter.build_model(transformer, backbone.ModelConfig(lora_rank=4, lora_alpha=alpha, adapter_hidden=16))
    generator = torch.Generator().manual_seed(4)
    state = {n: torch.randn(v.shape, generator=generator) for n, v in weights.adapter_state(model).items()}
    weights.save_adapter(folder, state, replace(METADATA, lora_alpha=alpha))
    return folder


def export(*arguments: object) -> int:
    return cli.main(["export", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("style", ["kohya", "comfyui", "diffusers"])
def test_a_lora_goes_out_and_comes_back_bit_equal(style: str, trained: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", 4.0)
    zeroed = {n: v if "geometry" in n else v * 0 for n, v in weights.read_adapter(other)[0].items()}
    weights.save_adapter(other, zeroed, METADATA)
    assert export(trained, "--style", style, "--output", tmp_path / "lora.safetensors") == 0
    names = list(load_file(tmp_path / "lora.safetensors"))
    assert len(names) == 2 * 20 + (20 if style == "kohya" else 0)
    assert not [name for name in names if "latent" in name or "geometry" in name]
    arguments = ("--from", tmp_path / "lora.safetensors", "--style", "ex4d", "--output", tmp_path / "back")
    assert export(other, *arguments) == 0
    assert (tmp_path / "back" / weights.FILE_NAME).read_bytes() == (trained / weights.FILE_NAME).read_bytes()


def test_the_released_form_holds_everything_and_comes_back_bit_equal(trained: Path, tmp_path: Path) -> None:
    assert export(trained, "--style", "released", "--output", tmp_path / "ex4d.ckpt") == 0
    assert len(torch.load(tmp_path / "ex4d.ckpt", weights_only=True)) == 2 * 20 + 8
    assert export(tmp_path / "ex4d.ckpt", "--style", "ex4d", "--output", tmp_path / "back") == 0
    (ours, _), (back, metadata) = weights.read_adapter(trained), weights.read_adapter(tmp_path / "back")
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    assert len(back) == len(ours)
    assert metadata.mask_range == "released"  # what the .ckpt cannot store defaults to the release's values


def test_alpha_is_kept_or_folded_in(tmp_path: Path) -> None:
    trained = save(tmp_path / "trained", 2.0)
    state = weights.read_adapter(trained)[0]
    name = "transformer.blocks.0.attn1.to_q.lora_B.weight"
    for style, factor, alpha in (("kohya", 1.0, 2.0), ("comfyui", 0.5, 4.0), ("ex4d", 1.0, 2.0)):
        target = tmp_path / style
        assert export(trained, "--style", style, "--output", target) == 0
        back, read = weights.read_lora(target) if style != "ex4d" else (weights.read_adapter(target)[0], 2.0)
        assert read == alpha
        assert torch.equal(back[name], state[name] * factor)
    assert export(trained, "--style", "released", "--output", tmp_path / "x.ckpt") == 0
    assert torch.equal(weights.read_adapter(tmp_path / "x.ckpt")[0][name], state[name] * 0.5)


def test_what_cannot_be_exported_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert export(trained, "--style", "ex4d", "--output", trained) == 2
    assert export(tmp_path / "none", "--style", "kohya", "--output", tmp_path / "x") == 2
    assert export(trained, "--from", tmp_path / "none", "--style", "ex4d", "--output", tmp_path / "x") == 2
    export(trained, "--style", "kohya", "--output", tmp_path / "lora.safetensors")
    half = {n: v[:, :8] if "lora_down" in n else v for n, v in load_file(tmp_path / "lora.safetensors").items()}
    save_file({name: value.contiguous() for name, value in half.items()}, tmp_path / "half.safetensors")
    assert export(trained, "--from", tmp_path / "half.safetensors", "--style", "ex4d", "--output", tmp_path / "x") == 1
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
