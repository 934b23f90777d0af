"""LoRA: exactly the released set of matrices, exactly the formula, and the parameter counts of the published model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ex4d.errors import ContractError
from ex4d.models import adapter, backbone, families, lora


@pytest.fixture(scope="module")
def model_14b() -> adapter.Ex4dModel:
    """The published model's shapes, without memory."""
    config = backbone.transformer_config("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers")
    return adapter.build_model(backbone.meta_transformer(config), backbone.ModelConfig())


def test_counts_of_the_published_model(model_14b: adapter.Ex4dModel) -> None:
    loras = lora.lora_parameters(model_14b.transformer)
    frozen = [parameter for parameter in model_14b.parameters() if not parameter.requires_grad]
    assert sum(parameter.numel() for parameter in frozen) == 16_394_878_784
    assert sum(parameter.numel() for parameter in loras.values()) == 76_677_120
    assert len(loras) == 20 * 40
    assert sum(parameter.numel() for parameter in model_14b.geometry_adapter.parameters()) == 23_109_632
    trainable = {id(parameter) for parameter in model_14b.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in model_14b.trainable_parameters().values()}


def test_the_image_keys_and_values_are_left_alone(model_14b: adapter.Ex4dModel) -> None:
    adapted = {name.split(".", 2)[2].rsplit(".lora_", 1)[0] for name in lora.lora_parameters(model_14b.transformer)}
    attention = {f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert adapted == attention | {"ffn.net.0.proj", "ffn.net.2"}


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_every_family_takes_the_adapter(name: str) -> None:
    """A forward pass of shapes only: the inputs fit, and the velocity has the latent's shape."""
    family = families.FAMILIES[name]
    shape = family.transformer
    model = adapter.build_model(backbone.meta_transformer(shape | {"num_layers": 1}), backbone.ModelConfig())
    z = shape["out_channels"]
    latent = (1, z, 3, 8, 8)
    first = shape["in_channels"] - z

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta")

    velocity = model(
        empty(*latent),
        empty(1),
        empty(1, 512, shape["text_dim"]),
        empty(1, 257, 1280) if shape["image_dim"] else None,
        empty(1, first, 3, 8, 8) if first else None,
        empty(1, 2 * z, 3, 8, 8),
    )
    assert velocity.shape == latent
    assert first in (0, 4 + z)
    assert families.family_of(shape) == name


def test_product_is_scaled_by_alpha_over_rank(wan_folder: Path) -> None:
    transformer = backbone.load_base(str(wan_folder), components=("transformer",)).transformer
    lora.add_lora(transformer, rank=4, alpha=8, seed=0)
    layer = transformer.blocks[0].attn1.to_q
    parameters = lora.lora_parameters(transformer)
    a, b = (parameters[f"blocks.0.attn1.to_q.lora_{part}.weight"] for part in "AB")
    assert not b.any()
    with torch.no_grad():
        b.normal_()
        x = torch.randn(3, 24)
        assert torch.allclose(layer(x), layer.base_layer(x) + 2.0 * (x @ a.T @ b.T), atol=1e-5)
    assert lora.settings(transformer) == (4, 8.0)
    # Kaiming-uniform with a = √5 is uniform in ±1/√fan_in.
    assert 0.9 / 24**0.5 < float(a.detach().abs().max()) <= 1 / 24**0.5


def test_a_model_without_lora_says_so(wan_folder: Path) -> None:
    transformer = backbone.load_base(str(wan_folder), components=("transformer",)).transformer
    assert lora.lora_parameters(transformer) == {}
    with pytest.raises(ContractError, match="no LoRA"):
        lora.settings(transformer)
