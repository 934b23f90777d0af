"""The module of base, LoRA and geometry adapter: neutral at first, sizes, and the same under checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone

CONFIG = backbone.ModelConfig(lora_rank=4, lora_alpha=8, adapter_hidden=32)


def make_inputs(channels: int = 16, first: int | None = 20, batch: int = 2) -> dict[str, Tensor | None]:
    """Random inputs of an 8 × 12 latent of 3 frames."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "noisy_latents": draw(batch, channels, 3, 8, 12),
        "timestep": torch.tensor([900.0, 250.0])[:batch],
        "prompt_embeds": draw(batch, 512, 32),
        "image_embeds": draw(batch, 17, 16),
        "first_frame": None if first is None else draw(batch, first, 3, 8, 12),
        "cond_latents": draw(batch, 2 * channels, 3, 8, 12),
    }


def load_transformer(folder: Path, dtype: str = "float32") -> Any:
    return backbone.load_base(str(folder), dtype=dtype, components=("transformer",)).transformer


@torch.no_grad()
def disturb(model: adapter.Ex4dModel, seed: int = 0) -> None:
    """Give every trainable parameter a value, so that zero-initialised ones have an effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.trainable_parameters().values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def base_output(transformer: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return transformer(
            hidden_states=torch.cat([inputs["noisy_latents"], inputs["first_frame"]], 1),
            timestep=inputs["timestep"],
            encoder_hidden_states=inputs["prompt_embeds"],
            encoder_hidden_states_image=inputs["image_embeds"],
            return_dict=False,
        )[0]


def test_untrained_adapter_leaves_the_base_bit_equal(wan_folder: Path) -> None:
    transformer, inputs = load_transformer(wan_folder), make_inputs()
    before = base_output(transformer, inputs)
    model = adapter.build_model(transformer, CONFIG)
    with torch.no_grad():
        assert torch.equal(model(**inputs), before)
        disturb(model)
        assert not torch.allclose(model(**inputs), before, atol=1e-3)


def test_geometry_enters_only_where_it_is_given(wan_folder: Path) -> None:
    model, inputs = adapter.build_model(load_transformer(wan_folder), CONFIG), make_inputs()
    with torch.no_grad():
        model.geometry_adapter.latent_patch_embedding.weight.normal_(std=0.05)
        without = model(**(inputs | {"cond_latents": None}))
        assert torch.equal(without, base_output(model.transformer, inputs))
        assert not torch.equal(model(**inputs), without)
        # The residual of one call must not leak into the next.
        assert torch.equal(model(**(inputs | {"cond_latents": None})), without)


def test_residual_is_what_the_slow_sum_says(wan_folder: Path) -> None:
    """The slow twin: the 1×1×1 convolutions and the patch embedding as matrix products over positions."""
    module = adapter.build_model(load_transformer(wan_folder), CONFIG).geometry_adapter
    cond = make_inputs()["cond_latents"]
    with torch.no_grad():
        module.latent_patch_embedding.weight.normal_(std=0.05)
        hidden = cond.movedim(1, -1)
        for index in (0, 2, 4):
            layer = module.latent_encoder[index]
            hidden = hidden @ layer.weight[:, :, 0, 0, 0].T + layer.bias
            hidden = hidden if index == 4 else hidden * torch.sigmoid(hidden)
        cells = hidden.unflatten(2, (4, 2)).unflatten(4, (6, 2))  # B f h 2 w 2 C
        slow = torch.einsum("bfhpwqc,ocpq->bofhw", cells, module.latent_patch_embedding.weight[:, :, 0])
        assert torch.allclose(module(cond), slow, atol=1e-5)


def test_gradients_reach_the_trainables_alone_and_checkpointing_changes_no_bit(wan_folder: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        model = adapter.build_model(load_transformer(wan_folder), CONFIG, seed=3)
        disturb(model)
        model.set_gradient_checkpointing(checkpointing)
        model(**make_inputs()).square().mean().backward()
        with_grad = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert len(with_grad) == len(model.trainable_parameters()) == 2 * 20 + 8
        grads.append([parameter.grad for parameter in model.trainable_parameters().values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_trainables_stay_float32_over_a_bfloat16_base(wan_folder: Path) -> None:
    model = adapter.build_model(load_transformer(wan_folder, "bfloat16"), CONFIG)
    disturb(model)
    out = model(**make_inputs())
    out.square().mean().backward()
    assert out.dtype == torch.float32
    assert {p.dtype for p in model.trainable_parameters().values()} == {torch.float32}
    assert {p.grad.dtype for p in model.trainable_parameters().values() if p.grad is not None} == {torch.float32}
    assert model.transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16
    # diffusers keeps these in float32 on purpose; building the model must not undo it.
    assert model.transformer.blocks[0].scale_shift_table.dtype == torch.float32
    reference = adapter.build_model(load_transformer(wan_folder), CONFIG)
    disturb(reference)
    assert torch.allclose(out, reference(**make_inputs()), atol=0.1)


def test_start_depends_on_the_seed_alone(wan_folder: Path) -> None:
    def start(seed: int) -> list[Tensor]:
        torch.manual_seed(99 + seed)
        return list(adapter.build_model(load_transformer(wan_folder), CONFIG, seed).trainable_parameters().values())

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_source_video_follows_the_target_along_the_frame_axis(wan_folder: Path) -> None:
    model, inputs = adapter.build_model(load_transformer(wan_folder), CONFIG), make_inputs()
    disturb(model)
    seen: list[tuple[int, ...]] = []
    model.transformer.patch_embedding.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    source = torch.randn(2, 16, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain, both = model(**inputs), model(**inputs, source_latents=source)
    assert seen == [(2, 36, 3, 8, 12), (2, 36, 6, 8, 12)]
    assert both.shape == plain.shape
    assert not torch.allclose(both, plain, atol=1e-4)


@pytest.mark.parametrize("key", ["lora_rank", "adapter_hidden"])
def test_sizes_below_one_are_refused(wan_folder: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        adapter.build_model(load_transformer(wan_folder), backbone.ModelConfig(**{key: 0}))


@pytest.mark.heavy
@pytest.mark.parametrize("style", [None, "int8", "nf4"])
def test_the_whole_model_is_one_graph_for_the_compiler(wan_folder: Path, style: str | None) -> None:
    transformer = backbone.load_base(str(wan_folder), components=("transformer",), quantize=style).transformer
    model, inputs = adapter.build_model(transformer, CONFIG), make_inputs()
    disturb(model)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(**inputs)
    assert torch.equal(out, model(**inputs))
    out.sum().backward()
    assert all(value.grad is not None for value in model.trainable_parameters().values())


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_scale_is_refused(wan_folder: Path, alpha: float) -> None:
    base = backbone.load_base(str(wan_folder), components=("transformer",))
    with pytest.raises(ConfigError, match="lora_alpha"):
        adapter.build_model(base.transformer, backbone.ModelConfig(lora_rank=4, lora_alpha=alpha, adapter_hidden=32))
