"""Settings of a training run (YAML section `train`), and what follows from them. Does not import torch."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ex4d.config import checked, setting
from ex4d.data.loader import LoaderConfig
from ex4d.errors import ConfigError

# Exit code of `ex4d train`, besides the usual 0, 1 and 2. 75 is EX_TEMPFAIL of sysexits.h: stopped by a signal after
# writing a checkpoint; run the same command again.
EXIT_PREEMPTED = 75


@dataclass(frozen=True)
class WeightedData:
    """One of several datasets."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str = setting("", "Dataset folder or URL.", not_empty=True)
    weight: float = setting(1.0, "Steps that take their samples from it, relative to the other datasets.", gt=0)

    def __post_init__(self) -> None:
        checked(self, "train.data")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run."""

    data: str | tuple[WeightedData, ...] = setting(
        "out/dataset",
        "Folder or URL of a dataset (from `ex4d preprocess` or `ex4d encode`), or a list of {path, weight}: each step "
        "uses one dataset, in turn by weight.",
        not_empty=True,
    )
    output: str = setting("out/train", "Folder of this run; run the same command again to resume.")
    num_steps: int = setting(1000, "Number of optimizer steps.", ge=1)
    micro_batch_size: int = setting(1, "Samples that one device processes at once.", ge=1)
    grad_accum_steps: int = setting(
        1, "Micro batches per step. The global batch size is micro_batch_size × this × processes; a run keeps it.", ge=1
    )
    global_batch_size: int | None = setting(
        None,
        "Samples per step over all processes; it determines grad_accum_steps. null: computed from grad_accum_steps.",
        ge=1,
    )
    init_from: str | None = setting(
        None, "Start from the weights of this adapter: a folder or file of `ex4d train`, or the released ex4d.ckpt."
    )
    num_processes: int | None = setting(
        None,
        "Local processes to start; null: one per GPU, or 2 without a GPU. A launcher's number takes precedence.",
        ge=1,
    )
    lr: float = setting(3e-5, "Learning rate after warm-up.", gt=0)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Device to train on; auto: a GPU if there is one.")
    seed: int = setting(0, "Seed of all random choices.", ge=0, le=2**31 - 1)
    save_every: int = setting(100, "Write a checkpoint every N steps, and after the last.", ge=1)
    keep_last: int = setting(2, "Number of newest checkpoints to keep; the best by validation loss is kept too.", ge=1)
    log_every: int = setting(10, "Print the loss every N steps.", ge=1)

    lr_geometry: float | None = setting(
        None, "Learning rate of the geometry adapter; null: lr, as for the LoRA.", gt=0, group="Optimisation"
    )
    lr_decay: Literal["none", "linear", "cosine"] = setting(
        "none", "Learning rate after warm-up: constant, or linear or cosine down to lr / 10 at num_steps."
    )
    warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.", ge=0, le=2**31 - 1)
    weight_decay: float = setting(0.01, "Weight decay of AdamW.", ge=0)
    betas: tuple[float, float] = setting((0.9, 0.999), "Betas of AdamW.", ge=0, lt=1)
    max_grad_norm: float | None = setting(1.0, "Clip gradients to this global norm; null: do not clip.", gt=0)
    ema_decay: float | None = setting(
        None, "Decay of a moving average of the weights, which the final adapter then holds; null: off.", gt=0, lt=1
    )

    shift: float = setting(5.0, "Shift of the noise schedule.", gt=0, group="Objective")
    timestep_sampling: Literal["diffsynth", "uniform", "logit_normal"] = setting(
        "diffsynth", "How timesteps are drawn and weighted; see docs/method.md."
    )
    expert: Literal["high", "low"] | None = setting(
        None,
        "Expert to train of a base with two (Wan2.2-A14B): high, for noise levels from the base's boundary up, or low, "
        "for those below; null: it has one.",
    )
    hole_weight: float = setting(1.0, "Loss weight of latents inside holes, relative to visible ones.", gt=0)
    condition_dropout: float = setting(
        0.0, "Fraction of samples trained with an empty prompt, for classifier-free guidance.", ge=0, lt=1
    )
    prompt: str | None = setting("", "One prompt for every clip; null: each clip's own caption.")

    activation_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, about a third more time.", group="Memory"
    )
    checkpoint_blocks: int | Literal["auto"] | None = setting(
        None, "Recompute only N blocks; auto: after the first step, as few as the GPU's memory allows; null: all."
    )
    checkpoint_keep_attention: bool = setting(False, "Keep the outputs of self-attention instead of recomputing them.")
    compile: bool = setting(False, "Compile the blocks: faster steps, but the first one takes about a minute.")
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = setting(
        "auto", "Attention kernel; auto: PyTorch chooses. The log names the kernel that runs."
    )
    cpu_offload: bool = setting(False, "Keep optimizer state in CPU memory (GPU runs).")
    block_swap: int = setting(
        0, "Keep N blocks of the frozen base in CPU memory and copy each to the GPU when it runs.", ge=0
    )

    launcher: Literal["auto", "ray"] = setting(
        "auto",
        "auto: torchrun, srun or deepspeed if one of them started this process, else local processes; ray: Ray Train.",
        group="Processes",
    )
    min_processes: int | None = setting(
        None, "With Ray Train, keep training with as few as this many processes; null: wait for all.", ge=1
    )
    zero_stage: Literal[0, 1, 2, 3] = setting(2, "DeepSpeed ZeRO stage; losses do not depend on it.")
    deepspeed: dict[str, Any] = setting(
        {}, "Extra keys for DeepSpeed's configuration; keys that the trainer sets are refused."
    )
    loader: LoaderConfig = setting(LoaderConfig(), "How samples are fetched.")

    validate_every: int | None = setting(
        None, "Compute the validation loss, with fixed noise, every N steps; null: never.", ge=1, group="Validation"
    )
    validate_samples: int = setting(16, "Number of validation samples.", ge=1)
    validate_videos: int = setting(0, "Also generate this many of them as videos, in a separate process.", ge=0)
    validate_video_steps: int = setting(8, "Sampling steps of these videos.", ge=1)
    validate_apart: bool = setting(
        False, "Compute the validation loss in the separate process too: later, but the ranks do not wait."
    )
    validate_device: str = setting(
        "cpu", "Device of the separate process: cpu, or a GPU that no rank uses, e.g. cuda:7 (under Ray: cuda)."
    )
    validate_timeout_s: float = setting(1800.0, "Abandon a validation that takes longer than this.", gt=0)

    wandb_mode: Literal["online", "offline", "disabled"] | None = setting(
        None, "Weights & Biases mode; null: online where an API key is set, else offline.", group="Logging"
    )
    wandb_project: str = setting("ex4d", "Weights & Biases project.")
    wandb_group: str | None = setting(None, "Weights & Biases group.")
    metrics_port: int | None = setting(
        None, "Serve Prometheus metrics of rank 0 on this port while the run lasts; null: off.", ge=1, le=65535
    )
    metrics_host: str = setting(
        "127.0.0.1", "Address of that port; for a Prometheus on another machine, the node's address, or 0.0.0.0."
    )

    dry_run: bool = setting(
        False, "Print the memory, time and cost that the run needs, then exit; no weights are loaded.", group="Dry run"
    )
    gpu: str = setting("H200", "GPU to estimate for.")
    usd_per_gpu_hour: float | None = setting(None, "Price to estimate with; null: no cost is printed.", ge=0)

    def __post_init__(self) -> None:
        need = checked(self, "train")
        if self.min_processes is not None:
            need(self.launcher == "ray", "min_processes", "must be null unless train.launcher=ray")
            allowed = "must be at most train.num_processes, which must be set"
            need(self.min_processes <= (self.num_processes or 0), "min_processes", allowed)
        need(self.validate_videos <= self.validate_samples, "validate_videos", "must be at most train.validate_samples")
        for name in ("validate_videos", "validate_apart"):
            off = "must be off (0 or false) unless train.validate_every is set"
            need(bool(self.validate_every) or not getattr(self, name), name, off)
        need(
            not self.cpu_offload or self.zero_stage > 0,
            "cpu_offload",
            "must be false unless train.zero_stage is 1 to 3",
        )
        derived = self.grad_accum_steps == 1 or self.global_batch_size is None
        need(derived, "grad_accum_steps", "must be left out with train.global_batch_size, which determines it")
        swappable = self.activation_checkpointing or not self.block_swap
        need(swappable, "block_swap", "must be 0 unless train.activation_checkpointing=true")
        if not self.activation_checkpointing:
            unless = "unless train.activation_checkpointing=true"
            need(self.checkpoint_blocks is None, "checkpoint_blocks", f"must be null {unless}")
            need(not self.checkpoint_keep_attention, "checkpoint_keep_attention", f"must be false {unless}")
        if isinstance(self.checkpoint_blocks, int):
            need(self.checkpoint_blocks >= 0, "checkpoint_blocks", "must be at least 0, auto, or null for all")
        # Swapped blocks that keep their activations would also keep their fetched weights.
        together = self.checkpoint_blocks is None or not self.block_swap
        need(together, "checkpoint_blocks", "must be null with train.block_swap")
        need(not (self.compile and self.zero_stage == 3), "compile", "must be false with train.zero_stage=3")

        auto = self.checkpoint_blocks == "auto" and len({data.path for data in self.datasets}) > 1
        need(not auto, "checkpoint_blocks", "must be a number or null with several datasets, whose clips may differ")

    @property
    def datasets(self) -> tuple[WeightedData, ...]:
        """The datasets with their weights; a single one has the weight 1."""
        return (WeightedData(self.data),) if isinstance(self.data, str) else self.data

    def absolute(self) -> TrainConfig:
        """Return the settings with absolute paths for data and output; URLs are kept."""

        def place(path: str) -> str:
            return path if "://" in path else str(Path(path).resolve())

        many = self.data if isinstance(self.data, tuple) else ()
        data = tuple(dataclasses.replace(one, path=place(one.path)) for one in many) or place(str(self.data))
        return dataclasses.replace(self, data=data, output=place(self.output))

    def recomputed_blocks(self, num_blocks: int) -> int:
        """Return how many of the blocks recompute their activations; for "auto", all of them."""
        if not self.activation_checkpointing:
            return 0
        return self.checkpoint_blocks if isinstance(self.checkpoint_blocks, int) else num_blocks


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided: world_size × accum_steps micro batches of micro_size samples."""

    global_size: int
    micro_size: int
    accum_steps: int
    world_size: int


def plan_batch(config: TrainConfig, world_size: int, global_size: int | None = None) -> BatchPlan:
    """Divide a global batch over `world_size` processes.

    Args:
        global_size: that of the checkpoint to resume; None: a new run, which uses global_batch_size or, if that is
            null, micro × accum × processes.

    Raises:
        ConfigError: the number of processes does not divide the batch, or the resumed run has another batch size.
    """
    requested = config.global_batch_size
    if global_size is None and requested is not None:
        full = config.num_processes if config.min_processes and config.num_processes else world_size
        if requested % (config.micro_batch_size * full):
            allowed = f"must be a multiple of micro_batch_size × processes, {config.micro_batch_size} × {full}"
            raise ConfigError("train.global_batch_size", requested, allowed)
        global_size = requested
    if global_size is not None and requested not in (None, global_size):
        allowed = f"must be {global_size}, the global batch that this run was started with, or null"
        raise ConfigError("train.global_batch_size", requested, allowed)
    if global_size is None:
        # An elastic run that starts with few processes uses the batch of its full number, so that its losses do not
        # depend on how many nodes were free.
        processes = config.num_processes if config.min_processes and config.num_processes else world_size
        global_size = config.micro_batch_size * config.grad_accum_steps * processes
    if global_size % world_size:
        allowed = f"must divide the run's global batch of {global_size} samples"
        raise ConfigError("train.num_processes", world_size, allowed)
    per_rank = global_size // world_size
    accum = next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= config.micro_batch_size)
    return BatchPlan(global_size, per_rank // accum, accum, world_size)


def usable_ranks(config: TrainConfig, world_size: int, global_size: int | None = None) -> int:
    """Return how many of `world_size` processes an elastic run can use: the largest divisor of its global batch.

    Args:
        global_size: as in plan_batch.
    """
    batch = global_size or plan_batch(config, 1).global_size
    return next(count for count in range(world_size, 0, -1) if batch % count == 0)


@dataclass(frozen=True)
class Place:
    """The position of this process: its rank of world_size, and its local rank on this machine."""

    rank: int
    world_size: int
    local_rank: int


def place_from_environment(environment: dict[str, str] | None = None) -> Place | None:
    """Return this process's place from the variables of torchrun, deepspeed, Ray Train or srun; None if there are none.

    Raises:
        ConfigError: RANK or WORLD_SIZE is not a number, or the rank is outside the world.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        stated = [env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK", "0")]
        if not all(number.isdecimal() for number in stated) or int(stated[0]) >= int(stated[1]):
            left_over = "must be numbers from a launcher; unset RANK and WORLD_SIZE to start without one"
            raise ConfigError("RANK", f"{stated[0]} of WORLD_SIZE={stated[1]}", left_over)
        return Place(*map(int, stated))
    # A batch script itself has SLURM_PROCID=0 too, but only a step that srun starts has a step id; and a shell in such
    # a step (`srun --pty bash`) has no MASTER_ADDR.
    if all(name in env for name in ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR")):
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0)))
    return None
