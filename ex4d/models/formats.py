"""Convert LoRA and adapter tensors to and from other programs' names; the values do not change.

Canonical names are diffusers': `transformer.blocks.N.attn1.to_q.lora_A.weight`, and `geometry_adapter.…`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ex4d.errors import ConfigError, ContractError

# diffusers' module in a block -> Wan's own
ORIGINAL = {
    **{f"attn1.to_{name}": f"self_attn.{name}" for name in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    **{f"attn2.to_{name}": f"cross_attn.{name}" for name in "qkv"},
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_FLAT = {module: original.replace(".", "_") for module, original in ORIGINAL.items()}
GEOMETRY = (
    *(f"latent_encoder.{index}.{part}" for index in (0, 2, 4) for part in ("weight", "bias")),
    "latent_patch_embedding.weight",
    "latent_patch_embedding.bias",
)

# format -> (module names, pattern of A's key, pattern of B's key)
_LORA_KEYS = {
    "diffusers": (
        {module: module for module in ORIGINAL},
        "transformer.blocks.{block}.{module}.lora_A.weight",
        "transformer.blocks.{block}.{module}.lora_B.weight",
    ),
    "released": (
        ORIGINAL,
        "blocks.{block}.{module}.lora_A.default.weight",
        "blocks.{block}.{module}.lora_B.default.weight",
    ),
    "comfyui": (
        ORIGINAL,
        "diffusion_model.blocks.{block}.{module}.lora_A.weight",
        "diffusion_model.blocks.{block}.{module}.lora_B.weight",
    ),
    "kohya": (
        _FLAT,
        "lora_unet_blocks_{block}_{module}.lora_down.weight",
        "lora_unet_blocks_{block}_{module}.lora_up.weight",
    ),
}
FORMATS = tuple(_LORA_KEYS)


def lora_names(num_blocks: int, style: str = "diffusers", present: Iterable[str] = ORIGINAL) -> list[str]:
    """Return the LoRA names of a format, in the same order for each, so that those of two formats can be zipped.

    Args:
        present: modules of a block (of ORIGINAL) that have a LoRA.
    """
    if style not in _LORA_KEYS:
        raise ConfigError("format", style, f"allowed: {', '.join(FORMATS)}")
    modules, *patterns = _LORA_KEYS[style]
    chosen = {*present}
    return [
        pattern.format(block=block, module=modules[module])
        for block in range(num_blocks)
        for module in ORIGINAL
        if module in chosen
        for pattern in patterns
    ]


def count_blocks(names: Iterable[str]) -> int:
    """Return one more than the highest block number in any format's names; 0 where there is none.

    Raises:
        ContractError: a number below it is missing.
    """
    numbers = {int(match[1]) for name in names if (match := re.search(r"blocks[._](\d{1,9})[._]", name))}
    if numbers and max(numbers) >= len(numbers):
        raise ContractError(f"blocks are missing: there are {len(numbers)}, numbered up to {max(numbers)}")
    return len(numbers)


def to_format(state: Mapping[str, Tensor], style: str, alpha: float | None = None) -> dict[str, Tensor]:
    """Return the LoRA of a canonical state under another program's names.

    Geometry adapter tensors are included only in "released", the only format that has a place for them.

    Args:
        style: one of FORMATS.
        alpha: required in "kohya", which stores it with each pair; the other formats have no place for it, and their
            readers assume alpha = rank.

    Raises:
        ContractError: tensors are missing or surplus.
    """
    num_blocks = count_blocks(state)
    # The released format has an entry for every layer, and its reader requires all of them.
    all_of_them = style == "released"
    present = [module for module in ORIGINAL if all_of_them or f"transformer.blocks.0.{module}.lora_A.weight" in state]
    canonical, renamed = lora_names(num_blocks, present=present), lora_names(num_blocks, style, present)
    geometry = [f"geometry_adapter.{name}" for name in GEOMETRY]
    with_geometry = style == "released" or geometry[0] in state
    require(state, [*canonical, *(geometry if with_geometry else ())], "this adapter")
    out = {new: state[old] for old, new in zip(canonical, renamed, strict=True)}
    if style == "released":
        out |= {name: state[f"geometry_adapter.{name}"] for name in GEOMETRY}
    if style == "kohya":
        if alpha is None:
            raise ConfigError("alpha", alpha, "must be set for kohya names")
        pairs = [name.removesuffix(".lora_down.weight") for name in renamed if name.endswith(".lora_down.weight")]
        out |= {f"{pair}.alpha": torch.tensor(float(alpha)) for pair in pairs}
    return out


def from_format(state: Mapping[str, Tensor], style: str) -> tuple[dict[str, Tensor], float | None]:
    """Return (canonical state, alpha) of tensors under another program's names; alpha is None where it is not stored.

    Raises:
        ContractError: tensors are missing or surplus, or alpha differs between layers. Names them.
    """
    for name, value in state.items():
        if (name.endswith(".alpha") and value.numel() != 1) or (name.endswith(".weight") and value.ndim < 2):
            raise ContractError(f"{style} weights: {name} has the shape {tuple(value.shape)}")
    alphas = {name: float(value) for name, value in state.items() if name.endswith(".alpha")}
    tensors = {name: value for name, value in state.items() if name not in alphas}
    num_blocks = count_blocks(tensors)
    canonical, renamed = lora_names(num_blocks), lora_names(num_blocks, style)
    require(tensors, [*renamed, *(GEOMETRY if style == "released" else ())], f"{style} weights")
    if len(set(alphas.values())) > 1:
        raise ContractError(f"alpha differs between layers: {sorted(set(alphas.values()))}")
    out = {old: tensors[new] for old, new in zip(canonical, renamed, strict=True)}
    if style == "released":
        out |= {f"geometry_adapter.{name}": tensors[name] for name in GEOMETRY}
    return out, next(iter(alphas.values()), None)


def require(state: Mapping[str, Tensor], names: Iterable[str], what: str) -> None:
    """Raise ContractError unless `state` has exactly these names, and at least one block."""
    wanted = set(names)
    missing, surplus = sorted(wanted - set(state)), sorted(set(state) - wanted)
    if missing or surplus or count_blocks(state) == 0:
        raise ContractError(
            f"{what}: {len(state)} tensors where {len(wanted)} belong; "
            f"{len(missing)} missing {missing[:3]}, {len(surplus)} not expected {surplus[:3]}"
        )
