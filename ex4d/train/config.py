"""The choices of a training run (YAML section `train`), and what follows from them. Imports nothing of torch."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from ex4d.data.loader import LoaderConfig
from ex4d.errors import ConfigError

# Exit codes of `ex4d train`; 0, 1 and 2 mean what they mean everywhere. 75 is EX_TEMPFAIL of sysexits.h:
# stopped by a signal, a checkpoint is written, run the same command again.
EXIT_PREEMPTED = 75


@dataclass(frozen=True)
class TrainConfig:
    """The choices of one training run.

    Args:
        data: dataset folder or URL that `ex4d preprocess` wrote.
        output: folder of this run: checkpoints/, adapter/, metrics.jsonl. The same command run again goes on there.
        num_steps: optimizer steps in all.
        save_every: a checkpoint after so many steps, and always after the last.
        keep_last: how many checkpoints stay (the best by validation loss stays as well).
        micro_batch_size: samples that one device holds at once.
        grad_accum_steps: micro batches a step. The global batch, micro × accum × processes, is fixed when a run
            starts; a run resumed on another number of processes keeps it and derives its accumulation.
        num_processes: local processes to start; None: one per GPU, or 2 where there is none. A launcher's wins.
        min_processes: Ray Train alone: with fewer than `num_processes`, but at least so many, the run goes on, with the
            same global batch and losses; None: it waits for all.
        launcher: auto: in-process under torchrun, srun or deepspeed, else local processes; ray: Ray Train.
        zero_stage: DeepSpeed ZeRO stage; the losses do not depend on it.
        lr: learning rate after warm-up.
        lr_decay: none, or cosine to a tenth of `lr` at `num_steps`.
        max_grad_norm: gradient clipping by global norm; None: off.
        ema_decay: exponential moving average of the trainables, which the final adapter then holds; None: off.
        shift: shift of the noise schedule (METHOD §6).
        timestep_sampling: a name of flow.TIMESTEP_SAMPLING; it decides the loss weight of a timestep, too.
        hole_weight: weight of latents inside the holes against visible ones.
        condition_dropout: share of samples that see the empty prompt (for classifier-free guidance).
        prompt: one prompt for every clip; None: each clip's own caption.
        activation_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        loader: how samples are fetched: threads, prefetch, cache (data.loader.LoaderConfig).
        cpu_offload: optimizer state in the host's memory (GPU runs).
        block_swap: so many blocks of the frozen base stay in the host's memory and come to the device while they work;
            needs activation_checkpointing.
        validate_every: loss on the validation split, with fixed noise, after so many steps; None: never.
        validate_samples: how many validation samples.
        validate_videos: so many of them are generated with the current adapter, too, and kept as videos, by a process
            of its own (under Ray by an actor), which cannot hold up or end the training; 0: none.
        validate_video_steps: sampling steps of these videos.
        validate_apart: the loss on the validation split comes from that process, too: later, and at no rank's expense.
        validate_device: where that process computes: cpu, or a GPU that no rank uses, as cuda:7 (under Ray: cuda).
        validate_timeout_s: a validation that takes longer is given up.
        wandb_mode: None: online where a key is set, else offline; "disabled": not at all.
        dry_run: say what the run would need on `gpu`, and at `usd_per_gpu_hour`, and stop; nothing is loaded.
    """

    data: str = "out/dataset"
    output: str = "out/train"
    num_steps: int = 1000
    save_every: int = 100
    keep_last: int = 2
    micro_batch_size: int = 1
    grad_accum_steps: int = 1
    num_processes: int | None = None
    min_processes: int | None = None
    launcher: Literal["auto", "ray"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    lr: float = 3e-5
    lr_decay: Literal["none", "cosine"] = "none"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 1.0
    ema_decay: float | None = None
    shift: float = 5.0
    timestep_sampling: Literal["diffsynth", "uniform", "logit_normal"] = "diffsynth"
    hole_weight: float = 1.0
    condition_dropout: float = 0.0
    prompt: str | None = ""
    activation_checkpointing: bool = False
    cpu_offload: bool = False
    block_swap: int = 0
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    log_every: int = 10
    validate_every: int | None = None
    validate_samples: int = 16
    validate_videos: int = 0
    validate_video_steps: int = 8
    validate_apart: bool = False
    validate_device: str = "cpu"
    validate_timeout_s: float = 1800.0
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    wandb_project: str = "ex4d"
    wandb_group: str | None = None
    dry_run: bool = False
    gpu: str = "H200"
    usd_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        def need(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ConfigError(f"train.{name}", getattr(self, name), allowed)

        for name in ("num_steps", "save_every", "keep_last", "micro_batch_size", "grad_accum_steps", "log_every"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("num_processes", "min_processes", "validate_every", "validate_samples", "validate_video_steps"):
            value = getattr(self, name)
            need(value is None or value >= 1, name, "at least 1")
        if self.min_processes is not None:
            need(self.launcher == "ray", "min_processes", "null, save with train.launcher=ray")
            most = self.num_processes or 0
            need(self.min_processes <= most, "min_processes", "at most train.num_processes, which must be given")
        need(0 <= self.validate_videos <= self.validate_samples, "validate_videos", "0 to train.validate_samples")
        for name in ("validate_videos", "validate_apart"):
            need(bool(self.validate_every) or not getattr(self, name), name, "off, where train.validate_every is null")
        need(0 < self.validate_timeout_s < math.inf, "validate_timeout_s", "finite, greater than 0")
        need(not self.cpu_offload or self.zero_stage > 0, "cpu_offload", "false, save with train.zero_stage 1 to 3")
        need(self.block_swap >= 0, "block_swap", "at least 0")
        if self.block_swap:
            need(self.activation_checkpointing, "block_swap", "0, save with train.activation_checkpointing=true")
        need(0 <= self.condition_dropout < 1, "condition_dropout", "in [0, 1)")
        need(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", "in (0, 1), or null for off")
        for name in ("lr", "shift", "hole_weight", "max_grad_norm"):
            value = getattr(self, name)
            need(value is None or 0 < value < math.inf, name, "finite, greater than 0")
        need(0 <= self.weight_decay < math.inf, "weight_decay", "finite, at least 0")
        need(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers in [0, 1)")
        for name in ("seed", "warmup_steps"):
            need(0 <= getattr(self, name) < 2**31, name, "0 to 2147483647")


# What may differ between two starts of one run without changing what is learnt. Everything else is the run's identity.
FREE = frozenset(
    {
        *("data", "output", "num_steps", "save_every", "keep_last", "log_every", "dry_run", "gpu", "usd_per_gpu_hour"),
        *("micro_batch_size", "grad_accum_steps", "num_processes", "launcher", "zero_stage", "device"),
        *("activation_checkpointing", "cpu_offload", "block_swap", "loader"),
        *("validate_every", "validate_samples", "min_processes"),
        *("validate_videos", "validate_video_steps", "validate_apart", "validate_device", "validate_timeout_s"),
        *("wandb_mode", "wandb_project", "wandb_group"),
    }
)


def identity(config: TrainConfig, model: Any, dataset_fingerprint: str) -> dict[str, Any]:
    """Return {dotted name: value} of all that decides what a run learns; equal in every start of one run."""
    chosen = {f"train.{k}": v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    if config.lr_decay != "none":
        chosen["train.num_steps"] = config.num_steps  # the decay ends there
    chosen |= {f"model.{key}": value for key, value in dataclasses.asdict(model).items()}
    chosen["dataset"] = dataset_fingerprint
    return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}


def check_identity(saved: dict[str, Any], now: dict[str, Any], output: str) -> None:
    """Raise ConfigError that names the first setting in which a checkpoint differs from this start."""
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            allowed = (
                f"{output} was started with {saved.get(key)!r}; give back that value, or take another train.output"
            )
            raise ConfigError(key, now.get(key), allowed)


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is cut: world_size × accum_steps micro batches of micro_size samples."""

    global_size: int
    micro_size: int
    accum_steps: int
    world_size: int


def plan_batch(config: TrainConfig, world_size: int, global_size: int | None = None) -> BatchPlan:
    """Return the cut of a global batch over `world_size` processes.

    Args:
        global_size: of the checkpoint that goes on; None: of a new run, micro × accum × processes.

    Raises:
        ConfigError: the processes do not divide the batch.
    """
    if global_size is None:
        # An elastic run that starts small has the batch of its full size, or its curve would depend on the hour.
        processes = config.num_processes if config.min_processes and config.num_processes else world_size
        global_size = config.micro_batch_size * config.grad_accum_steps * processes
    if global_size % world_size:
        allowed = f"a divisor of the run's global batch of {global_size} samples"
        raise ConfigError("train.num_processes", world_size, allowed)
    per_rank = global_size // world_size
    accum = next(n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= config.micro_batch_size)
    return BatchPlan(global_size, per_rank // accum, accum, world_size)


def usable_ranks(config: TrainConfig, world_size: int, global_size: int | None = None) -> int:
    """Return how many of `world_size` processes an elastic run can use: the most that divide its global batch.

    Args:
        global_size: as in plan_batch.
    """
    batch = global_size or plan_batch(config, 1).global_size
    return next(count for count in range(world_size, 0, -1) if batch % count == 0)


@dataclass(frozen=True)
class Place:
    """Where this process stands among all: rank of world_size, and its number on this machine."""

    rank: int
    world_size: int
    local_rank: int


def place_from_environment(environment: dict[str, str] | None = None) -> Place | None:
    """Return this process's place as torchrun, deepspeed, Ray Train or srun state it; None outside any of them."""
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
    # A batch script itself has SLURM_PROCID=0 too; only a step that srun starts has a step id, and a shell in such a
    # step (`srun --pty bash`) no address of a master.
    if all(name in env for name in ("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR")):
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0)))
    return None
