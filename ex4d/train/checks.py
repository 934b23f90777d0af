"""Reject impossible training settings before anything is started."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ex4d.data import manifest
from ex4d.errors import ConfigError
from ex4d.train.config import TrainConfig

if TYPE_CHECKING:
    from ex4d.models.backbone import ModelConfig

WANDB_MODES = ("online", "offline", "disabled", "dryrun", "shared", "run")  # values of W&B's own variable


def check_run(train: TrainConfig, model: ModelConfig, num_processes: int) -> None:
    """Check that this machine can execute the run.

    Args:
        num_processes: ranks on this machine.

    Raises:
        ConfigError, ContractError: as in `check_settings`; or a GPU is missing, the device for validation is missing
            or used by a rank, or the base does not have the expert.
    """
    check_settings(train, model)
    apart = train.validate_apart or train.validate_videos
    if train.launcher == "ray":  # the GPUs are on other machines
        if apart and train.validate_device not in ("cpu", "cuda", "cuda:0"):  # its actor sees one GPU, as number 0
            allowed = "must be cpu or, under Ray, cuda: Ray chooses the GPU"
            raise ConfigError("train.validate_device", train.validate_device, allowed)
        return
    import torch

    from ex4d.models import experts

    gpus = torch.cuda.device_count()
    if train.device == "cuda" and not gpus:
        raise ConfigError("train.device", "cuda", "must be cpu or auto: PyTorch finds no GPU on this machine")
    if apart:
        ranks_gpus = min(num_processes, gpus) if train.device != "cpu" else 0
        free = ["cpu", *(f"cuda:{index}" for index in range(ranks_gpus, gpus))]
        if train.validate_device not in free:
            ranks = f"; ranks use cuda:0 to cuda:{ranks_gpus - 1}" if ranks_gpus else ""
            raise ConfigError("train.validate_device", train.validate_device, ", ".join(free) + ranks)
    experts.timesteps(model.base, model.revision, train.expert)


def check_settings(train: TrainConfig, model: ModelConfig) -> None:
    """Check the settings that do not depend on the machine that trains.

    Raises:
        ConfigError: an unknown W&B mode; float16, whose gradients underflow; validation without validation samples.
        ContractError: a dataset is not finished.
    """
    mode = os.environ.get("WANDB_MODE")
    if train.wandb_mode != "disabled" and mode not in (None, *WANDB_MODES):
        raise ConfigError("WANDB_MODE", mode, f"one of {', '.join(WANDB_MODES)}; or unset it and set train.wandb_mode")
    if model.dtype == "float16":
        allowed = "must be bfloat16 or float32 in training: small gradients become zero in float16"
        raise ConfigError("model.dtype", model.dtype, allowed)
    if train.validate_every:
        counts = [manifest.read_dataset(data.path)["counts"] for data in train.datasets]
        if not any(count["samples_val"] for count in counts):
            paths = ", ".join(data.path for data in train.datasets)
            allowed = f"must be null, since {paths} has no validation samples; set preprocess.val_fraction to get some"
            raise ConfigError("train.validate_every", train.validate_every, allowed)
