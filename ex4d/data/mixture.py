"""Mix several datasets in one stream: each optimizer step takes all its samples from one of them, chosen by weight.

Batches never mix datasets, so these may differ in frames and size (a bucket each), and all ranks work on clips of one
size. The dataset of a step follows from the weights and the step number alone: the order is the same for any number of
ranks, threads and restarts, and the entire state is still the number of samples consumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import count, islice

from ex4d.data.loader import Batch, ShardLoader
from ex4d.errors import ConfigError


def turns(weights: Sequence[float]) -> Iterator[int]:
    """Yield for each step, from the first, the index of the dataset that is furthest behind its share of the steps."""
    exact = [Fraction(weight) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    counts = [0] * len(shares)
    for step in count(1):
        behind = [step * share - done for share, done in zip(shares, counts, strict=True)]
        chosen = behind.index(max(behind))
        counts[chosen] += 1
        yield chosen


class MixtureLoader(Iterator[Batch]):
    """An endless iterator of micro batches of one rank; each batch has `dataset`, the index of its dataset.

    Args:
        open_one: for each dataset: (samples of it consumed by all ranks) -> its loader.
        weights: of the datasets, in the same order.
        accum_steps: micro batches per step.
        step_size: samples per step over all ranks.
        samples_consumed: by all ranks, from all datasets; a multiple of `step_size`.

    Raises:
        ConfigError: samples_consumed is not a multiple of `step_size`.
    """

    def __init__(
        self,
        open_one: Sequence[Callable[[int], ShardLoader]],
        weights: Sequence[float],
        accum_steps: int,
        step_size: int,
        samples_consumed: int = 0,
    ):
        steps, rest = divmod(samples_consumed, step_size)
        if rest:
            raise ConfigError("samples_consumed", samples_consumed, f"a multiple of the {step_size} samples of a step")
        self._turns = turns(weights)
        counts = Counter(islice(self._turns, steps))
        self.loaders = [open_at(step_size * counts[index]) for index, open_at in enumerate(open_one)]
        self._accum_steps, self._left, self._now = accum_steps, 0, 0

    def __next__(self) -> Batch:
        if not self._left:
            self._now, self._left = next(self._turns), self._accum_steps
        self._left -= 1
        return next(self.loaders[self._now]) | {"dataset": self._now}

    def close(self) -> None:
        """Stop the threads of every loader."""
        for loader in self.loaders:
            loader.close()
