"""Build the parts of a run from its configuration: base, model, data and the function that writes the adapter."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ex4d import config as configs
from ex4d.models import adapter, attention, backbone, blocks, encoders, experts, lora, swap, warm_start, weights
from ex4d.redact import without_secrets
from ex4d.train import checkpoint, flops, prompts
from ex4d.train.config import Place, TrainConfig
from ex4d.train.datasets import Datasets, fingerprint
from ex4d.train.identity import identity
from ex4d.train.objective import Encoder, LatentEncoder

log = logging.getLogger(__name__)

PACKAGES = ("ex4d-platform", "torch", "deepspeed", "diffusers", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Job:
    """The model, the data and the output of a run.

    Args:
        encoder: turns a batch of clips into the model's inputs.
        model: frozen base and trainable parameters in one module, on its device; see `trainable_parameters()`.
        open_loader: (split, samples consumed, micro batch size, micro batches per step) -> endless micro batches of
            this rank, with `close()`; with several datasets, each batch has the index of its dataset as `dataset`.
        identity: the settings that decide what the run learns (identity.identity).
        write_adapter: (folder, {name: float32 CPU tensor}, step); writes an adapter for `ex4d generate --adapter`.
        facts: configuration and versions, for the log.
        costs: FLOPs and tokens of one sample of each dataset; () if unknown.
        recompute: which blocks recompute their activations; None if none do.
    """

    encoder: Encoder
    model: nn.Module
    open_loader: Callable[[str, int, int, int], Any]
    identity: dict[str, Any]
    write_adapter: Callable[[Path, Mapping[str, Tensor], int], Any]
    facts: dict[str, Any]
    costs: Sequence[flops.Cost] = ()
    recompute: blocks.Recompute | None = None


def run_identity(config: TrainConfig, model_config: backbone.ModelConfig) -> dict[str, Any]:
    """Return the settings that decide what a run learns: see identity.identity."""
    return identity(config, model_config, fingerprint(config))


def build_job(config: TrainConfig, model_config: backbone.ModelConfig, place: Place, device: torch.device) -> Job:
    """Return the job of a configuration, with the base loaded to `device`.

    Raises:
        ConfigError: the base is missing, cannot take these clips, or has other experts; see also datasets.Datasets.
        ContractError: a dataset is not finished, or its latents were made with another model.
    """
    chosen = model_config
    timesteps = experts.timesteps(chosen.base, chosen.revision, config.expert)
    data = Datasets(config, chosen, place)
    start = None
    if config.init_from and checkpoint.latest(config.output) is None:
        start = warm_start.read(config.init_from, chosen, config.expert)
    if chosen.family is not None:
        backbone.transformer_config(chosen.base, chosen.revision, chosen.family)  # reject it before loading
    known: dict[str, Tensor] = {}
    if not data.texts and config.prompt is not None:
        known = prompts.fixed(config, chosen, place, device)
    unneeded = {name for name in backbone.COMPONENTS if data.texts and name != "transformer"}
    unneeded |= {"text_encoder"} if known else set()
    base = _load_base(config, chosen, device, place, [name for name in backbone.COMPONENTS if name not in unneeded])
    costs = data.costs(base, chosen)
    model, recompute = _build_model(config, chosen, base, device)
    base_fingerprint = encoders.base_fingerprint(base.transformer)
    if start:
        start.fill(model, base_fingerprint)
    metadata = _metadata(config, chosen, base, data, base_fingerprint)

    def write_adapter(folder: Path, tensors: Mapping[str, Tensor], step: int) -> Path:
        return weights.save_adapter(folder, tensors, dataclasses.replace(metadata, step=step))

    if data.texts:
        encoder: Encoder = LatentEncoder(base, data, config.prompt)
    else:
        encoder = Encoder(base, chosen.mask_range, config.prompt, known)
    encoder.timesteps = timesteps
    who = identity(config, chosen, data.fingerprint)
    facts = _facts(config, chosen, base, device) | {"dataset": data.fingerprint, "world_size": place.world_size}
    return Job(encoder, model, data.open, who, write_adapter, facts, costs, recompute)


def _load_base(
    config: TrainConfig, chosen: backbone.ModelConfig, device: torch.device, place: Place, components: Sequence[str]
) -> backbone.Base:
    return backbone.load_base(
        chosen.base,
        chosen.revision,
        chosen.dtype,
        device,
        components=components,
        vae_dtype=chosen.vae_dtype,
        quantize=chosen.quantize,
        # The full weights of swapped blocks need not fit on the device.
        transformer_device="cpu" if config.block_swap and not chosen.quantize else None,
        shared=place.world_size > 1,
        expert=config.expert,
    )


def _build_model(
    config: TrainConfig, chosen: backbone.ModelConfig, base: backbone.Base, device: torch.device
) -> tuple[adapter.Ex4dModel, blocks.Recompute | None]:
    """Return (model on its device, compiled and swapped as configured; its recomputation, None if there is none)."""
    model = adapter.build_model(base.transformer, chosen, seed=config.seed)
    if config.compile:
        blocks.compile_blocks(model.transformer)
    if swap.swap_blocks(model.transformer, config.block_swap, device, alike=config.compile):
        model.to(device)
    auto = config.checkpoint_blocks == "auto"
    count = config.checkpoint_blocks if isinstance(config.checkpoint_blocks, int) else None
    keep = config.checkpoint_keep_attention
    return model, model.set_gradient_checkpointing(config.activation_checkpointing, count, keep, measure=auto)


def _metadata(
    config: TrainConfig, chosen: backbone.ModelConfig, base: backbone.Base, data: Datasets, base_fingerprint: str | None
) -> weights.AdapterMetadata:
    """Return the metadata of the run's adapter files; clip size and length are those of the first dataset."""
    rank, alpha = lora.settings(base.transformer)
    sample = data.facts[0]["sample"]
    return weights.AdapterMetadata(
        base=chosen.base,
        base_revision=base.revision,
        base_fingerprint=base_fingerprint,
        lora_rank=rank,
        lora_alpha=alpha,
        lora_targets=chosen.lora_targets,
        adapter_hidden=chosen.adapter_hidden,
        mask_range=chosen.mask_range,
        source_video=chosen.source_video,
        residual_fp32=chosen.residual_fp32,
        shift=config.shift,
        num_frames=sample["num_frames"],
        size=tuple(sample["size"]),
        dataset_fingerprint=data.fingerprint,
        step=0,
        expert=config.expert,
        prompt=config.prompt or "",
    )


def _facts(
    config: TrainConfig, chosen: backbone.ModelConfig, base: backbone.Base, device: torch.device
) -> dict[str, Any]:
    """Return configuration, versions, dtype and the attention kernel, for the log."""
    facts: dict[str, Any] = without_secrets({"train": configs.to_dict(config), "model": configs.to_dict(chosen)})
    facts["versions"] = configs.installed_versions(PACKAGES)
    with attention.kernel(config.attention):
        head_dim, dtype = base.shape["attention_head_dim"], base.transformer.dtype
        facts["dtype"] = str(dtype).removeprefix("torch.")
        facts["attention"] = attention.kernel_that_runs(device, dtype, head_dim)
    log.info("attention runs in %s", facts["attention"])
    return facts
