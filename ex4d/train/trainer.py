"""The training loop, from a batch of clips to an adapter.

A run is reproducible: the loader's order depends only on (seed, epoch), noise and sigma only on (seed, step, sample
key), and the logged loss is summed over the global batch in sample order. On CPUs, a run that is killed and resumed is
bit-identical. With another number of ranks or ZeRO stage it is identical up to summation order, and so it is on GPUs,
whose kernels may sum in another order each time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ex4d.models import attention
from ex4d.models.backbone import ModelConfig
from ex4d.train import average, checkpoint, engine, report, stop, validation
from ex4d.train.config import EXIT_PREEMPTED, Place, TrainConfig, plan_batch
from ex4d.train.engine import Engine
from ex4d.train.identity import check_identity
from ex4d.train.job import Job, build_job
from ex4d.train.objective import Inputs, Losses, NamedNoise, velocity_losses
from ex4d.train.runlog import RunLog, commit
from ex4d.train.validator import Child, Handle, Validator
from ex4d.train.waits import waited

logger = logging.getLogger(__name__)


class Trainer:
    """A run, restored from the last checkpoint of its output folder. Every rank creates one and calls `run`.

    Args:
        show: called on rank 0 with each step's metrics.
        start_validation: see validator.Validator.

    Raises:
        ConfigError: the output folder holds a run with other settings.
    """

    def __init__(
        self,
        config: TrainConfig,
        job: Job,
        place: Place,
        device: torch.device,
        show: Callable[..., None],
        start_validation: Callable[[Path, str], Handle] = Child,
    ):
        self.config, self.job, self.place, self.device, self.show = config, job, place, device, show
        self.start_validation = start_validation
        path = engine.agreed(checkpoint.latest(config.output), config.output)
        state = checkpoint.read_state(path) if path else None
        if state:
            check_identity(state.identity, job.identity, config.output)
        self.plan = plan_batch(config, place.world_size, state.global_batch_size if state else None)
        self.first_step, self.samples = (state.step, state.samples) if state else (0, 0)
        self.saved_step = self.first_step
        self.spikes = report.SpikeWatch()
        moments = None
        if path:
            checkpoint.load_weights(job.model, checkpoint.read_tensors(path / "adapter.safetensors"))
            moments = checkpoint.read_tensors(path / "optimizer.safetensors")
        self.engine = Engine(job.model, config, self.plan, moments, self.first_step)
        self.average = (
            average.Average(self.engine, config.ema_decay, path, place.rank, device) if config.ema_decay else None
        )
        self.batches = job.open_loader("train", self.samples, self.plan.micro_size, self.plan.accum_steps)
        self.apart = config.validate_apart or config.validate_videos > 0
        in_ranks = config.validate_every and not config.validate_apart
        share = (self.plan.micro_size, self.plan.world_size)
        self.validation_batches = validation.read_share(job, config, *share) if in_ranks else []

    def run(self, stop_asked: Callable[[], bool] = lambda: False) -> int:
        """Train to `num_steps`, write the adapter, and return 0; or EXIT_PREEMPTED after a SIGTERM and a checkpoint.

        Raises:
            NonFinite: a loss or gradient is not finite; the message names the clips. The last checkpoint is kept.
        """
        if self.place.rank != 0:
            return self.loop(stop_asked, None, None)
        config = self.config
        checkpoint.clean(config.output)
        wandb = {"mode": config.wandb_mode, "project": config.wandb_project, "group": config.wandb_group}
        log = RunLog(config.output, self.first_step, wandb, self.job.facts | {"commit": commit()})
        validator = Validator(config, self.job, self.start_validation) if self.apart else None
        try:
            code = self.loop(stop_asked, log, validator)
            if validator and code == 0:
                self.note(log, validator.wait(stop_asked))
        finally:
            if validator:
                validator.close()
        log.close(code)
        return code

    def loop(self, stop_asked: Callable[[], bool], log: RunLog | None, validator: Validator | None) -> int:
        """Train to `num_steps` and write the adapter; see `run`. Only rank 0 has a log and a validator."""
        config, metrics = self.config, dict[str, Any]()
        start = self.initial_loss()
        for step in range(self.first_step + 1, config.num_steps + 1):
            before = metrics
            metrics, stopping = self.step(step, stop_asked)
            if not metrics:
                if self.saved_step < step - 1:
                    self.save(step - 1, before.get("validation_loss"), log)
                if log and validator:
                    self.note(log, validator.results())
                logger.warning("stopped by a signal within step %d; the same command repeats that step", step)
                return EXIT_PREEMPTED
            if step == self.first_step + 1:
                metrics |= start
                if self.job.recompute and config.checkpoint_blocks == "auto" and self.device.type == "cuda":
                    self.job.recompute.fit_memory(self.device, self.engine.state_bytes())
            last = step == config.num_steps
            if config.validate_every and (last or step % config.validate_every == 0):
                metrics |= self.validate(step, validator)
            if log:
                log.write(metrics)
                self.show(metrics)
            if last or stopping or step % config.save_every == 0:
                self.save(step, metrics.get("validation_loss"), log)
            if log and validator:
                self.note(log, validator.results())  # after `save`, since they may belong to this step
            if stopping and not last:
                logger.warning("stopped by a signal after step %d; the same command resumes there", step)
                return EXIT_PREEMPTED
        self.export()
        return 0

    def step(self, step: int, stop_asked: Callable[[], bool]) -> tuple[dict[str, Any], bool]:
        """Do one optimizer step; return its metrics, and whether any rank was asked to stop.

        A request that arrives between two micro batches, which may take minutes, drops the accumulated gradients; the
        metrics are then empty.
        """
        watch = report.Stopwatch(self.device, waited)
        rows, keys = [], []
        for accum in range(self.plan.accum_steps):
            if accum:
                stopping = stop.any_rank(stop_asked(), self.device)
                watch.lap("communication")
                if stopping:
                    return {}, True
            batch = next(self.batches)
            watch.lap("data")
            losses, inputs = self.accumulate(step, batch, watch)
            rows.append(report.rows(report.positions(self.place, self.plan, accum), losses, inputs))
            keys += batch["keys"]
        local, gradients_finite = torch.cat(rows), self.engine.gradients_finite()
        result = report.gather(local, gradients_finite, stop_asked())
        if not result.finite:
            raise report.NonFinite(report.describe_non_finite(step, local, keys, gradients_finite))
        watch.lap("communication")
        lr = learning_rate(self.config, step)
        grad_norm = self.engine.step(lr)
        self.spikes.check(step, grad_norm, keys)
        if self.average:
            self.average.update()
        watch.lap("optimizer")
        self.samples += self.plan.global_size
        metrics: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "samples": self.samples,
            "processes": self.plan.world_size,
        }
        metrics |= {"mse": result.mse, "mse_by_sigma": result.by_sigma, "bad_samples": result.bad_samples}
        if "dataset" in batch:
            metrics["dataset"] = batch["dataset"]
        checkpointing = (self.job.recompute.share if self.job.recompute else 0.0, self.config.checkpoint_keep_attention)
        cost = self.job.costs[batch.get("dataset", 0)] if self.job.costs else None
        metrics |= report.throughput(self.plan, watch.times()["total"], cost, checkpointing, self.device)
        metrics |= {"step_s": watch.times(), "peak_memory_bytes": result.peak_memory_bytes}
        return metrics, result.stop

    def accumulate(self, step: int, batch: dict[str, Any], watch: report.Stopwatch) -> tuple[Losses, Inputs]:
        """Add the gradients of one micro batch; return its losses and the model's inputs."""
        config = self.config
        noises = [NamedNoise(config.seed, step, key, config.condition_dropout) for key in batch["keys"]]
        inputs = self.job.encoder.encode(batch, noises, config.shift, config.timestep_sampling)
        watch.lap("encode")
        # LoRA's dropout draws from the global generator; activation recomputation restores its state.
        torch.manual_seed(noises[0].generator.initial_seed())
        losses = velocity_losses(self.engine.forward(*inputs.model_inputs), inputs, config.hole_weight)
        watch.lap("forward")
        self.engine.backward(losses.weighted.mean())
        watch.lap("backward")
        return losses, inputs

    def initial_loss(self) -> dict[str, float]:
        """Return {"initial_validation_loss"} before the first update of a run with `train.init_from`, else {}."""
        if self.first_step or not self.config.init_from or not self.validation_batches:
            return {}
        return {"initial_validation_loss": self.validate(0, None)["validation_loss"]}

    def validate(self, step: int, validator: Validator | None) -> dict[str, Any]:
        """Validate: return the metrics that the ranks compute, and start the separate validation for the rest.

        A collective call. `validation_loss` is the mean unweighted error, each time over the same clips, noise and
        sigmas.
        """
        config, metrics = self.config, dict[str, Any]()
        if not config.validate_apart:
            self.engine.train(False)
            batches = self.validation_batches
            rows = validation.measure(config, self.job.encoder, self.engine.forward, batches, self.plan, self.place)
            self.engine.train(True)
            metrics["validation_loss"] = report.gather(rows, True, False, first=config.validate_samples).mse
        weights = self.engine.weights() if self.apart else {}
        if validator:
            metrics["validation_videos"] = validator.submit(step, weights)
        return metrics

    def note(self, log: RunLog, results: list[dict[str, Any]]) -> None:
        """Log the results of separate validations."""
        for result in results:
            log.write_validation(result)
            if result.get("validation_loss") is not None:
                checkpoint.note_validation(self.config.output, result["step"], result["validation_loss"])

    def save(self, step: int, validation_loss: float | None, log: RunLog | None) -> None:
        """Write the checkpoint of `step`. A collective call: rank 0 writes while the others wait."""
        rank0 = self.place.rank == 0
        weights, moments = self.engine.weights(), self.engine.moments(keep=rank0)
        if rank0:
            if log:
                log.flush()
            versions = self.job.facts.get("versions", {})
            plan, identity = self.plan, self.job.identity
            state = checkpoint.State(step, self.samples, plan.global_size, identity, validation_loss, versions)
            with checkpoint.writing(self.config.output, state) as folder:
                self.job.write_adapter(folder, weights, step)
                checkpoint.write_tensors(folder / "optimizer.safetensors", moments)
                if self.average:
                    checkpoint.write_tensors(folder / average.FILE_NAME, self.average.on_cpu())
            checkpoint.prune(self.config.output, self.config.keep_last)
        self.saved_step = step
        torch.distributed.barrier()

    def export(self) -> None:
        """Write OUTPUT/adapter, from the moving average if there is one. A collective call."""
        weights = self.engine.weights()
        if self.place.rank == 0:
            step = max(self.first_step, self.config.num_steps)
            final = self.average.on_cpu() if self.average else weights
            self.job.write_adapter(Path(self.config.output) / "adapter", final, step)
        torch.distributed.barrier()


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    place: Place,
    show: Callable[..., None],
    stop_asked: Callable[[], bool] | None = None,
    start_validation: Callable[[Path, str], Handle] = Child,
) -> int:
    """Train as one rank of a run; return 0, or EXIT_PREEMPTED after a SIGTERM and a checkpoint.

    Args:
        place: rank of this process. Its launcher has set MASTER_ADDR and MASTER_PORT.
        show: called on rank 0 with each step's metrics.
        stop_asked: returns whether to write a checkpoint and stop; None: whether SIGTERM or Ctrl-C arrived.
        start_validation: where a separate validation runs; see validator.Validator.

    Raises:
        ConfigError: the settings are invalid, or the output folder holds a run with other settings.
        ContractError: a dataset is not finished, or a checkpoint is damaged.
        NonFinite: a loss or gradient is not finite; the message names the clips.
    """
    device = engine.start(place, config.device)
    job = build_job(config, model_config, place, device)
    with attention.kernel(config.attention), stop.stop_signal(stop_asked) as stopping:
        code = Trainer(config, job, place, device, show, start_validation).run(stopping)
    engine.stop()
    return code


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1: linear warm-up, then the schedule of `lr_decay`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.lr_decay == "none":
        return config.lr
    share = (step - config.warmup_steps) / max(config.num_steps - config.warmup_steps, 1)
    rest = 1 - share if config.lr_decay == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.lr * (0.1 + 0.9 * rest)
