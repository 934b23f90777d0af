"""One stream of rows through chains of stages on a Ray cluster: no waves and no barrier between chains.

A chain that needs no GPU runs as tasks, one that needs a GPU in a pool of actors that keep their model and whose number
follows the cluster. Rows come from any iterable. Between two chains they wait in Ray's object store, within a bound.
What dies with its process or node is done again from its first chain, on another one.

Ray's own tasks and actors are used and not Ray Data, whose actors do not leave a lost GPU node, whose helpers end the
driver when they are killed, and which must be given all rows at once: docs/decisions/preprocess.md, 2026-11-26.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ex4d.errors import ConfigError, ContractError, Ex4dError
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.pool import Cluster, Pool
from pipelines.runtime.stage import Chain, Row, pack_row, refused, unpack_row
from pipelines.runtime.worker import Facts, Work, Worker, run_batch

logger = logging.getLogger(__name__)

TASK_S = 1.0  # a task gets as many rows as take about so long, so that Ray's milliseconds for it do not show
MAX_ROWS_PER_TASK = 64
SPARE_TASKS = 2  # submitted beyond what the CPUs can run at once, so that none waits for the driver
STORE_SHARE = 0.5  # of Ray's object store, which rows between two chains may take
NUM_LOST = 20  # times that a row is begun again for reasons that are not its own
# Ray's errors that mean that the process died that worked on a row; others mean that its input was lost.
_DIED = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ActorDiedError", "ActorUnavailableError")


@dataclass
class Batch:
    """Rows that travel together.

    Args:
        rows: packed, as they entered the first chain: what is lost begins again with them.
        step: the chain that they wait for, or are in.
        payload: reference to the rows that it takes, None for the first; `size_bytes` of it. result: to what it gives.
        lost: times that they were begun again; tried_on: nodes where they ended in a bug.
    """

    rows: list[dict[str, Any]]
    keys: list[str]
    step: int = 0
    payload: Any = None
    size_bytes: int = 0
    result: Any = None
    lost: int = 0
    tried_on: set[str] = field(default_factory=set)


class Stream:
    """Keeps the CPUs and GPUs of a cluster busy with one list of chains.

    Args:
        chains: neighbours need different resources.
        context: what stages get.
        attempts: says when a row whose processes die is given up; None: never.
        max_actors: of each chain that needs a GPU; None: what the cluster's GPUs hold.
        problems: gets a sentence for each node that was quarantined.
    """

    def __init__(
        self,
        chains: Sequence[Chain],
        context: Any,
        attempts: Attempts | None,
        max_actors: int | None,
        problems: list[str],
    ):
        import ray

        self.attempts = attempts
        self.name = chains[0].stages[0].name
        self.works = [ray.put(Work(chain, context, os.getcwd())) for chain in chains]
        self.needs = [chain.stages[0].needs for chain in chains]
        self.cluster = Cluster()
        self.pools = {
            step: Pool(Worker, work, need, max_actors, self.cluster, problems)
            for step, (work, need) in enumerate(zip(self.works, self.needs, strict=True))
            if need[1]
        }
        self.tasks = {
            step: ray.remote(run_batch).options(num_returns=2, max_retries=0, **self.cluster.options(need))
            for step, need in enumerate(self.needs)
            if step not in self.pools
        }
        self.waiting: list[deque[Batch]] = [deque() for _ in chains]
        self.flying: dict[Any, Batch] = {}
        self.counts: Counter[int] = Counter()  # batches in flight, by step
        self.between_bytes = 0  # of payloads that wait or are being read
        self.largest_bytes = 0
        self.rows_per_task = 1

    def run(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield each finished row as it comes."""
        self.source = iter(rows)
        self.exhausted = False
        try:
            while True:
                self._submit()
                if not self.flying and not any(self.waiting):
                    return
                for batch, done in self._landed():
                    for packed in done:
                        yield _fate(unpack_row(packed))
                    if self.attempts is not None:
                        self.attempts.end(self.name, batch.keys)
        finally:
            self._close()

    # ------------------------------------------------------------ out

    def _submit(self) -> None:
        self.cluster.refresh()
        for step, pool in self.pools.items():
            is_awaited = step + 1 == len(self.works) or not self.waiting[step + 1]
            pool.resize(len(self.waiting[step]), is_awaited)
            if step == 0 and not self.waiting[0]:
                self._read_source()
            while self.waiting[step] and (actor := pool.free(self.waiting[step][0].tried_on)):
                batch = self.waiting[step].popleft()
                self._fly(batch, pool.call(actor, batch.payload or batch.rows))
                if step == 0 and not self.waiting[0]:
                    self._read_source()
        while (chosen := self._next_step()) is not None:
            batch = self.waiting[chosen].popleft()
            self._fly(batch, self.tasks[chosen].remote(self.works[chosen], batch.payload or batch.rows))

    def _fly(self, batch: Batch, references: Any) -> None:
        facts, batch.result = references
        self.flying[facts] = batch
        self.counts[batch.step] += 1

    def _read_source(self) -> None:
        count = self.rows_per_task if len(self.works) == 1 else 1
        found = list(islice(self.source, count))
        self.exhausted = len(found) < count
        if not found:
            return
        batch = Batch([pack_row(row) for row in found], [row["key"] for row in found])
        if self.attempts is not None:
            self.attempts.begin(self.name, batch.keys)
        self.waiting[0].append(batch)

    def _next_step(self) -> int | None:
        """Return the chain that the next task is for, None where none is to be submitted now."""
        if self._all_cpus_busy() and len(self.flying) > 0:
            return None
        steps = [step for step in self.tasks if self._has_input(step)]
        for step in steps:  # a GPU must never wait for what feeds it
            pool = self.pools.get(step + 1)
            if pool is not None and len(self.waiting[step + 1]) + self.counts[step] < pool.hunger:
                return step
        return max(steps, default=None)

    def _has_input(self, step: int) -> bool:
        if self.waiting[step]:
            return True
        if step or self.exhausted or not self._has_room():
            return False
        self._read_source()
        return bool(self.waiting[0])

    def _has_room(self) -> bool:
        if len(self.works) == 1:
            return True
        ahead = self.between_bytes + self.counts[0] * self.largest_bytes
        return not ahead or ahead + self.largest_bytes <= self.cluster.store_bytes * STORE_SHARE

    def _all_cpus_busy(self) -> bool:
        taken = sum(pool.num_cpus for pool in self.pools.values())
        each = max(self.needs[step][0] for step in self.tasks) if self.tasks else 1.0
        slots = max(1, math.floor((self.cluster.num_cpus - taken) / max(each, 0.01)))
        return sum(self.counts[step] for step in self.tasks) >= slots + SPARE_TASKS

    # ------------------------------------------------------------ back

    def _landed(self) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
        """Yield (batch, its packed rows) of what came out of the last chain; pass on or begin again all else."""
        import ray

        if not self.flying:  # rows wait for an actor that starts
            time.sleep(0.1)
            return
        died_errors = tuple(getattr(ray.exceptions, name) for name in _DIED)
        ready, rest = ray.wait(list(self.flying), num_returns=1, timeout=1.0)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for reference in ready:
            batch = self.flying.pop(reference)
            self.counts[batch.step] -= 1
            pool = self.pools.get(batch.step)
            try:
                facts: Facts = ray.get(reference)
                done = ray.get(batch.result) if batch.step == len(self.works) - 1 else None
            except ray.exceptions.RayError as error:
                died = isinstance(error, died_errors)
                self._begin_again(batch, error, died if pool is None else pool.lost(reference, died))
                continue
            if pool is not None and pool.returned(reference, facts.node, facts.has_bug, batch.tried_on):
                self._drop_payload(batch)
                self._restart(batch)  # a bug that may be the node's: tried on another
                continue
            self._drop_payload(batch)
            if done is not None:
                self._learn(facts, len(done))
                yield batch, done
                continue
            batch.step += 1
            batch.payload, batch.size_bytes = batch.result, facts.size_bytes
            self.between_bytes += facts.size_bytes
            self.largest_bytes = max(self.largest_bytes, facts.size_bytes)
            self.waiting[batch.step].append(batch)

    def _drop_payload(self, batch: Batch) -> None:
        self.between_bytes -= batch.size_bytes
        batch.payload, batch.size_bytes = None, 0

    def _learn(self, facts: Facts, count: int) -> None:
        """Aim at tasks of TASK_S, from those that have ended; growing by no more than twice at a time."""
        wanted = int(TASK_S * count / max(facts.seconds, 1e-6))
        self.rows_per_task = max(1, min(wanted, 2 * self.rows_per_task, MAX_ROWS_PER_TASK))

    def _begin_again(self, batch: Batch, error: Exception, is_culprit: bool) -> None:
        """Put the rows of a call that died with its process back to the start, each alone; refuse those that kill."""
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
            raise error
        batch.lost += 1
        logger.warning("%s: a process was lost with %s (%s)", self.name, batch.keys[0], type(error).__name__)
        if batch.lost > NUM_LOST:
            raise error
        self._drop_payload(batch)
        if is_culprit and self.attempts is not None:
            self.attempts.died(self.name, batch.keys)
        for packed, key in zip(batch.rows, batch.keys, strict=True):
            if self.attempts is not None and not self.attempts.may(self.name, key):
                row = unpack_row(packed)
                packed = pack_row(
                    refused(row, "bad", self.name, "worker_crash", "the processes that worked on it died")
                )
            self._restart(Batch([packed], [key], lost=batch.lost, tried_on=batch.tried_on))

    def _restart(self, batch: Batch) -> None:
        batch.step = 0
        self.waiting[0].appendleft(batch)

    def _close(self) -> None:
        import ray

        for reference in self.flying:
            ray.cancel(reference)
        for pool in self.pools.values():
            pool.close()


def _fate(row: Row) -> Row:
    """Return the row. Raises the error that a stage raised to stop the run."""
    refusal = row["refusal"]
    if refusal is None or refusal["fate"] != "stop":
        return row
    stop: Ex4dError = ContractError(refusal["message"])
    if refusal["reason"] == "ConfigError":
        stop = ConfigError(*refusal["arguments"])
    raise stop
