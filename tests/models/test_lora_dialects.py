"""LoRA of other programs: every dialect gives the same layers, and other kinds of adapters are rejected by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_export import METADATA, export, save

from ex4d.errors import ContractError
from ex4d.models import lora_dialects, weights
from ex4d.models.formats import ORIGINAL

WIDTHS = {"ffn.net.0.proj": (6, 8), "ffn.net.2": (8, 6)}


def layers(rank: int = 2) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    found = {}
    for block in range(2):
        for module in ORIGINAL:
            wide, out = WIDTHS.get(module, (6, 6))
            found[block, module] = (
                torch.randn(rank, wide, generator=draw),
                torch.randn(out, rank, generator=draw),
            )
    return found


def canonical(rank: int = 2) -> dict[str, torch.Tensor]:
    state = {}
    for (block, module), (down, up) in layers(rank).items():
        state[f"transformer.blocks.{block}.{module}.lora_A.weight"] = down
        state[f"transformer.blocks.{block}.{module}.lora_B.weight"] = up
    return state


# name -> (head, own names of Wan, flat, the two halves, with alpha)
DIALECTS = {
    "diffusers": ("transformer.", False, False, "lora_A.weight lora_B.weight", False),
    "diffusers without prefix": ("", False, False, "lora_A.weight lora_B.weight", False),
    "peft": ("base_model.model.", False, False, "lora_A.default.weight lora_B.default.weight", False),
    "peft, own adapter name": ("base_model.model.", True, False, "lora_A.mine.weight lora_B.mine.weight", False),
    "peft around a transformer": ("base_model.model.transformer.", False, False, "lora_A.weight lora_B.weight", False),
    "comfy": ("diffusion_model.", True, False, "lora_A.weight lora_B.weight", False),
    "comfy with alpha": ("diffusion_model.", True, False, "lora_A.weight lora_B.weight", True),
    "comfy, down and up": ("diffusion_model.", True, False, "lora_down.weight lora_up.weight", True),
    "a checkpoint's prefix": ("model.diffusion_model.", True, False, "lora_down.weight lora_up.weight", True),
    "diffsynth": ("", True, False, "lora_A.default.weight lora_B.default.weight", False),
    "diffsynth's pipe": ("pipe.dit.", True, False, "lora_A.default.weight lora_B.default.weight", False),
    "kohya": ("lora_unet_", True, True, "lora_down.weight lora_up.weight", True),
    "musubi": ("lora_unet__", True, True, "lora_down.weight lora_up.weight", True),
    "kohya of diffusers": ("lora_transformer_", False, True, "lora_down.weight lora_up.weight", True),
}


def dialect(name: str, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    head, is_own, is_flat, halves, has_alpha = DIALECTS[name]
    state = {}
    for (block, module), pair in layers().items():
        layer = f"blocks.{block}.{ORIGINAL[module] if is_own else module}"
        layer = head + (layer.replace(".", "_") if is_flat else layer)
        state |= dict(zip((f"{layer}.{half}" for half in halves.split()), pair, strict=True))
        if has_alpha:
            state[f"{layer}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_gives_the_same_layers_bit_for_bit(name):
    state, alpha = lora_dialects.read(dialect(name))
    assert alpha == (1.0 if DIALECTS[name][4] else 2.0)
    true = canonical()
    assert state.keys() == true.keys()
    assert all(torch.equal(state[key], true[key]) for key in true)


def product(state: dict[str, torch.Tensor], alpha: float, layer: str) -> torch.Tensor:
    down, up = (state[f"transformer.blocks.{layer}.lora_{half}.weight"].float() for half in "AB")
    return up @ down * (alpha / len(down))


def test_ranks_and_alphas_of_each_layer_become_one(caplog):
    tensors = dialect("comfy with alpha")
    tensors["diffusion_model.blocks.0.ffn.0.lora_A.weight"] = layers(5)[0, "ffn.net.0.proj"][0]
    tensors["diffusion_model.blocks.0.ffn.0.lora_B.weight"] = layers(5)[0, "ffn.net.0.proj"][1]
    tensors["diffusion_model.blocks.1.ffn.2.alpha"] = torch.tensor(8.0)
    state, alpha = lora_dialects.read(tensors)
    assert alpha == 5.0
    assert {value.shape[0] for key, value in state.items() if "lora_A" in key} == {5}
    (down, up), plain = layers(5)[0, "ffn.net.0.proj"], canonical()
    torch.testing.assert_close(product(state, 5.0, "0.ffn.net.0.proj"), up @ down * (1 / 5))
    torch.testing.assert_close(product(state, 5.0, "1.ffn.net.2"), product(plain, 8.0, "1.ffn.net.2"))
    torch.testing.assert_close(product(state, 5.0, "1.attn1.to_q"), product(plain, 1.0, "1.attn1.to_q"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16])
def test_small_numbers_are_read_exactly(dtype):
    tensors = {name: value.to(dtype) if value.ndim else value for name, value in dialect("kohya").items()}
    state, _ = lora_dialects.read(tensors)
    name = "transformer.blocks.1.attn2.to_k.lora_B.weight"
    assert torch.equal(state[name].float(), canonical()[name].to(dtype).float())
    assert torch.isfinite(state[name]).all()


def test_image_keys_and_text_encoders_are_left_out_and_said(caplog):
    more = {
        "lora_unet_blocks_0_cross_attn_k_img.lora_down.weight": torch.ones(2, 6),
        "lora_unet_blocks_0_cross_attn_k_img.lora_up.weight": torch.ones(6, 2),
        "lora_unet_blocks_0_cross_attn_k_img.alpha": torch.tensor(1.0),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 6),
    }
    state, _ = lora_dialects.read(dialect("kohya") | more)
    assert state.keys() == canonical().keys()
    assert "left out 4 tensors that the adapter cannot hold" in caplog.text


def changed(**more: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {**dialect("kohya"), **more}
    return {name: value for name, value in tensors.items() if value is not None}


Q = "lora_unet_blocks_0_self_attn_q"
REFUSED = {
    "DoRA": changed(**{f"{Q}.dora_scale": torch.ones(6)}),
    "DoRA of peft": changed(**{f"{Q}.lora_magnitude_vector": torch.ones(6)}),
    "LoKr": {"lycoris_blocks_0_self_attn_k.lokr_w1": torch.ones(4, 4)},
    "LoHa": {f"{Q}.hada_w1_a": torch.ones(4, 4)},
    "whole differences": changed(**{"lora_unet_blocks_0_norm3.diff_b": torch.ones(6)}),
    "not a LoRA of Wan": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_down.weight": torch.ones(2, 6),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k.lora_up.weight": torch.ones(6, 2),
    },
    "not a LoRA of Wan, nothing": {},
    "no B": changed(**{f"{Q}.lora_up.weight": None}),
    "no A": changed(**{f"{Q}.lora_down.weight": None}),
    "do not fit": changed(**{f"{Q}.lora_up.weight": torch.ones(6, 1)}),
    "do not fit, flat": changed(**{f"{Q}.lora_up.weight": torch.ones(12)}),
    "not finite": changed(**{f"{Q}.lora_up.weight": torch.full((6, 2), float("nan"))}),
    "not finite, endless": changed(**{f"{Q}.lora_down.weight": torch.full((2, 6), float("inf"))}),
    "not finite, whole numbers": changed(**{f"{Q}.lora_down.weight": torch.ones(2, 6, dtype=torch.int32)}),
    "alpha": changed(**{f"{Q}.alpha": torch.tensor(float("nan"))}),
    "alpha of several": changed(**{f"{Q}.alpha": torch.ones(3)}),
    "not a LoRA of Wan, head": changed(**{"lora_unet_head.lora_down.weight": torch.ones(2, 6)}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_name(name):
    with pytest.raises(
        ContractError, match=name.partition(",")[0].partition(" of ")[0] if "Wan" not in name else "Wan"
    ):
        lora_dialects.read(REFUSED[name])


def test_what_export_writes_can_be_loaded(tmp_path: Path):
    adapter = save(tmp_path / "trained", 4.0)
    whole = {name: value for name, value in weights.read_adapter(adapter)[0].items() if ".lora_" in name}
    attention = {
        name.replace("transformer.", "base_model.model."): value for name, value in whole.items() if ".ffn." not in name
    }
    wide = {name: torch.nn.functional.pad(v, (0, 0, 0, 2) if "lora_A" in name else (0, 2)) for name, v in whole.items()}
    mixed = {name: wide[name] if ".attn1." in name else value for name, value in whole.items()}
    for number, tensors in enumerate((attention, wide, mixed)):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        arguments = (
            "--from",
            tmp_path / f"{number}.safetensors",
            "--style",
            "ex4d",
            "--output",
            tmp_path / f"o{number}",
        )
        assert export(adapter, *arguments) == 0
        state, metadata = weights.read_adapter(tmp_path / f"o{number}")
        assert {value.shape[0] for name, value in state.items() if "lora_A" in name} == {metadata.lora_rank}
        assert state.keys() == weights.read_adapter(adapter)[0].keys()
        own = state["transformer.blocks.0.ffn.net.2.lora_B.weight"]
        assert (own == 0).all() == (number == 0)


def test_a_lora_in_place_of_an_adapter_is_called_what_it_is(tmp_path: Path, capsys):
    save_file(dialect("kohya"), tmp_path / "lora.safetensors")
    assert export(tmp_path / "lora.safetensors", "--style", "kohya", "--output", tmp_path / "x") == 1
    told = capsys.readouterr().err
    assert "is a LoRA of another program" in told
    assert "damaged" not in told
    save_file({"a.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (tmp_path / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    adapter = save(tmp_path / "trained", METADATA.lora_alpha)
    for name, told in (("page", "web page"), ("pointer", "LFS pointer"), ("empty", "empty")):
        with pytest.raises(ContractError, match=told):
            weights.read_adapter(tmp_path / f"{name}.safetensors")
        with pytest.raises(ContractError, match=told):
            weights.read_lora(tmp_path / f"{name}.safetensors")
    with pytest.raises(ContractError, match="holds no adapter"):
        weights.read_adapter(tmp_path / "other.safetensors")
    assert weights.read_adapter(adapter)
