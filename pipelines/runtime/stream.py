"""Stream rows through chains of stages on a Ray cluster, without waves or barriers between chains or tracks.

A chain that needs no GPU runs as tasks. A chain that needs a GPU runs in a pool of actors, which keep their models and
whose number follows the cluster. Rows come from any iterable; `backlog` decides which run next. Rows lost with their
process or node are redone from the first chain of their track, elsewhere.

This uses Ray's tasks and actors rather than Ray Data, whose actors do not leave a lost GPU node, whose helper
processes take the driver down when killed, and which needs all rows up front: docs/decisions/preprocess.md, 2026-11-26.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ex4d.errors import ConfigError, ContractError, Ex4dError
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.backlog import Backlog, Batch, Step
from pipelines.runtime.pool import Cluster, Pool
from pipelines.runtime.stage import Row, Track, chains, pack_row, refused, unpack_row
from pipelines.runtime.worker import Facts, Work, Worker, run_batch

logger = logging.getLogger(__name__)

SPARE_TASKS = 2  # tasks submitted beyond what the CPUs can run at once, so that no CPU waits for the driver
NUM_LOST = 20  # maximum restarts of a row for reasons that are not its own
# Ray errors that mean that the process working on a row died; others mean that the row's input was lost.
_DIED = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ActorDiedError", "ActorUnavailableError")


class Stream:
    """Keeps the CPUs and GPUs of a cluster busy with the chains of some tracks, later ones first.

    Args:
        tracks: rows of the first produce rows of the others.
        rows: rows of the first track.
        context: passed to every stage.
        attempts: decides when to give up on a row whose processes die; None: never.
        max_actors: for each chain that needs a GPU; None: as many as the cluster's GPUs hold.
        problems: receives a sentence for each node that is quarantined.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        rows: Iterable[Row],
        context: Any,
        attempts: Attempts | None,
        max_actors: int | None,
        problems: list[str],
    ):
        import ray

        self.attempts = attempts
        self.steps: list[Step] = []
        for track in tracks:
            parts, first = list(chains(track.stages, track.keep, propagate=False)), len(self.steps)
            for part in parts:
                work = ray.put(Work(part, context, os.getcwd()))
                self.steps.append(Step(track, work, part.stages[0].needs, first, first + len(parts) - 1))
        self.cluster = Cluster()
        self.pools = {
            number: Pool(Worker, step.work, step.needs, max_actors, self.cluster, problems)
            for number, step in enumerate(self.steps)
            if step.on_gpu
        }
        self.tasks = {
            number: {"num_returns": 2, "max_retries": 0, **self.cluster.options(step.needs)}
            for number, step in enumerate(self.steps)
            if not step.on_gpu
        }
        self.call = ray.remote(run_batch)
        self.backlog = Backlog(self.steps, rows, self.cluster)
        self.flying: dict[Any, Batch] = {}
        self.freed: deque[str] = deque()  # nodes where a task has just ended

    def run(self, added: deque[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """Yield (track, row) of each finished row as it comes. `added` is that of `Runner`."""
        try:
            while True:
                self._submit()
                if not self.flying and not any(self.backlog.waiting):
                    assert self.backlog.exhausted, "rows were left unread"
                    return
                for batch, done, node in self._landed():
                    step = self.steps[batch.step]
                    for packed in done:
                        yield step.track.name, _fate(unpack_row(packed))
                        self.backlog.add(added, batch.step, node)
                        added.clear()
                    if self.attempts is not None:
                        self.attempts.end(step.name, batch.keys)
        finally:
            self._close()

    # ------------------------------------------------------------ submit

    def _submit(self) -> None:
        backlog = self.backlog
        self.cluster.refresh()
        for number, pool in self.pools.items():
            step, waiting = self.steps[number], backlog.waiting[number]
            pool.resize(len(waiting), number == step.last or not backlog.waiting[number + 1])
            while True:
                if number == 0 and not waiting:
                    backlog.read_source()
                actor = pool.free(waiting[0].tried_on) if waiting else None
                if actor is None:
                    break
                batch = backlog.take(number, "")
                self._fly(batch, pool.call(actor, batch.payload or batch.rows))
        wanted_inputs = {number: pool.wanted_inputs for number, pool in self.pools.items()}
        while not self._all_cpus_busy() or not self.flying:
            node = self.freed.popleft() if self.freed else ""
            chosen = backlog.next_step(node, wanted_inputs, self._num_slots())
            if chosen is None:
                break
            batch = backlog.take(chosen, node)
            self._fly(batch, self._task(batch, node))
        self.freed.clear()

    def _task(self, batch: Batch, node: str) -> Any:
        """Submit a task, if possible on the node where the batch's files are; return its references."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = self.tasks[batch.step]
        if node and batch.node == node:
            # An actor may have taken the CPU meanwhile and would never give it back, so allow spilling to other nodes.
            place = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=bool(self.pools))
            options = options | {"scheduling_strategy": place}
        return self.call.options(**options).remote(self.steps[batch.step].work, batch.payload or batch.rows)

    def _fly(self, batch: Batch, references: Any) -> None:
        step = self.steps[batch.step]
        if self.attempts is not None and batch.step == step.first:
            self.attempts.begin(step.name, batch.keys)
        facts, batch.result = references
        self.flying[facts] = batch
        self.backlog.in_flight[batch.step] += 1

    def _num_slots(self) -> int:
        """Return the number of tasks that the CPUs can run concurrently, beside the actors."""
        taken = sum(pool.num_cpus for pool in self.pools.values())
        each = max((self.steps[number].needs[0] for number in self.tasks), default=1.0)
        return max(1, math.floor((self.cluster.num_cpus - taken) / max(each, 0.01)))

    def _all_cpus_busy(self) -> bool:
        return sum(self.backlog.in_flight[number] for number in self.tasks) >= self._num_slots() + SPARE_TASKS

    # ------------------------------------------------------------ collect

    def _landed(self) -> Iterator[tuple[Batch, list[dict[str, Any]], str]]:
        """Yield (batch, its packed rows, their node) of batches that finished a track; advance or restart the rest."""
        import ray

        if not self.flying:  # rows wait for an actor to start
            time.sleep(0.1)
            return
        died_errors = tuple(getattr(ray.exceptions, name) for name in _DIED)
        ready, rest = ray.wait(list(self.flying), num_returns=1, timeout=1.0)
        if ready and rest:
            ready += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        for reference in ready:
            batch = self.flying.pop(reference)
            self.backlog.in_flight[batch.step] -= 1
            pool, step = self.pools.get(batch.step), self.steps[batch.step]
            try:
                facts: Facts = ray.get(reference)
                done = ray.get(batch.result) if batch.step == step.last else None
            except ray.exceptions.RayError as error:
                died = isinstance(error, died_errors)
                self._begin_again(batch, error, died if pool is None else pool.lost(reference, died))
                continue
            found = (facts.has_bug, batch.tried_on, facts.lost_gpu)
            if pool is not None and pool.returned(reference, facts.node, *found):
                self.backlog.restart(batch)  # the bug may be the node's fault: retry on another node
                continue
            self.backlog.drop_payload(batch)
            if pool is None and self.cluster.num_nodes > 1:
                self.freed.append(facts.node)
            if done is not None:
                self.backlog.finish(batch)
                self.backlog.learn(step.first, facts, len(done))
                yield batch, done, facts.node
            else:
                self.backlog.advance(batch, facts.size_bytes)

    def _begin_again(self, batch: Batch, error: Exception, is_culprit: bool) -> None:
        """Restart the rows of a lost call, each in a batch of its own; reject those that repeatedly kill processes."""
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
            raise error
        step = self.steps[batch.step]
        batch.lost += 1
        logger.warning("%s: a process was lost with %s (%s)", step.name, batch.keys[0], type(error).__name__)
        if batch.lost > NUM_LOST:
            raise error
        self.backlog.drop_payload(batch)
        if is_culprit and self.attempts is not None:
            self.attempts.died(step.name, batch.keys)
        sizes = [batch.source_bytes, *([0] * (len(batch.keys) - 1))]
        for packed, key, size in zip(batch.rows, batch.keys, sizes, strict=True):
            if self.attempts is not None and not self.attempts.may(step.name, key):
                row = unpack_row(packed)
                packed = pack_row(
                    refused(row, "bad", step.name, "worker_crash", "the processes that worked on it died")
                )
            again = Batch([packed], [key], batch.step, source_bytes=size, lost=batch.lost, tried_on=batch.tried_on)
            self.backlog.restart(again)

    def _close(self) -> None:
        import ray

        for reference in self.flying:
            ray.cancel(reference)
        for pool in self.pools.values():
            pool.close()


def _fate(row: Row) -> Row:
    """Return the row. Raises the stage's error if it is to stop the run."""
    refusal = row["refusal"]
    if refusal is None or refusal["fate"] != "stop":
        return row
    stop: Ex4dError = ContractError(refusal["message"])
    if refusal["reason"] == "ConfigError":
        stop = ConfigError(*refusal["arguments"])
    raise stop
