"""Aggregate the ranks' results of one step, in an order that does not depend on the ranks."""

from __future__ import annotations

import logging
import math
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ex4d.errors import Ex4dError
from ex4d.train import flops
from ex4d.train.config import BatchPlan, Place
from ex4d.train.objective import Inputs, Losses

logger = logging.getLogger(__name__)

NUM_SIGMA_BUCKETS = 5
SPIKE = 5.0  # a gradient norm above this × the median of the last 20 steps is logged
WEIGHTED, MSE, SIGMA, VALID = 1, 2, 3, 4  # columns of `rows`; the first is the position


class NonFinite(Ex4dError):
    """A loss or a gradient is NaN or infinite. Raised before the optimizer step, so the weights are still valid."""


@dataclass(frozen=True)
class Report:
    """One step over the global batch.

    Args:
        loss: mean weighted loss. mse: mean unweighted error. Both are None if no sample could be read.
        by_sigma: mean unweighted error in equal buckets of sigma, None for an empty bucket.
        finite: whether every loss and gradient was finite. stop: whether any rank was asked to stop.
        peak_memory_bytes: the maximum over ranks. bad_samples: samples that could not be read; the means exclude them.
    """

    loss: float | None
    mse: float | None
    by_sigma: list[float | None]
    finite: bool
    stop: bool
    peak_memory_bytes: int
    bad_samples: int


def positions(place: Place, plan: BatchPlan, accum: int) -> list[int]:
    """Return the positions of a rank's micro batch in the global batch; position g belongs to rank g mod W."""
    first = accum * plan.micro_size
    return [place.rank + place.world_size * (first + i) for i in range(plan.micro_size)]


def rows(places: list[int], losses: Losses, inputs: Inputs) -> Tensor:
    """Return float64 [B, 5]: position, weighted loss, unweighted error, sigma and validity of each sample."""
    where = torch.tensor(places, dtype=torch.float64, device=losses.mse.device)
    columns = (losses.weighted.detach(), losses.mse, inputs.sigma, inputs.valid)
    return torch.stack([where, *(column.double() for column in columns)], dim=1)


def gather(local: Tensor, gradients_finite: bool, stop: bool, first: int | None = None) -> Report:
    """Return the report over all ranks' rows [n, 5]. A collective call with equal n; all ranks get the same result.

    Args:
        first: count only the samples at the first `first` positions.
    """
    flags = [not gradients_finite, stop, peak_memory_bytes(local.device), 0, 0]
    message = torch.cat([local, torch.tensor([flags], dtype=torch.float64, device=local.device)])
    everyone = [torch.empty_like(message) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, message)
    samples = torch.cat([each[:-1] for each in everyone]).cpu()
    unsound, stopping, memory, *_ = torch.stack([each[-1] for each in everyone]).amax(dim=0).tolist()
    samples = in_order(samples, first)
    good = samples[samples[:, VALID] > 0]
    finite = bool(samples.isfinite().all()) and not unsound
    loss, mse = (mean(samples, column) if finite else None for column in (WEIGHTED, MSE))
    return Report(loss, mse, by_sigma(good), finite, bool(stopping), int(memory), len(samples) - len(good))


def in_order(samples: Tensor, first: int | None = None) -> Tensor:
    """Return rows [n, 5] sorted by their position in the global batch, truncated to the first `first`."""
    return samples[samples[:, 0].argsort()][:first]


def mean(samples: Tensor, column: int) -> float | None:
    """Return the mean of a column of rows [n, 5] over the samples that could be read.

    None if there are none, or one is not finite. The sum is exact, so the order does not matter.
    """
    good = samples[samples[:, VALID] > 0]
    return math.fsum(good[:, column].tolist()) / len(good) if len(good) and good.isfinite().all() else None


def by_sigma(samples: Tensor) -> list[float | None]:
    """Return the mean unweighted error in each of NUM_SIGMA_BUCKETS equal parts of sigma's range [0, 1]."""
    bucket = (samples[:, SIGMA] * NUM_SIGMA_BUCKETS).long().clamp(0, NUM_SIGMA_BUCKETS - 1)
    groups = [samples[bucket == index, MSE].tolist() for index in range(NUM_SIGMA_BUCKETS)]
    return [math.fsum(group) / len(group) if group else None for group in groups]


def describe_non_finite(step: int, local: Tensor, keys: list[str], gradients_finite: bool) -> str:
    """Return an error message that names the clips with a non-finite loss, over all ranks. A collective call."""
    finite = local[:, 1:3].isfinite().all(dim=1).tolist()
    bad = [key for key, ok in zip(keys, finite, strict=True) if not ok]
    if not bad and not gradients_finite:
        bad = keys  # the loss is finite but its gradient is not: any clip of this rank may be the cause
    everyone: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, bad)
    names = ", ".join(sorted({key for part in everyone for key in part}))
    return f"step {step}: loss or gradient is not finite for {names}; nothing was updated"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class SpikeWatch:
    """Logs the clips of a step whose gradient norm is far above those of the 20 steps before."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=20)

    def check(self, step: int, grad_norm: float, keys: list[str]) -> None:
        """Compare a step's gradient norm with the earlier ones, and remember it."""
        if len(self._norms) == self._norms.maxlen and grad_norm > SPIKE * (usual := statistics.median(self._norms)):
            clips = ", ".join(keys)
            logger.warning("step %d: gradient norm %.3g, usually %.3g; clips: %s", step, grad_norm, usual, clips)
        self._norms.append(grad_norm)


def throughput(
    plan: BatchPlan, seconds: float, cost: flops.Cost | None, checkpointing: tuple[float, bool], device: torch.device
) -> dict[str, float]:
    """Return samples and tokens per second over all ranks and, on a known GPU, MFU and HFU.

    Args:
        seconds: duration of the step.
        cost: of one sample; None if unknown.
        checkpointing: (recomputed, keep_attention) as in `flops.utilisation`.
    """
    rate = plan.global_size / seconds
    if cost is None:
        return {"samples_per_s": rate}
    rates = {"samples_per_s": rate, "tokens_per_s": rate * cost.tokens}
    peak = flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        rates["mfu"], rates["hfu"] = flops.utilisation(cost, rate / plan.world_size, peak, *checkpointing)
    return rates


class Stopwatch:
    """Splits a step's wall-clock time into named parts; synchronises the GPU at each, so that the parts are exact.

    Args:
        waited: returns the seconds that this process waited in collectives since the last call (waits.waited); they
            are moved from the part in which they fell to the part "communication".
    """

    def __init__(self, device: torch.device, waited: Callable[[], float] = lambda: 0.0):
        self._device, self._waited = device, waited
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # collectives that still run have no duration yet
        waited()  # discard the time before this step
        self._start = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now, waited = time.perf_counter(), self._waited()
        for part, seconds in ((name, now - self._last - waited), ("communication", waited)):
            self._parts[part] = self._parts.get(part, 0.0) + seconds
        self._last = now

    def times(self) -> dict[str, float]:
        """Return {"total": seconds, part: seconds, …} so far."""
        return {"total": time.perf_counter() - self._start, **self._parts}
