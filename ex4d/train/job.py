"""What a run trains, and on what: base, model, data and the way out, built from the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ex4d import config as configs
from ex4d.data import latents, loader, manifest
from ex4d.data.texts import TextStore
from ex4d.data.verify import dataset_fingerprint
from ex4d.errors import ConfigError, ContractError
from ex4d.models import adapter, attention, backbone, blocks, encoders, fingerprints, lora, swap, warm_start, weights
from ex4d.redact import without_secrets
from ex4d.train import checkpoint, flops
from ex4d.train.config import Place, TrainConfig, identity
from ex4d.train.objective import Encoder, LatentEncoder

log = logging.getLogger(__name__)

PACKAGES = ("ex4d-platform", "torch", "deepspeed", "diffusers", "transformers", "peft", "numpy")


@dataclass(frozen=True)
class Job:
    """What a run trains, and on what.

    Args:
        encoder: turns a batch of clips into the model's inputs.
        model: frozen base and trainables in one module, on its device; `trainable_parameters()` names them.
        open_loader: (split, samples consumed, micro batch size) -> endless micro batches of this rank, with `close()`.
        identity: what decides what the run learns (config.identity).
        write_adapter: (folder, {name: float32 CPU tensor}, step) writes what `ex4d generate --adapter` takes.
        facts: configuration and versions, for the log.
        cost: FLOPs and tokens of one sample; None where they are not known.
        recompute: which blocks recompute their activations; None where none do.
    """

    encoder: Encoder
    model: nn.Module
    open_loader: Callable[[str, int, int], Any]
    identity: dict[str, Any]
    write_adapter: Callable[[Path, Mapping[str, Tensor], int], Any]
    facts: dict[str, Any]
    cost: flops.Cost | None = None
    recompute: blocks.Recompute | None = None


def run_identity(config: TrainConfig, model_config: backbone.ModelConfig) -> dict[str, Any]:
    """Return what decides what a run learns: see config.identity."""
    return identity(config, model_config, dataset_fingerprint(config.data))


def build_job(config: TrainConfig, model_config: backbone.ModelConfig, place: Place, device: torch.device) -> Job:
    """Return the job of a configuration, with the base loaded to `device`.

    Raises:
        ConfigError: a base that is not there, or that cannot take these clips; a mask range or a prompt that a latent
            dataset was not encoded with; a source video that the dataset does not hold.
        ContractError: no finished dataset, or latents of another model.
    """
    chosen = model_config
    dataset = manifest.read_dataset(config.data)
    if chosen.source_video and not loader.has_source(dataset):
        # A clip that is its own source would only be copied.
        allowed = f"false: {config.data} has no clips from two cameras; see preprocess.members: [source]"
        raise ConfigError("model.source_video", True, allowed)
    sample = dataset["sample"]
    fingerprint = dataset_fingerprint(config.data)
    start = None
    if config.init_from and checkpoint.latest(config.output) is None:
        start = warm_start.read(config.init_from, chosen)
    if chosen.family is not None:
        backbone.transformer_config(chosen.base, chosen.revision, chosen.family)  # refuses another before loading it
    texts = _check_latents(config, chosen, dataset, place) if "latents" in dataset else None
    base = backbone.load_base(
        chosen.base,
        chosen.revision,
        chosen.dtype,
        device,
        components=("transformer",) if texts else backbone.COMPONENTS,
        vae_dtype=chosen.vae_dtype,
        quantize=chosen.quantize,
        # Full weights that are to be swapped need not fit on the device.
        transformer_device="cpu" if config.block_swap and not chosen.quantize else None,
    )
    if texts:
        *_, depth, height, width = dataset["latents"]["shape"]
    else:
        *_, depth, height, width = base.latent_shape((sample["num_frames"], *sample["size"], 3))
    sizes = (chosen.lora_rank, chosen.adapter_hidden, chosen.source_video)
    cost = flops.cost(base.shape, (depth, height, width), *sizes)
    model = adapter.build_model(base.transformer, chosen, seed=config.seed)
    if config.compile:
        blocks.compile_blocks(model.transformer)
    if swap.swap_blocks(model.transformer, config.block_swap, device, alike=config.compile):
        model.to(device)
    auto = config.checkpoint_blocks == "auto"
    count = config.checkpoint_blocks if isinstance(config.checkpoint_blocks, int) else None
    keep = config.checkpoint_keep_attention
    recompute = model.set_gradient_checkpointing(config.activation_checkpointing, count, keep, measure=auto)
    base_fingerprint = encoders.base_fingerprint(base.transformer)
    if start:
        start.fill(model, base_fingerprint)
    rank, alpha = lora.settings(model.transformer)

    def write_adapter(folder: Path, tensors: Mapping[str, Tensor], step: int) -> Path:
        facts = weights.AdapterMetadata(
            base=chosen.base,
            base_revision=base.revision,
            base_fingerprint=base_fingerprint,
            lora_rank=rank,
            lora_alpha=alpha,
            adapter_hidden=chosen.adapter_hidden,
            mask_range=chosen.mask_range,
            source_video=chosen.source_video,
            shift=config.shift,
            num_frames=sample["num_frames"],
            size=tuple(sample["size"]),
            dataset_fingerprint=fingerprint,
            step=step,
        )
        return weights.save_adapter(folder, tensors, facts)

    def open_loader(split: str, samples: int, micro_batch_size: int) -> loader.ShardLoader:
        ranks = (place.rank, place.world_size)
        decode = None
        if texts and config.prompt is None:
            decode = _with_texts(texts, loader.decoder_of(dataset, chosen.source_video))
        # Validation clips and their masks are the same in every run.
        where = (config.data, split, micro_batch_size, config.seed if split == "train" else 0)
        source = chosen.source_video
        return loader.ShardLoader(*where, *ranks, samples, config.loader, decode, with_source=source)

    who = identity(config, chosen, fingerprint)
    facts: dict[str, Any] = without_secrets({"train": configs.to_dict(config), "model": configs.to_dict(chosen)})
    facts["versions"] = configs.installed_versions(PACKAGES)
    facts |= {"dataset": fingerprint, "world_size": place.world_size}
    with attention.kernel(config.attention):
        head_dim, dtype = base.shape["attention_head_dim"], base.transformer.dtype
        facts["dtype"] = str(dtype).removeprefix("torch.")
        facts["attention"] = attention.kernel_that_runs(device, dtype, head_dim)
    log.info("attention runs in %s", facts["attention"])
    if texts:
        encoder: Encoder = LatentEncoder(base, texts, config.prompt)
    else:
        encoder = Encoder(base, chosen.mask_range, config.prompt)
        encoder.release_text_encoder()
    return Job(encoder, model, open_loader, who, write_adapter, facts, cost, recompute)


def _check_latents(
    config: TrainConfig, chosen: backbone.ModelConfig, dataset: Mapping[str, Any], place: Place
) -> TextStore:
    """Return the prompt embeddings of a latent dataset that was made for this model; see build_job for the errors."""
    facts = dataset["latents"]
    latents.LatentSpec.of(dataset)
    if facts["mask_range"] != chosen.mask_range:
        allowed = f"{facts['mask_range']!r}, with which the latents of {config.data} were encoded"
        raise ConfigError("model.mask_range", chosen.mask_range, allowed)
    # Gigabytes may have to be read for it, so one rank does.
    ours = fingerprints.of_components(chosen.base, chosen.revision) if place.rank == 0 else {}
    for component, theirs in facts["models"].items():
        if ours.get(component, theirs) != theirs:
            raise ContractError(
                f"{config.data}: its latents are of another model: their {component} is {theirs} "
                f"({facts['base']}), that of model.base={chosen.base} is {ours[component]}"
            )
    texts = TextStore(config.data, dataset)
    if config.prompt is not None and config.prompt not in texts:
        raise ConfigError("train.prompt", config.prompt, f"a text that {config.data} holds; see encode.prompts")
    if config.prompt is None and not facts["captions"]:
        raise ConfigError("train.prompt", None, f"a text: {config.data} was encoded with encode.captions=false")
    return texts


def _with_texts(texts: TextStore, decode_latents: loader.Decode) -> loader.Decode:
    """Return decode_latents that reads the caption's embeddings ahead, too, in the loader's thread."""

    def decode(members: Mapping[str, bytes], draw: loader.Draw) -> dict[str, Any]:
        values = decode_latents(members, draw)
        texts.embeds(values["captions"])
        return values

    return decode
