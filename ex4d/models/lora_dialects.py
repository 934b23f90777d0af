"""Read other programs' Wan LoRA under canonical names: diffusers, ComfyUI, kohya, musubi, DiffSynth, PEFT.

Every name is parsed, and unknown names are an error: silently dropping a tensor would give a network that nobody
trained.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ex4d.errors import ContractError
from ex4d.models.formats import ORIGINAL

logger = logging.getLogger(__name__)

_HEAD = r"(?:lora_unet_+|lora_transformer_+|(?:(?:base_model|model|transformer|diffusion_model|unet|pipe|dit)\.)*)"
_PART = r"(?:lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)?\.weight|alpha"
_NAME = re.compile(rf"{_HEAD}blocks[._](\d{{1,4}})[._](.+?)\.({_PART})")
# Every spelling of a module within a block -> diffusers' module.
_MODULES = {
    spelling: module
    for module, own in ORIGINAL.items()
    for spelling in (module, own, module.replace(".", "_"), own.replace(".", "_"))
}
_IMAGE = ("add_k_proj", "add_v_proj", "k_img", "v_img")  # of cross attention; the adapter has no place for them
_TEXT = ("lora_te", "text_encoder.", "text_encoder_", "lora_t5", "cond_stage_model.")
_KINDS = {  # part of a tensor's name -> the kind of adapter that it reveals, none of them a plain LoRA
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon with a third factor",
    ".diff\n": "whole differences of weights (.diff)",
}


@dataclass
class Pair:
    """One layer's LoRA: down [r, in], up [out, r], alpha (None: the rank)."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None


def read(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Return (canonical LoRA tensors of the layers present, alpha), all of one rank.

    Where ranks or alphas differ between layers, smaller ranks are zero-padded and alpha / rank is folded into B, so
    that alpha equals the rank; otherwise no value changes. 8-bit values become bfloat16, which holds them exactly.

    Raises:
        ContractError: another kind of adapter, which the message names; names of another model; a layer whose A or B
            is missing, does not fit the other, or holds non-finite values.
    """
    for part, kind in _KINDS.items():
        if names := [name for name in tensors if part in re.sub(r"\.diff_\w+$", ".diff", name) + "\n"]:
            raise ContractError(f"{kind} is not read, only plain LoRA: {len(names)} tensors such as {names[0]}")
    pairs, left_out, odd = _pairs(tensors)
    if odd or not pairs:
        raise ContractError(f"not a LoRA of Wan: {len(odd) or len(tensors)} names such as {sorted(odd or tensors)[:2]}")
    if left_out:
        logger.warning("left out %d tensors that the adapter cannot hold, such as %s", len(left_out), left_out[0])
    for name, pair in pairs.items():
        _check(name, pair)
    ranks = {pair.down.shape[0] for pair in pairs.values() if pair.down is not None}
    alphas = {pair.alpha for pair in pairs.values()}
    rank = max(ranks)
    is_even = len(ranks) == 1 and len(alphas) == 1
    state = {}
    for name, pair in pairs.items():
        down, up = _plain(pair.down), _plain(pair.up)
        if not is_even:
            own = down.shape[0]
            up = up.float() * ((own if pair.alpha is None else pair.alpha) / own)
            down = torch.nn.functional.pad(down.float(), (0, 0, 0, rank - own))
            up = torch.nn.functional.pad(up, (0, rank - own))
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = down.contiguous(), up.contiguous()
    alpha = next(iter(alphas))
    return state, float(rank) if not is_even or alpha is None else alpha


def _pairs(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], list[str], list[str]]:
    """Return ({canonical layer: Pair}, skipped names, unknown names)."""
    pairs: dict[str, Pair] = {}
    left_out, odd = [], []
    for name, value in tensors.items():
        match = _NAME.fullmatch(name)
        if name.startswith(_TEXT) or (match and match[2].endswith(_IMAGE)):
            left_out.append(name)
        elif match is None or match[2] not in _MODULES:
            odd.append(name)
        else:
            pair = pairs.setdefault(f"transformer.blocks.{int(match[1])}.{_MODULES[match[2]]}", Pair())
            if match[3] == "alpha":
                pair.alpha = float(value) if value.numel() == 1 else float("nan")
            elif match[3].startswith(("lora_A", "lora_down", "lora.down")):
                pair.down = value
            else:
                pair.up = value
    return pairs, left_out, odd


def _check(name: str, pair: Pair) -> None:
    down, up = pair.down, pair.up
    if down is None or up is None:
        raise ContractError(f"{name} has {'no A' if down is None else 'no B'}: the file is incomplete")
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or 0 in down.shape:
        raise ContractError(
            f"{name} has A {list(down.shape)} and B {list(up.shape)}, which do not fit: [r, in], [out, r]"
        )
    for which, value in (("A", down), ("B", up)):
        if not value.is_floating_point() or not torch.isfinite(_plain(value)).all():
            raise ContractError(f"{name}: {which} is not finite")
    if pair.alpha is not None and not 0 < pair.alpha < float("inf"):
        raise ContractError(f"{name} has alpha {pair.alpha}, not above 0")


def _plain(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.to(torch.bfloat16) if value.dtype.itemsize == 1 else value
