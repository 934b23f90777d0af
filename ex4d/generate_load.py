"""Load a base model with its adapters for generation, on the available device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ex4d.errors import ConfigError
from ex4d.generate_config import GenerateConfig
from ex4d.models import backbone, experts, lora, provenance, swap, weights
from ex4d.models.adapter import Ex4dModel, build_model


def device_of(name: str | None) -> str:
    """Return the device of a setting, None: a GPU if there is one. Raises ConfigError if this machine lacks it."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    allowed = ["cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if name not in allowed:
        raise ConfigError("device", name, f"here: {', '.join(allowed)}")
    return name


def load(
    adapter_path: str | Path,
    base: str | None = None,
    device: str | None = None,
    config: GenerateConfig = GenerateConfig(),
) -> tuple[backbone.Base, Ex4dModel | experts.Experts]:
    """Load (base, model with its adapter) in evaluation mode; both experts if the base has two.

    Args:
        adapter_path: an adapter, or a folder with those of two experts (`experts.read`).
        base: overrides the base that the adapter names: tiny, a folder, or a hub id.
        device: default: cuda if there is one.
        config: its quantize, block_swap, vae_tiling and offload determine how much memory the device needs.
    """
    device = device_of(device)
    adapters = experts.read(adapter_path)
    metadata = experts.common(adapters)
    which = provenance.base_of(adapter_path, metadata, base)
    boundary = experts.boundary(*which)
    experts.check_fit(adapters, which[0], boundary)
    names: tuple[backbone.Expert | None, ...] = (None,) if boundary is None else experts.EXPERTS
    parts: list[backbone.Base] = []
    models: dict[backbone.Expert | None, Ex4dModel] = {}
    for name in names:
        part = backbone.load_base(
            *which,
            device=device,
            components=("transformer",) if parts else backbone.COMPONENTS,
            quantize=config.quantize,
            transformer_device="cpu" if config.block_swap and not config.quantize else None,
            offload=config.offload,
            expert=name,
        )
        path, own = adapters.get(name, (None, metadata))
        models[name] = _with_adapter(part, path, own, base not in (None, metadata.base), config, name)
        parts.append(part)
        if config.offload and len(names) > 1:
            part.transformer.to("cpu")  # it was quantized on the device
    loaded = parts[0]
    if config.vae_tiling and hasattr(loaded.vae, "enable_tiling"):  # the tiny base's codec works block by block
        loaded.vae.enable_tiling()
    if boundary is None:
        return loaded, models[None].eval()
    loaded.transformer_2 = parts[1].transformer
    return loaded, experts.Experts(loaded, models["high"], models["low"], boundary).eval()


def _with_adapter(
    base: backbone.Base,
    path: Path | None,
    metadata: weights.AdapterMetadata,
    allow_other_base: bool,
    config: GenerateConfig,
    expert: backbone.Expert | None,
) -> Ex4dModel:
    """Build the model over a base's transformer and load its adapter (`path`, if any) and further LoRAs."""
    shape = backbone.ModelConfig(
        lora_rank=metadata.lora_rank,
        lora_alpha=metadata.lora_alpha,
        lora_targets=metadata.lora_targets,
        adapter_hidden=metadata.adapter_hidden,
        residual_fp32=metadata.residual_fp32,
    )
    model = build_model(base.transformer, shape)
    if path is not None:
        weights.load_adapter(path, model, allow_other_base)
    for index, (where, file, scale) in enumerate(lora_files(config, expert is not None)):
        if where in (None, expert):
            lora.stack_lora(model.transformer, file, scale, f"extra{index}")
    swap.swap_blocks(model.transformer, config.block_swap, base.device)
    place: Any = model.geometry_adapter if config.offload else model
    place.to(base.device)
    return model


def lora_files(config: GenerateConfig, has_experts: bool) -> list[tuple[str | None, Path, float]]:
    """Return (expert or None for all, file, scale) of each of `config.lora`.

    Args:
        has_experts: the base has two experts.

    Raises:
        ConfigError: a missing file, an invalid scale, or an expert that the base does not have.
    """
    found: list[tuple[str | None, Path, float]] = []
    for text in config.lora:
        prefix, _, rest = text.partition(":")
        expert = prefix if prefix in experts.EXPERTS and not Path(text).is_file() else None
        rest = rest if expert else text
        path, colon, number = rest.rpartition(":")
        if not colon or Path(rest).is_file():
            path, number = rest, "1"
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale) or not Path(path).is_file():
            raise ConfigError("generate.lora", text, "must be a safetensors file, FILE:SCALE, or high:FILE or low:FILE")
        if expert and not has_experts:
            raise ConfigError("generate.lora", text, f"must be {rest}, since the base does not have two experts")
        found.append((expert, Path(path), scale))
    return found
