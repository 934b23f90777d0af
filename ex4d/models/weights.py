"""Read and write adapter files: this project's safetensors, checked strictly, and the released ex4d.ckpt."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ex4d import storage
from ex4d.errors import ConfigError, ContractError
from ex4d.models import adapter_header, formats, lora, lora_dialects
from ex4d.models.adapter import Ex4dModel
from ex4d.models.adapter_header import AdapterMetadata
from ex4d.models.encoders import base_fingerprint

FILE_NAME = "adapter.safetensors"
RELEASED_BASE = "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"
# The prompts that the release's sampler uses; the negative one is Wan's own, as diffusers documents it.
RELEASED_PROMPT = "4K ultra HD, surround motion, realistic tone, panoramic shot, wide-angle view, cinematic quality"
RELEASED_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, "
    "static, overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra "
    "fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, misshapen limbs, fused "
    "fingers, still picture, messy background, three legs, many people in the background, walking "
    "backwards"
)
# Errors of torch's unpickler on other data, or on pickles that hold more than tensors.
_UNPICKLABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError),
    *(LookupError, AttributeError, TypeError, OverflowError, MemoryError),
)


def adapter_state(model: Ex4dModel) -> dict[str, Tensor]:
    """Return {canonical name: float32 tensor} of all trainable parameters, detached, on the CPU, contiguous."""
    return {name: value.detach().cpu().contiguous() for name, value in model.trainable_parameters().items()}


def save_adapter(folder: str | Path, model: Ex4dModel | Mapping[str, Tensor], metadata: AdapterMetadata) -> Path:
    """Write `folder`/adapter.safetensors atomically and return its path; equal content gives equal bytes.

    Args:
        model: the model, or its `adapter_state` if the caller has gathered it.
    """
    from safetensors.torch import save

    state = adapter_state(model) if isinstance(model, Ex4dModel) else dict(model)
    data = save(state, metadata=adapter_header.write(metadata))
    path = Path(folder) / FILE_NAME
    storage.write_bytes(path, data)
    return path


def read_metadata(path: str | Path) -> AdapterMetadata:
    """Return the metadata of an adapter without reading its tensors; `path` as in `read_adapter`."""
    file = adapter_file(path)
    return read_adapter(file)[1] if is_released(file) else adapter_header.read(file)


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], AdapterMetadata]:
    """Return (canonical state on the CPU, metadata).

    Args:
        path: folder with adapter.safetensors, that file itself, or a released `.ckpt`.

    Raises:
        ConfigError: there is no such file.
        ContractError: the file is damaged, or of another kind or version.
    """
    file = adapter_file(path)
    if is_released(file):
        tensors = _load_pickle(file)
        return _from_released(tensors, file), _released_metadata(tensors)
    from safetensors.torch import load_file

    adapter_header.check(file)
    metadata = adapter_header.read(file)
    return load_file(file), metadata


def load_adapter(path: str | Path, model: Ex4dModel, allow_other_base: bool = False) -> AdapterMetadata:
    """Copy an adapter into the model's trainable parameters and return its metadata; a mismatch changes nothing.

    Args:
        path: as in `read_adapter`.
        allow_other_base: accept another base of equal shape, such as 720P for an adapter of 480P.

    Raises:
        ContractError: rank, alpha, base, names or shapes differ; says which.
    """
    state, metadata = read_adapter(path)
    rank, alpha = lora.settings(model.transformer)
    if (rank, alpha) != (metadata.lora_rank, metadata.lora_alpha):
        raise ContractError(
            f"{path}: LoRA has rank {metadata.lora_rank} and alpha {metadata.lora_alpha:g}, "
            f"the model has rank {rank} and alpha {alpha:g}"
        )
    own = base_fingerprint(model.transformer)
    known = metadata.base_fingerprint is not None and own is not None
    if known and metadata.base_fingerprint != own and not allow_other_base:
        raise ContractError(
            f"{path} was trained on {metadata.base} ({metadata.base_fingerprint}); the loaded base is another ({own})"
        )
    load_state(model, state, str(path))
    return metadata


def load_state(model: Ex4dModel, state: Mapping[str, Tensor], what: str = "the state") -> None:
    """Copy a canonical state into the model's trainable parameters. Raises ContractError unless it fits: see `fill`."""
    trainables = model.trainable_parameters()
    formats.require(state, trainables, what)
    fill(trainables, state, what)


@torch.no_grad()
def fill(trainables: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copy a state into parameters of the same names; if any does not match, nothing changes.

    Raises:
        ContractError: names or shapes differ, or a tensor is not finite; names the first.
    """
    if odd := sorted(trainables.keys() ^ state.keys()):
        raise ContractError(f"{what} belongs to another model: {len(odd)} names differ, the first is {odd[0]}")
    different = [name for name, value in trainables.items() if value.shape != state[name].shape]
    if different:
        first = different[0]
        raise ContractError(
            f"{what}: {len(different)} shapes differ, the first is {first}: "
            f"{tuple(state[first].shape)}, the model has {tuple(trainables[first].shape)}"
        )
    broken = [name for name in trainables if not torch.isfinite(state[name]).all()]
    if broken:
        raise ContractError(f"{what}: {len(broken)} tensors are not finite, the first is {broken[0]}")
    for name, value in trainables.items():
        value.copy_(state[name])


def write_released(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a canonical state in the released format, which stores no alpha: its reader assumes alpha = rank = 16."""
    with storage.atomic_path(path) as temporary:
        torch.save(formats.to_format(state, "released"), temporary)


def write_lora(path: str | Path, state: Mapping[str, Tensor], style: str, alpha: float) -> None:
    """Write the LoRA of a canonical state, without the geometry adapter, as a safetensors file for another program.

    Args:
        style: "diffusers", "comfyui" or "kohya".
        alpha: of the LoRA; where the format has no place for it, B is multiplied by alpha / rank instead.

    Raises:
        ConfigError: an unknown style. ContractError: the state is incomplete.
    """
    from safetensors.torch import save

    if style not in ("diffusers", "comfyui", "kohya"):
        raise ConfigError("format", style, "allowed: diffusers, comfyui, kohya")
    tensors = formats.to_format(state, style, alpha)
    if style != "kohya":
        tensors = {name: folded(name, value, alpha) for name, value in tensors.items()}
    storage.write_bytes(path, save({name: value.contiguous() for name, value in tensors.items()}))


def folded(name: str, value: Tensor, alpha: float) -> Tensor:
    """Return a tensor, canonical or renamed, with alpha / rank folded into B, for readers that assume alpha = rank."""
    rank = value.shape[-1]
    return value if ".lora_B" not in name or alpha == rank else value * (alpha / rank)


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], float]:
    """Return (canonical LoRA tensors of the layers present, alpha) of another program's safetensors file.

    Raises:
        ContractError: the file is damaged, or holds no LoRA that `lora_dialects` reads.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        adapter_header.check(Path(path))
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ContractError(
            f"{path} is not a safetensors file: {adapter_header.what_it_is(Path(path)) or error}"
        ) from error
    try:
        return lora_dialects.read(tensors)
    except ContractError as error:
        raise ContractError(f"{path}: {error}") from None


def adapter_file(path: str | Path) -> Path:
    """Return the file of an adapter, `path` as in `read_adapter`. Raises ConfigError if there is none."""
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError("adapter", str(path), f"is neither a folder with {FILE_NAME} nor a file")
    return file


def is_released(file: Path) -> bool:
    """Return True if the suffix of a file is that of the released ex4d.ckpt's format."""
    return file.suffix in (".ckpt", ".pt", ".pth")


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except _UNPICKLABLE as error:
        # Only the first line: the rest of torch's message advises to load the file unsafely.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ContractError(f"{file} is not a file of plain tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise ContractError(f"{file} is not a mapping of names to tensors")
    return tensors


def _from_released(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    try:
        return formats.from_format(tensors, "released")[0]
    except ContractError as error:
        raise ContractError(f"{file}: {error}") from error


def _released_metadata(tensors: Mapping[str, Tensor]) -> AdapterMetadata:
    rank = tensors["blocks.0.self_attn.q.lora_A.default.weight"].shape[0]
    return AdapterMetadata(
        base=RELEASED_BASE,
        base_revision=None,
        base_fingerprint=None,
        lora_rank=rank,
        lora_alpha=float(rank),  # generate.py of the release: lora_rank=16, lora_alpha=16.0
        adapter_hidden=tensors["latent_encoder.0.weight"].shape[0],
        mask_range="released",
        residual_fp32=True,
        prompt=RELEASED_PROMPT,
        negative_prompt=RELEASED_NEGATIVE_PROMPT,
    )
