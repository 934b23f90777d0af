"""Adapter files: bit-exact round trips, and errors that say what differs."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ex4d.errors import ConfigError, ContractError
from ex4d.generate_config import GenerateConfig
from ex4d.models import adapter, backbone, encoders, export, formats, lora_dialects, weights

CONFIG = backbone.ModelConfig(lora_rank=4, lora_alpha=4, adapter_hidden=32)


def build(folder: Path, config: backbone.ModelConfig = CONFIG, seed: int = 0) -> adapter.Ex4dModel:
    """A model whose every trainable has a value of its own."""
    base = backbone.load_base(str(folder), components=("transformer",))
    model = adapter.build_model(base.transformer, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def metadata_of(model: adapter.Ex4dModel, config: backbone.ModelConfig = CONFIG) -> weights.AdapterMetadata:
    return weights.AdapterMetadata(
        base="tiny-wan",
        base_revision=None,
        base_fingerprint=encoders.base_fingerprint(model.transformer),
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        adapter_hidden=config.adapter_hidden,
        num_frames=9,
        size=(96, 64),
        dataset_fingerprint="0123456789abcdef",
        step=7,
    )


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_own_format_round_trip_is_bit_identical_and_deterministic(wan_folder: Path, tmp_path: Path) -> None:
    model = build(wan_folder)
    path = weights.save_adapter(tmp_path / "a", model, metadata_of(model))
    again = weights.save_adapter(tmp_path / "b", weights.adapter_state(model), metadata_of(model))
    assert path.read_bytes() == again.read_bytes()
    other = build(wan_folder, seed=5)
    assert weights.load_adapter(tmp_path / "a", other) == metadata_of(model) == weights.read_metadata(path)
    assert equal(weights.adapter_state(other), weights.adapter_state(model))
    num_bytes = sum(value.numel() * 4 for value in model.trainable_parameters().values())
    assert num_bytes < path.stat().st_size < num_bytes + 16_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", formats.FORMATS)
def test_every_format_round_trips_bit_identical(wan_folder: Path, style: str, dtype: torch.dtype) -> None:
    state = {name: value.to(dtype) for name, value in weights.adapter_state(build(wan_folder)).items()}
    there = formats.to_format(state, style, alpha=4.0)
    back, alpha = formats.from_format(there, style)
    kept = state if style == "released" else {k: v for k, v in state.items() if k.startswith("transformer.")}
    assert equal(back, kept)
    assert alpha == (4.0 if style == "kohya" else None)
    assert len(there) == {"released": 48, "kohya": 60}.get(style, 40)


def test_lora_on_fewer_layers_is_written_read_and_exported(wan_folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lora_targets=("to_q", "ffn.net.2"))
    model = build(wan_folder, config)
    metadata = dataclasses.replace(metadata_of(model), lora_targets=config.lora_targets)
    weights.save_adapter(tmp_path / "few", model, metadata)
    assert weights.read_metadata(tmp_path / "few").lora_targets == config.lora_targets
    state = weights.adapter_state(model)
    loras = {name: value for name, value in state.items() if ".lora_" in name}
    assert len(loras) == 2 * 3 * 2, "q of two attentions and a feed-forward layer, in two blocks"
    for style in ("diffusers", "comfyui", "kohya"):
        path = export.export(tmp_path / "few", style, tmp_path / f"{style}.safetensors")[0]
        assert equal(lora_dialects.read(load_file(path))[0], loras)
    with pytest.raises(ConfigError, match="needs a LoRA on every layer"):
        export.export(tmp_path / "few", "released", tmp_path / "few.ckpt")
    other = build(wan_folder, config, seed=5)
    weights.load_adapter(tmp_path / "few", other)
    assert equal(weights.adapter_state(other), state)
    for said in (("to_k",), ("to_q", "ffn.net.2", "proj_out"), ()):
        weights.save_adapter(tmp_path / "odd", model, dataclasses.replace(metadata, lora_targets=said))
        with pytest.raises(ContractError, match="its header says LoRA on"):
            weights.read_metadata(tmp_path / "odd")
    weights.save_adapter(tmp_path / "all", build(wan_folder), metadata_of(model))
    assert b"lora_targets" not in (tmp_path / "all" / weights.FILE_NAME).read_bytes()


def test_released_file_in_and_out(wan_folder: Path, tmp_path: Path) -> None:
    model = build(wan_folder)
    weights.write_released(tmp_path / "ex4d.ckpt", weights.adapter_state(model))
    names = set(torch.load(tmp_path / "ex4d.ckpt", weights_only=True))
    assert {"blocks.1.cross_attn.o.lora_B.default.weight", "blocks.0.ffn.2.lora_A.default.weight"} <= names
    assert {"latent_encoder.4.bias", "latent_patch_embedding.weight"} <= names
    other = build(wan_folder, seed=5)
    metadata = weights.load_adapter(tmp_path / "ex4d.ckpt", other)
    assert (metadata.mask_range, metadata.lora_alpha, metadata.adapter_hidden) == ("released", 4.0, 32)
    sampler = GenerateConfig().for_adapter(metadata)
    assert (sampler.prompt, sampler.negative_prompt) == (weights.RELEASED_PROMPT, weights.RELEASED_NEGATIVE_PROMPT)
    assert equal(weights.adapter_state(other), weights.adapter_state(model))
    assert equal(weights.read_adapter(tmp_path / "ex4d.ckpt")[0], weights.adapter_state(model))


def test_released_14b_file_is_808_tensors() -> None:
    meta = backbone.meta_transformer(backbone.transformer_config(weights.RELEASED_BASE))
    model = adapter.build_model(meta, backbone.ModelConfig())
    tensors = {name: value.detach() for name, value in model.trainable_parameters().items()}
    released = formats.to_format(tensors, "released")
    assert len(released) == 808
    assert sum("lora_" in name for name in released) == 800
    assert released["blocks.39.ffn.0.lora_B.default.weight"].shape == (13824, 16)
    assert released["latent_patch_embedding.weight"].shape == (5120, 1024, 1, 2, 2)


def test_diffusers_itself_reads_our_lora(wan_folder: Path) -> None:
    """diffusers' own loader, on our diffusers names and through its converter on our ComfyUI names."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    model = build(wan_folder)
    model.geometry_adapter.requires_grad_(False)
    state = weights.adapter_state(model)
    ours = formats.to_format(state, "diffusers")
    converted = _convert_non_diffusers_wan_lora_to_diffusers(formats.to_format(state, "comfyui"))
    assert equal({name: converted[name] for name in ours}, ours)
    assert not any(value.any() for name, value in converted.items() if name not in ours)
    plain: Any = backbone.load_base(str(wan_folder), components=("transformer",)).transformer
    plain.load_lora_adapter(dict(ours), prefix="transformer")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 36, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([400.0]),
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=generator),
        "encoder_hidden_states_image": torch.randn(1, 17, 16, generator=generator),
        "return_dict": False,
    }
    with torch.no_grad():
        assert torch.allclose(plain(**inputs)[0], model.transformer(**inputs)[0], atol=1e-5)


def test_kohya_names_are_kohyas(wan_folder: Path) -> None:
    there = formats.to_format(weights.adapter_state(build(wan_folder)), "kohya", alpha=4.0)
    assert float(there["lora_unet_blocks_1_self_attn_o.alpha"]) == 4.0
    assert there["lora_unet_blocks_0_ffn_0.lora_down.weight"].shape == (4, 24)
    assert there["lora_unet_blocks_0_ffn_0.lora_up.weight"].shape == (48, 4)
    there["lora_unet_blocks_1_self_attn_o.alpha"] = torch.tensor(2.0)
    with pytest.raises(ContractError, match="alpha differs"):
        formats.from_format(there, "kohya")


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_lora_files_of_other_programs_in_and_out(wan_folder: Path, tmp_path: Path, style: str, alpha: float) -> None:
    state = weights.adapter_state(build(wan_folder))
    weights.write_lora(tmp_path / "lora.safetensors", state, style, alpha)
    back, read_alpha = weights.read_lora(tmp_path / "lora.safetensors")
    lora = {name: value for name, value in state.items() if name.startswith("transformer.")}
    # Compare the product B A alpha / rank; rank is 4.
    name = "transformer.blocks.1.attn2.to_k.lora_{}.weight"
    product = back[name.format("B")] @ back[name.format("A")] * read_alpha / 4
    assert torch.allclose(product, lora[name.format("B")] @ lora[name.format("A")] * alpha / 4)
    assert set(back) == set(lora)
    if alpha == 4 or style == "kohya":
        assert equal(back, lora)
    with pytest.raises(ContractError, match="such as"):
        lora_dialects.read({"blocks.0.attn.weight": torch.ones(2, 2)})


def test_a_missing_tensor_is_named(wan_folder: Path, tmp_path: Path) -> None:
    released = formats.to_format(weights.adapter_state(build(wan_folder)), "released")
    del released["blocks.1.ffn.2.lora_B.default.weight"]
    torch.save(released, tmp_path / "ex4d.ckpt")
    with pytest.raises(ContractError, match=r"47 tensors where 48 belong; 1 missing \['blocks.1.ffn.2.lora_B"):
        weights.read_adapter(tmp_path / "ex4d.ckpt")[0]
    torch.save({}, tmp_path / "empty.ckpt")
    with pytest.raises(ContractError, match="0 tensors"):
        weights.read_metadata(tmp_path / "empty.ckpt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora_rank": 8, "lora_alpha": 4}, "rank 4 and alpha 4, the model has rank 8"),
        ({"lora_alpha": 8}, "the model has rank 4 and alpha 8"),
        ({"adapter_hidden": 16}, "shapes differ, the first is geometry_adapter.latent_encoder.0.weight"),
    ],
)
def test_another_model_is_refused(wan_folder: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    model = build(wan_folder)
    weights.save_adapter(tmp_path, model, metadata_of(model))
    other = build(wan_folder, dataclasses.replace(CONFIG, **change), seed=5)
    before = weights.adapter_state(other)
    with pytest.raises(ContractError, match=says):
        weights.load_adapter(tmp_path, other)
    assert equal(weights.adapter_state(other), before)


def test_another_base_is_refused_unless_allowed(wan_folder: Path, tmp_path: Path) -> None:
    model = build(wan_folder)
    weights.save_adapter(tmp_path, model, metadata_of(model))
    other = build(wan_folder, seed=5)
    with torch.no_grad():
        other.transformer.patch_embedding.weight[0, 0] += 1
    with pytest.raises(ContractError, match="trained on tiny-wan"):
        weights.load_adapter(tmp_path, other)
    assert weights.load_adapter(tmp_path, other, allow_other_base=True).step == 7
    # The fingerprint is of the base, not of its dtype.
    half = backbone.load_base(str(wan_folder), dtype="bfloat16", components=("transformer",)).transformer
    assert encoders.base_fingerprint(half) == encoders.base_fingerprint(model.transformer)


class _Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("ran",)


def test_what_is_no_adapter_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    model = build(wan_folder)
    with pytest.raises(ConfigError, match="neither a folder"):
        weights.read_adapter(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"nothing like it")
    with pytest.raises(ContractError, match="not a safetensors"):
        weights.read_metadata(tmp_path)
    save_file(weights.adapter_state(model), tmp_path / "adapter.safetensors")
    with pytest.raises(ContractError, match="LoRA of another program"):
        weights.load_adapter(tmp_path, model)
    torch.save({"weight": _Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(ContractError, match="plain tensors"):
        weights.read_adapter(tmp_path / "evil.ckpt")[0]
    assert not Path("ran").exists()


def test_a_truncated_file_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    model = build(wan_folder)
    path = weights.save_adapter(tmp_path, model, metadata_of(model))
    assert len(load_file(path)) == 48
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ContractError, match="not a safetensors"):
        weights.load_adapter(tmp_path, model)


@pytest.mark.parametrize(
    "change",
    [
        *({"lora_rank": 10**9}, {"lora_rank": None}, {"adapter_hidden": 10**7}, {"lora_alpha": float("nan")}),
        *({"base": 5}, {"size": 5}, {"size": "ab"}, {"num_frames": -3}, {"mask_range": "banana"}),
    ],
    ids=str,
)
def test_a_header_that_cannot_be_true_is_refused_before_a_model_is_built(wan_folder, tmp_path, change) -> None:
    model = build(wan_folder)
    path = weights.save_adapter(tmp_path, model, dataclasses.replace(metadata_of(model), **change))
    with pytest.raises(ContractError, match="its header says"):
        weights.read_metadata(path)


def test_an_adapter_that_is_not_finite_is_refused(wan_folder, tmp_path) -> None:
    model = build(wan_folder)
    state = weights.adapter_state(model)
    name = next(iter(state))
    weights.save_adapter(tmp_path, state | {name: torch.full_like(state[name], float("nan"))}, metadata_of(model))
    with pytest.raises(ContractError, match="not finite"):
        weights.load_adapter(tmp_path, model)


@pytest.mark.parametrize(
    "content",
    [
        *(b"hello", b"\x80\x02h\x09.", b""),
        *({1: torch.zeros(1)}, {"blocks.999999999.self_attn.q.lora_A.default.weight": torch.zeros(1, 1)}),
        {"blocks.0.self_attn.q.lora_A.default.weight": torch.tensor(1.0)},
    ],
    ids=["text", "memo", "empty", "number", "block", "scalar"],
)
def test_a_released_file_that_is_none_is_refused_in_one_line(tmp_path, content) -> None:
    path = tmp_path / "some.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ContractError, match="some") as refused:
        weights.read_metadata(path)
    assert "\n" not in str(refused.value)
