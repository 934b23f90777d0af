"""Wrap DeepSpeed, in the only module that uses it: start, step, and move full weights and optimizer state in and out.

Differences from DeepSpeed's defaults (measurements in docs/decisions/training.md):
the `bf16` block casts everything, float32 adapters included, so it is not used and dtypes are checked after init;
the shared-memory op takes minutes to compile on a CPU, so no op counts as compatible; DeepSpeed's checkpoints are bound
to one world size, so state is gathered parameter by parameter into plain tensors instead.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ex4d.errors import ContractError
from ex4d.train import interface, rendezvous, waits
from ex4d.train.config import BatchPlan, Place, TrainConfig
from ex4d.train.deepspeed_config import deepspeed_config

MOMENTS = ("exp_avg", "exp_avg_sq")


def start(place: Place, device: str) -> torch.device:
    """Join the process group (gloo on a CPU, nccl on GPUs) and return this process's device.

    MASTER_ADDR and MASTER_PORT must be set. Raises what torch.distributed raises if the other ranks do not join.
    """
    # DeepSpeed calls collectives by names that torch has deprecated; a warning per step and rank would flood the log.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    # If the launcher shows each rank only its own GPU, that GPU is number 0 on every rank.
    number = 0 if on_gpu and torch.cuda.device_count() == 1 else place.local_rank
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(number))
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" not in os.environ:  # ranks that all use every core are ten times slower
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", place.world_size))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    deepspeed = _deepspeed()
    if on_gpu:
        torch.cuda.set_device(number)
    name = interface.towards_master()
    if name is not None:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, name)
    backend = "nccl" if on_gpu else "gloo"
    deepspeed.init_distributed(
        backend,
        auto_mpi_discovery=False,
        timeout=datetime.timedelta(minutes=30),
        verbose=False,
        init_method=rendezvous.init_method(),
    )
    waits.time_collectives(deepspeed.comm.comm.cdb, on_gpu)
    return torch.device("cuda", number) if on_gpu else torch.device("cpu")


def stop() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def agreed(path: Path | None, output: str) -> Path | None:
    """Return rank 0's checkpoint on every rank; on a shared file system ranks may briefly see different ones.

    Raises:
        ContractError: this rank cannot see that checkpoint.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return path
    of_rank0 = [None if path is None else str(path.relative_to(output))]
    torch.distributed.broadcast_object_list(of_rank0, src=0)
    if of_rank0[0] is None:
        return None
    theirs = Path(output) / of_rank0[0]
    if not theirs.is_dir():
        raise ContractError(f"{theirs}: missing here, but rank 0 resumes from it; put train.output on one file system")
    return theirs


def _deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The shared-memory op would be built with ninja for minutes. Reading the table would make DeepSpeed try each of its
    # ops: on a GPU machine a compiler or two in every rank, and a warning for each op where there is no nvcc.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


class Engine:
    """A model under DeepSpeed. Call `forward` and `backward` for each micro batch, then `step` once.

    Args:
        model: frozen base and trainable parameters in one module, on its device, with the initial weights loaded.
        config, plan: the run's settings, and how its global batch is divided.
        moments: {"exp_avg.NAME": float32 tensor, "exp_avg_sq.NAME": …} of a checkpoint, with the `step` they belong
            to; None for a new run.

    Raises:
        ContractError: DeepSpeed changed the dtype of a parameter, or the moments do not match the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        plan: BatchPlan,
        moments: dict[str, Tensor] | None = None,
        step: int = 0,
    ):
        self.model, self.zero_stage, self.optimizer_step = model, config.zero_stage, step
        self.trainables: dict[str, nn.Parameter] = model.trainable_parameters()  # type: ignore[operator]
        self.shapes = {name: p.shape for name, p in self.trainables.items()}
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        groups = [{"params": list(self.trainables.values())}]
        self.lr_ratios = [1.0]
        if config.lr_geometry is not None:
            geometry = {name: value for name, value in self.trainables.items() if name.startswith("geometry_adapter.")}
            rest = [value for name, value in self.trainables.items() if name not in geometry]
            groups = [{"params": rest}, {"params": list(geometry.values())}]
            self.lr_ratios = [1.0, config.lr_geometry / config.lr]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        self.engine, *_ = _deepspeed().initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(config, plan)
        )
        self._has_early_state = False  # before the first step
        self._audit(dtypes)
        self._watch_gradients()
        if moments is not None:
            self._restore(moments, step)
        elif len(groups) > 1:
            # DeepSpeed's stages 1 and 2 link the optimizer's state after the first group's step and miss other groups.
            self._make_state(0)

    def _audit(self, before: dict[str, torch.dtype]) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != before[name]:
                raise ContractError(f"DeepSpeed turned {name} from {before[name]} into {parameter.dtype}")
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise ContractError(f"trainable {name} is {parameter.dtype}; trainables are float32")

    def _watch_gradients(self) -> None:
        # A running sum that becomes NaN with the first non-finite gradient. Stages 2 and 3 reduce and free gradients
        # during the backward pass, so that they cannot be checked afterwards.
        device = next(iter(self.trainables.values())).device
        self._poison = torch.zeros((), device=device)

        def watch(gradient: Tensor) -> None:
            self._poison += gradient.detach().sum().float() * 0

        for parameter in self.trainables.values():
            parameter.register_hook(watch)

    def forward(self, *inputs: Any) -> Tensor:
        """Return the model's output."""
        return self.engine(*inputs)

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""
        self.engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro batch's mean loss; the last one of a step also reduces them."""
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro batch

    def gradients_finite(self) -> bool:
        """Return whether every gradient that this rank computed since the last call was finite."""
        finite = bool(torch.isfinite(self._poison))
        self._poison.zero_()
        return finite

    def step(self, lr: float) -> float:
        """Apply the optimizer at learning rate `lr`; return the global gradient norm before clipping."""
        for group, ratio in zip(self.engine.optimizer.param_groups, self.lr_ratios, strict=True):
            group["lr"] = lr * ratio
        norm = None
        if self.zero_stage == 0:  # the plain optimizer keeps no norm
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainables.values() if p.grad is not None])
        self.engine.step()
        self.optimizer_step += 1
        return float(self.engine.get_global_grad_norm() if norm is None else norm)

    @contextmanager
    def full_weights(self) -> Iterator[nn.Module]:
        """Yield the model with unsharded trainable parameters on every rank. Every rank must enter."""
        if self.zero_stage < 3:
            yield self.model
            return
        with _deepspeed().zero.GatheredParameters(list(self.trainables.values())):
            yield self.model

    def weights(self) -> dict[str, Tensor]:
        """Return {name: full float32 tensor on the CPU} of the trainable parameters. A collective call."""
        with self.full_weights():
            return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in self.trainables.items()}

    def moments(self, keep: bool = True) -> dict[str, Tensor]:
        """Return {"exp_avg.NAME" and "exp_avg_sq.NAME": full float32 tensor on the CPU}. A collective call.

        Args:
            keep: False on ranks that do not need the result and only participate.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        gathered = {}
        for name, parameter in self.trainables.items():
            for key in MOMENTS:
                if self.zero_stage == 0:
                    full = self.engine.optimizer.state[parameter][key]
                else:
                    full = safe_get_full_optimizer_state(parameter, key)
                if keep:
                    gathered[f"{key}.{name}"] = full.detach().to("cpu", torch.float32, copy=True)
        return gathered

    def state_bytes(self) -> int:
        """Return the bytes of optimizer state on the GPU that the first step made; 0 where it was made before."""
        if self._has_early_state:
            return 0
        values = [value for state in self._optimizer().state.values() for value in state.values()]
        return sum(value.nbytes for value in values if value.device.type == "cuda")

    def _optimizer(self) -> Any:
        """Return torch's optimizer, without what a ZeRO stage wraps around it."""
        return self.engine.optimizer if self.zero_stage == 0 else self.engine.optimizer.optimizer

    def _restore(self, moments: dict[str, Tensor], step: int) -> None:
        """Fill the optimizer, before its first step, so that it continues with step + 1 of the saved run."""
        expected = {f"{key}.{name}": shape for name, shape in self.shapes.items() for key in MOMENTS}
        if {name: tensor.shape for name, tensor in moments.items()} != expected:
            raise ContractError("the optimizer state of the checkpoint belongs to another model")
        self._make_state(step)
        for name, parameter in self.trainables.items():
            for key in MOMENTS:
                self._set_moment(parameter, key, moments[f"{key}.{name}"])

    def _make_state(self, step: int) -> None:
        """Give the optimizer, before its first step, the state of `step` with moments of zero."""
        optimizer, inner = self.engine.optimizer, self._optimizer()
        self._has_early_state = True
        for flat in self._flat_parameters():
            # AdamW creates exactly this state at its first step; creating it now lets `_restore` fill the moments.
            inner.state[flat] = {
                "step": torch.tensor(float(step)),
                **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS},
            }
        if self.zero_stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_parameters(self) -> list[Tensor]:
        optimizer = self.engine.optimizer
        if self.zero_stage == 0:
            return list(self.trainables.values())
        return (
            optimizer.fp32_partitioned_groups_flat
            if self.zero_stage == 3
            else optimizer.single_partition_of_fp32_groups
        )

    def _set_moment(self, parameter: Tensor, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage == 0:
            self.engine.optimizer.state[parameter][key].copy_(value)
        elif self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)
        else:
            # Stage 3's full setter fails unless the ranks divide a parameter's size; the local one accepts padding.
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.zeros(size * torch.distributed.get_world_size())
            padded[: value.numel()] = value.flatten()
            rank = torch.distributed.get_rank()
            safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], key)
