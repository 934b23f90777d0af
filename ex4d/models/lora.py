"""Add LoRA to the frozen transformer. The only module that uses peft."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ex4d.errors import ConfigError, ContractError
from ex4d.models import formats

# Self- and cross-attention q, k, v, o and both feed-forward layers: ten matrices per block, without the image k and v.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
ADAPTER_NAME = "default"


class _MasterWeightLinear(nn.Linear):
    """A linear layer that casts its float32 weight to the input's dtype: a cheap product and full-precision updates."""

    def forward(self, input: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return the product [..., out], added to `onto` [..., out] in the same kernel if that is given."""
        weight = self.weight.to(input.dtype)
        if onto is None:
            return nn.functional.linear(input, weight)
        return torch.addmm(onto.flatten(0, -2), input.flatten(0, -2), weight.T).view_as(onto)


def _lora_forward(layer: Any, x: Tensor) -> Tensor:
    """Return the frozen layer's output plus its LoRA; peft's forward scales at full width, this one at the rank."""
    result: Tensor = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    for name in layer.active_adapters:
        low = layer.lora_A[name](layer.lora_dropout[name](x))
        result = layer.lora_B[name](low if layer.scaling[name] == 1 else low * layer.scaling[name], result)
    return result


def add_lora(
    transformer: nn.Module,
    rank: int,
    alpha: float,
    seed: int = 0,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Sequence[str] = TARGETS,
) -> None:
    """Freeze `transformer` and add trainable float32 LoRA to `targets` in place; its output is unchanged until trained.

    The product is computed in the dtype of the layer's input and scaled by alpha / rank, or with `rslora` by
    alpha / sqrt(rank). A is drawn from `seed` alone (Kaiming-uniform, a = √5, as peft does), B is zero.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    transformer.requires_grad_(False)
    # peft types alpha as int and divides; a float works.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(targets),
        lora_dropout=dropout,
        use_rslora=rslora,
    )
    inject_adapter_in_model(config, transformer, adapter_name=ADAPTER_NAME)
    generator = torch.Generator().manual_seed(seed)
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.forward = types.MethodType(_lora_forward, layer)
            for pair in (layer.lora_A, layer.lora_B):
                pair[ADAPTER_NAME] = _master(pair.get_parameter(f"{ADAPTER_NAME}.weight"))
            _draw(layer.lora_A.get_parameter(f"{ADAPTER_NAME}.weight"), generator)


def _master(weight: Tensor) -> _MasterWeightLinear:
    with torch.device("meta"):
        master = _MasterWeightLinear(weight.shape[1], weight.shape[0], bias=False)
    master.weight = nn.Parameter(weight.detach().float())
    return master


@torch.no_grad()
def _draw(weight: Tensor, generator: torch.Generator) -> None:
    if weight.is_meta:
        return
    # Drawn on the CPU, so that every device starts from the same numbers.
    drawn = torch.empty(weight.shape, device="cpu")
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    weight.copy_(drawn)


def stack_lora(transformer: Any, path: str | Path, scale: float, name: str) -> int:
    """Add another program's LoRA beside the existing one, for generation; return its number of layers.

    It reads the names of diffusers, ComfyUI, kohya and Wan itself (diffusers' converter). Call it before blocks are
    swapped.

    Args:
        scale: factor of its output, in addition to alpha / rank where the file stores alpha.
        name: adapter name, unique in this transformer.

    Raises:
        ConfigError: the file is missing, is not safetensors, or matches no layer of this model.
    """
    from peft.tuners.lora import LoraLayer
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = _diffusers_names(load_file(path))
        transformer.load_lora_adapter(state, prefix="transformer", adapter_name=name)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, ContractError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("lora", str(path), f"is not a LoRA of this model ({reason})") from error
    layers = [layer for layer in transformer.modules() if isinstance(layer, LoraLayer) and name in layer.lora_A]
    if not layers:
        raise ConfigError("lora", str(path), "holds no LoRA for this model: none of its names is a layer of the model")
    for layer in layers:
        vars(layer)["forward"] = types.MethodType(_lora_forward, layer)
        for pair in (layer.lora_A, layer.lora_B):
            pair[name] = _master(pair.get_parameter(f"{name}.weight"))
        layer.set_scale(name, scale)
        layer.set_adapter(list(layer.lora_A))
    transformer.requires_grad_(False)
    return len(layers)


def _diffusers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return LoRA tensors under diffusers' names; `formats` converts kohya's, diffusers' converter Wan's own."""
    from diffusers.loaders import lora_conversion_utils

    if any(key.startswith("lora_unet_") for key in state):
        tensors, alpha = formats.from_format(state, "kohya")
        rank = next(value.shape[0] for key, value in tensors.items() if ".lora_A" in key)
        scale = 1.0 if alpha is None else alpha / rank
        return {key: value * scale if ".lora_B" in key else value for key, value in tensors.items()}
    if any(key.startswith("diffusion_model.") or ".lora_down." in key for key in state):
        return lora_conversion_utils._convert_non_diffusers_wan_lora_to_diffusers(state)
    return state


def lora_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name: parameter} of all LoRA matrices, names as `blocks.0.attn1.to_q.lora_A.weight`, in module order."""
    marker = f".{ADAPTER_NAME}.weight"
    return {
        name.removesuffix(marker) + ".weight": parameter
        for name, parameter in transformer.named_parameters()
        if ".lora_" in name and name.endswith(marker)
    }


def settings(transformer: nn.Module) -> tuple[int, float]:
    """Return (rank, alpha) of a transformer's LoRA, such that alpha / rank is its scale even with rsLoRA.

    Raises:
        ContractError: the transformer has no LoRA.
    """
    from peft.tuners.lora import LoraLayer

    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            rank, alpha = int(layer.r[ADAPTER_NAME]), float(layer.lora_alpha[ADAPTER_NAME])
            return rank, alpha if layer.scaling[ADAPTER_NAME] == alpha / rank else alpha * math.sqrt(rank)
    raise ContractError("the transformer has no LoRA")
