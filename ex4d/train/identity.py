"""Determine which settings decide what a run learns; these must not change when it resumes."""

from __future__ import annotations

import dataclasses
from typing import Any

from ex4d.errors import ConfigError
from ex4d.models.backbone import ModelConfig
from ex4d.train.config import TrainConfig

# Settings that may differ between two starts of one run without changing what it learns; all others are its identity.
FREE = frozenset(
    {
        *("data", "output", "num_steps", "save_every", "keep_last", "log_every", "dry_run", "gpu", "usd_per_gpu_hour"),
        *("micro_batch_size", "grad_accum_steps", "global_batch_size", "deepspeed"),
        *("num_processes", "launcher", "zero_stage", "device"),
        *("activation_checkpointing", "checkpoint_blocks", "checkpoint_keep_attention", "compile", "attention"),
        *("cpu_offload", "block_swap", "loader"),
        *("validate_every", "validate_samples", "min_processes"),
        *("validate_videos", "validate_video_steps", "validate_apart", "validate_device", "validate_timeout_s"),
        *("wandb_mode", "wandb_project", "wandb_group", "metrics_port", "metrics_host"),
    }
)


def identity(config: TrainConfig, model: Any, dataset_fingerprint: str) -> dict[str, Any]:
    """Return {dotted name: value} of all settings that decide what a run learns; equal at every start of a run."""
    chosen = {f"train.{k}": v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    if config.lr_decay != "none":
        chosen["train.num_steps"] = config.num_steps  # the learning rate's decay ends at this step
    chosen |= {f"model.{key}": value for key, value in dataclasses.asdict(model).items()}
    chosen["dataset"] = dataset_fingerprint
    return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}


def check_identity(saved: dict[str, Any], now: dict[str, Any], output: str) -> None:
    """Raise ConfigError, which names the first setting, if one of the checkpoint differs from that of this start.

    A setting that the checkpoint lacks is newer than the run, which therefore used its default.
    """
    known = identity(TrainConfig(), ModelConfig(), "") | saved
    for key in sorted(saved.keys() | now.keys()):
        if known.get(key) != now.get(key):
            allowed = f"{output} was started with {known.get(key)!r}; use that value, or another train.output"
            raise ConfigError(key, now.get(key), allowed)
