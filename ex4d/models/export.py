"""Convert adapters to and from other programs' files: the whole adapter, or its LoRA under the program's names."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ex4d.errors import ConfigError, ContractError
from ex4d.models import experts, weights
from ex4d.models.lora import TARGETS

logger = logging.getLogger(__name__)

STYLES = ("ex4d", "released", "kohya", "comfyui", "diffusers")


def export(adapter: str | Path, style: str, output: str | Path, lora: str | Path | None = None) -> list[Path]:
    """Write an adapter in another format and return the paths; renaming tensors changes no bit of them.

    Args:
        adapter: folder or file of `ex4d train`, or a released ex4d.ckpt. A folder of two experts' adapters
            (`experts.files`) yields two files, with _high_noise and _low_noise before the suffix, as ComfyUI's users
            expect, or OUTPUT/high and OUTPUT/low; `lora` then stands for two files with the same suffixes.
        style: "ex4d" (a folder, with the metadata), "released" (LoRA and geometry as ex4d.ckpt), or "kohya", "comfyui",
            "diffusers": the LoRA alone, since these have no place for the geometry adapter. In a format without a
            place for alpha, B is multiplied by alpha / rank.
        output: the folder or file to write.
        lora: take the LoRA from this file of another program (`lora_dialects`) and the rest from `adapter`.

    Raises:
        ConfigError: an unknown style, or one that cannot express the adapter; a missing file; an output that is one of
            the inputs.
        ContractError: a damaged file, or a LoRA for a different model than the adapter's.
    """
    if style not in STYLES:
        raise ConfigError("style", style, f"allowed: {', '.join(STYLES)}")
    output = Path(output)
    if not experts.files(adapter):
        return [_export(adapter, style, output, lora)]
    written = []
    for expert, (file, _) in experts.read(adapter).items():
        place = output / str(expert) if style == "ex4d" else _of_expert(output, expert)
        written.append(_export(file, style, place, None if lora is None else _of_expert(Path(lora), expert)))
    return written


def _of_expert(path: Path, expert: str | None) -> Path:
    return path.with_name(f"{path.stem}_{expert}_noise{path.suffix}")


def _export(adapter: str | Path, style: str, output: Path, lora: str | Path | None) -> Path:
    """Write one adapter in another format; see `export`."""
    target = output / weights.FILE_NAME if style == "ex4d" else output
    for source in (Path(adapter), Path(adapter) / weights.FILE_NAME, *([Path(lora)] if lora else [])):
        if source.is_file() and target.exists() and source.samefile(target):
            raise ConfigError("output", str(output), "must not be one of the input files")
    state, metadata = weights.read_adapter(adapter)
    if metadata.source_video and style != "ex4d":
        raise ConfigError("style", style, "must be ex4d: other formats cannot record that it takes the source video")
    if style == "released" and {*metadata.lora_targets} != {*TARGETS}:
        raise ConfigError("style", style, "must be another style: this format needs a LoRA on every layer")
    if metadata.expert and style == "released":
        raise ConfigError(
            "style", style, "must be another style: this format belongs to Wan2.1, which has one transformer"
        )
    if lora is not None:
        state, alpha = _with_lora(state, lora)
        metadata = replace(metadata, lora_rank=_rank(state), lora_alpha=alpha)
    if style == "ex4d":
        return weights.save_adapter(output, state, metadata)
    if style == "released":
        plain = {name: weights.folded(name, value, metadata.lora_alpha) for name, value in state.items()}
        weights.write_released(output, plain)
    else:
        loras = {name: value for name, value in state.items() if ".lora_" in name}
        weights.write_lora(output, loras, style, metadata.lora_alpha)
    return output


def _rank(state: dict[str, Tensor]) -> int:
    return next(value.shape[0] for name, value in state.items() if ".lora_A" in name)


def _with_lora(state: dict[str, Tensor], lora: str | Path) -> tuple[dict[str, Tensor], float]:
    """Replace the LoRA in a state by that of a file; return (state, alpha of the new LoRA)."""
    if not Path(lora).is_file():
        raise ConfigError("from", str(lora), "no such file")
    new, alpha = weights.read_lora(lora)
    old = {name: value for name, value in state.items() if ".lora_" in name}
    # A and B have the rank on one side and the layer's width on the other; the width must be that of the layer.
    axis = {name: 1 if ".lora_A" in name else 0 for name in old}
    strange = [name for name in new if name not in old or new[name].shape[axis[name]] != old[name].shape[axis[name]]]
    if strange:
        raise ContractError(
            f"{lora}: its LoRA belongs to another model than the adapter's, the first such layer {strange[0]}"
        )
    if missing := sorted(old.keys() - new.keys()):
        logger.warning(
            "%s: %d of %d layers are missing in it and keep the weights of the base",
            lora,
            len(missing) // 2,
            len(old) // 2,
        )
    rank = _rank(new)
    return {name: new.get(name, _without(name, value, rank)) for name, value in state.items()}, alpha


def _without(name: str, value: Tensor, rank: int) -> Tensor:
    """Return a tensor of a layer that the new LoRA does not cover: A cut or padded to the new rank, B zero."""
    if ".lora_A" in name:
        return torch.nn.functional.pad(value[:rank], (0, 0, 0, max(0, rank - len(value)))).contiguous()
    return value.new_zeros(len(value), rank) if ".lora_B" in name else value
