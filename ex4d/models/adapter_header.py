"""Read, write and check the metadata of an adapter file, which its safetensors header holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ex4d import config, storage
from ex4d.errors import ConfigError, ContractError
from ex4d.models import lora

DEFAULT_SHIFT = 5.0  # that of the release
FORMAT_VERSION = 1
_HEADER = "ex4d"
# Entries that older files do not have, with their value there.
_NEWER: dict[str, Any] = {
    **{"residual_fp32": False, "expert": None, "lora_targets": lora.TARGETS},
    **{"prompt": "", "negative_prompt": ""},
}
MAX_HEADER_BYTES, MAX_TENSORS, MAX_DIMENSIONS = 2**24, 50_000, 8  # limits for untrusted files
CONVENTIONS = (
    "cameras OpenCV; latents normalised by the VAE's mean and std; condition = VAE(colour, black where hidden) then "
    "VAE(mask); residual added to the patch embedding; LoRA scaled by alpha / rank; timestep = 1000 sigma"
)


@dataclass(frozen=True)
class AdapterMetadata:
    """The metadata of an adapter file, in the header of its safetensors.

    Args:
        base, base_revision: the base it was trained on, a hub id with its commit, a folder, or "tiny".
        base_fingerprint: from `encoders.base_fingerprint`; None if unknown (the released file).
        lora_rank, lora_alpha, lora_targets, adapter_hidden, mask_range, source_video, residual_fp32: as in ModelConfig.
        shift: of the noise schedule in training, and the default for sampling.
        num_frames, size: T and [H, W] px of the clips it was trained on; the defaults of `ex4d generate`.
        dataset_fingerprint: tree hash of the dataset; None if unknown.
        step: training step of the weights.
        expert: of a base with two, the one it was trained on: "high" (noise) or "low"; None for a base with one.
        prompt, negative_prompt: those it was trained or released with, and the default for sampling; "" for captions.
        conventions: for human readers, not for code.
        format_version: of this layout.
    """

    base: str
    base_revision: str | None
    base_fingerprint: str | None
    lora_rank: int
    lora_alpha: float
    adapter_hidden: int
    mask_range: Literal["unit", "released"] = "unit"
    source_video: bool = False
    residual_fp32: bool = False
    shift: float = DEFAULT_SHIFT
    num_frames: int = 49
    size: tuple[int, int] = (512, 512)
    dataset_fingerprint: str | None = None
    step: int = 0
    expert: Literal["high", "low"] | None = None
    lora_targets: tuple[str, ...] = lora.TARGETS
    prompt: str = ""
    negative_prompt: str = ""
    conventions: str = CONVENTIONS
    format_version: int = FORMAT_VERSION


def write(metadata: AdapterMetadata) -> dict[str, str]:
    """Return the header of a file: one entry only, since the order of several is not fixed in safetensors."""
    values = asdict(metadata)
    # Newer entries are left out where they are the default, so that earlier versions read the file.
    entries = {name: value for name, value in values.items() if name not in _NEWER or value != _NEWER[name]}
    return {_HEADER: json.dumps(entries, sort_keys=True)}


def read(file: Path) -> AdapterMetadata:
    """Return the metadata of a safetensors file. Raises ContractError if it is not an adapter of this version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            header: Any = json.loads((opened.metadata() or {}).get(_HEADER, "null"))
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 (it cannot be iterated itself)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ContractError(f"{file} is not a safetensors file: {what_it_is(file) or error}") from error
    if header is None:
        raise ContractError(f"{file} {_of_another_program(shapes)}")
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version") if isinstance(header, dict) else None
        raise ContractError(f"{file}: adapter format {version}, this version reads {FORMAT_VERSION}")
    header = {"shift": DEFAULT_SHIFT} | _NEWER | header  # adapters from before 2026-11-23 do not store the shift
    names = {field.name for field in fields(AdapterMetadata)}
    if set(header) != names:
        raise ContractError(f"{file}: its header differs in {sorted(set(header) ^ names)}")
    try:
        metadata = config.validate(AdapterMetadata, header, "adapter")
    except ConfigError as error:
        raise ContractError(f"{file}: its header says {error}") from error
    _check_header(metadata, shapes, file)
    return metadata


def check(file: Path) -> None:
    """Raise ContractError unless a safetensors file has a small header and non-empty tensors of few dimensions.

    An empty tensor may declare a million dimensions, for which the library creates gigabytes of objects.
    """
    with storage.open_read(file) as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            reason = what_it_is(file) or f"its header has {length} bytes, 2 to {MAX_HEADER_BYTES} are allowed"
            raise ContractError(f"{file}: {reason}")
        try:
            header = json.loads(opened.read(length))
            shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
            fits = all(len(shape) <= MAX_DIMENSIONS and 0 not in shape for shape in shapes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ContractError(f"{file}: its header is damaged ({type(error).__name__})") from error
    if not fits or len(shapes) > MAX_TENSORS:
        raise ContractError(
            f"{file}: more than {MAX_TENSORS} tensors, an empty one, or one of over {MAX_DIMENSIONS} axes"
        )


def _of_another_program(names: Mapping[str, Any]) -> str:
    if any("lora" in name or name.endswith(".alpha") for name in names):
        advice = "`ex4d export ADAPTER --from THIS_FILE --style ex4d` puts it into an adapter"
        return f"is a LoRA of another program without the geometry adapter: {advice}"
    return f"holds no adapter of this project, but {len(names)} tensors such as {sorted(names)[:2]}"


def _check_header(metadata: AdapterMetadata, shapes: Mapping[str, list[int]], file: Path) -> None:
    """Raise ContractError unless the header's sizes are valid and match the tensors; the model is built from them."""
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A" in name and shape}
    hidden = next(iter(shapes.get("geometry_adapter.latent_encoder.0.weight", [])), 0)
    if ranks != {metadata.lora_rank} or hidden != metadata.adapter_hidden:
        raise ContractError(
            f"{file}: its header says rank {metadata.lora_rank} and {metadata.adapter_hidden} channels, "
            f"its tensors have {sorted(ranks)} and {hidden}"
        )
    targets = metadata.lora_targets
    modules = {name.split(".lora_")[0].split(".", 3)[-1] for name in shapes if ".lora_A" in name}
    if not {*targets} <= {*lora.TARGETS} or not all(module.endswith(targets) for module in modules):
        raise ContractError(f"{file}: its header says LoRA on {', '.join(targets)}, its tensors {sorted(modules)}")
    sizes = (metadata.lora_alpha, metadata.shift, metadata.num_frames, *metadata.size)
    if not all(0 < value < math.inf for value in sizes):
        raise ContractError(f"{file}: its header says alpha, shift, frames and size {sizes}")


def what_it_is(file: Path) -> str:
    """Return what a failed download left in place of the file; "" if it is not a known kind."""
    with open(file, "rb") as opened:
        head = opened.read(200).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, a failed download"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file (git lfs pull)"
    return "" if head else "it is empty"
