"""One stream of rows through chains of stages on a Ray cluster: no waves, and no barrier between chains or tracks.

A chain that needs no GPU runs as tasks, one that needs a GPU in a pool of actors that keep their model and whose number
follows the cluster. Rows come from any iterable. Between two chains they wait in Ray's object store, within a bound. A
finished row may give rows of a later track, which come first and run on its node, where its files are. What dies with
its process or node is done again from the first chain of its track, on another one.

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
from itertools import count, islice
from typing import Any

from ex4d.errors import ConfigError, ContractError, Ex4dError
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.pool import Cluster, Needs, Pool
from pipelines.runtime.stage import Readable, Row, Track, chains, pack_row, refused, unpack_row
from pipelines.runtime.worker import Facts, Work, Worker, run_batch

logger = logging.getLogger(__name__)

TASK_S = 1.0  # a task gets as many rows as take about so long, so that Ray's milliseconds for it do not show
MAX_ROWS_PER_TASK = 64
AHEAD = 8  # rows of later tracks that wait, over tasks that can run at once, before no earlier ones are begun
SPARE_TASKS = 2  # submitted beyond what the CPUs can run at once, so that none waits for the driver
STORE_SHARE = 0.5  # of Ray's object store, which rows between two chains may take
NUM_LOST = 20  # times that a row is begun again for reasons that are not its own
# Ray's errors that mean that the process died that worked on a row; others mean that its input was lost.
_DIED = ("WorkerCrashedError", "OutOfMemoryError", "NodeDiedError", "ActorDiedError", "ActorUnavailableError")


@dataclass
class Batch:
    """Rows that travel together.

    Args:
        rows: packed, as they entered the first chain of their track: what is lost begins again with them.
        step: the chain that they wait for, or are in.
        node: where the row ran that they come from, and its files are; "" for none. origin: number of that row.
        payload: reference to the rows that it takes, None for the first; `size_bytes` of it. result: to what it gives.
        lost: times that they were begun again; tried_on: nodes where they ended in a bug.
    """

    rows: list[dict[str, Any]]
    keys: list[str]
    step: int = 0
    node: str = ""
    origin: int = -1
    payload: Any = None
    size_bytes: int = 0
    result: Any = None
    lost: int = 0
    tried_on: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Step:
    """A chain in its place among those of all tracks. first, last: numbers of its track's first and last step."""

    track: Track
    work: Any
    needs: Needs
    first: int
    last: int

    @property
    def name(self) -> str:
        """The name of its rows' work, in attempts and messages."""
        return self.track.stages[0].name


class Stream:
    """Keeps the CPUs and GPUs of a cluster busy with the chains of some tracks, the later ones first.

    Args:
        tracks: rows of the first are read when no row of a later one waits, or none whose files are on the free node.
        context: what stages get.
        attempts: says when a row whose processes die is given up; None: never.
        max_actors: of each chain that needs a GPU; None: what the cluster's GPUs hold.
        problems: gets a sentence for each node that was quarantined.
    """

    def __init__(
        self,
        tracks: Sequence[Track],
        context: Any,
        attempts: Attempts | None,
        max_actors: int | None,
        problems: list[str],
    ):
        import ray

        self.attempts = attempts
        self.readable = Readable(tracks)
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
            if step.needs[1]
        }
        self.tasks = {
            number: {"num_returns": 2, "max_retries": 0, **self.cluster.options(step.needs)}
            for number, step in enumerate(self.steps)
            if number not in self.pools
        }
        self.call = ray.remote(run_batch)
        self.waiting: list[deque[Batch]] = [deque() for _ in self.steps]
        self.flying: dict[Any, Batch] = {}
        self.counts: Counter[int] = Counter()  # batches in flight, by step
        self.freed: deque[str] = deque()  # nodes where tasks have ended
        self.origins = count()
        self.between_bytes = 0  # of payloads that wait or are being read
        self.largest_bytes = 0
        self.rows_per_task: Counter[int] = Counter()  # by first step

    def run(self, rows: Iterable[Row], added: deque[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
        """Yield (track, row) of each finished row as it comes. Args: of `Runner`."""
        self.source = iter(rows)
        self.exhausted = False
        firsts = {step.track.name: step.first for step in self.steps}
        try:
            while True:
                self._submit()
                if not self.flying and not any(self.waiting):
                    return
                for batch, done, node in self._landed():
                    step, given = self.steps[batch.step], 0
                    for packed in done:
                        yield step.track.name, _fate(unpack_row(packed))
                        origin, given = next(self.origins), given + len(added)
                        for name, row in added:
                            packed_row, first = pack_row(self.readable(name, row)), firsts[name]
                            self.waiting[first].append(Batch([packed_row], [row["key"]], first, node, origin))
                        added.clear()
                    if given:  # one row a task, so that what they give can be spread over nodes
                        self.rows_per_task[step.first] = 1
                    if self.attempts is not None:
                        self.attempts.end(step.name, batch.keys)
        finally:
            self._close()

    # ------------------------------------------------------------ out

    def _submit(self) -> None:
        self.cluster.refresh()
        for number, pool in self.pools.items():
            step = self.steps[number]
            is_awaited = number == step.last or not self.waiting[number + 1]
            pool.resize(len(self.waiting[number]), is_awaited)
            if number == 0 and not self.waiting[0]:
                self._read_source()
            while self.waiting[number] and (actor := pool.free(self.waiting[number][0].tried_on)):
                batch = self._take(number, "")
                self._fly(batch, pool.call(actor, batch.payload or batch.rows))
                if number == 0 and not self.waiting[0]:
                    self._read_source()
        while not self._all_cpus_busy() or not self.flying:
            node = self.freed.popleft() if self.freed else ""
            chosen = self._next_step(node)
            if chosen is None:
                break
            batch = self._take(chosen, node)
            self._fly(batch, self._task(batch, node))
        self.freed.clear()

    def _task(self, batch: Batch, node: str) -> Any:
        """Return the references to what a task gives that was just submitted, to a node where its files are."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = self.tasks[batch.step]
        if node and batch.node == node:
            # Beside actors it must not wait for a CPU that one of them has taken meanwhile and never gives back.
            place = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=bool(self.pools))
            options = options | {"scheduling_strategy": place}
        return self.call.options(**options).remote(self.steps[batch.step].work, batch.payload or batch.rows)

    def _fly(self, batch: Batch, references: Any) -> None:
        step = self.steps[batch.step]
        if self.attempts is not None and batch.step == step.first:
            self.attempts.begin(step.name, batch.keys)
        facts, batch.result = references
        self.flying[facts] = batch
        self.counts[batch.step] += 1

    def _read_source(self) -> None:
        found = list(islice(self.source, self._num_rows(0)))
        self.exhausted = len(found) < self._num_rows(0)
        if found:
            name = self.steps[0].track.name
            packed = [pack_row(self.readable(name, row)) for row in found]
            self.waiting[0].append(Batch(packed, [row["key"] for row in found]))

    def _num_rows(self, first: int) -> int:
        """Return how many rows a task of a track takes; where chains follow, one, so that they can be balanced."""
        return max(1, self.rows_per_task[first]) if self.steps[first].last == first else 1

    def _take(self, number: int, node: str) -> Batch:
        """Return the next batch of a step, of this node if there is one, filled up to a task's rows.

        A batch of another node moves to this one, with all that come from the same row: they share its files.
        """
        waiting = self.waiting[number]
        near = (place for place, batch in enumerate(waiting) if batch.node in ("", node))
        place = next(near, len(waiting) - 1) if node else 0  # of another node the last, which would wait longest
        batch = waiting[place]
        del waiting[place]
        if node and batch.node and batch.node != node:
            for other in (batch, *waiting):
                if other.origin == batch.origin:
                    other.node = node
        while number and len(batch.keys) < self._num_rows(number) and place < len(waiting):
            other = waiting[place]
            if other.node != batch.node or other.lost or other.tried_on or batch.lost or batch.tried_on:
                break
            batch.rows += other.rows
            batch.keys += other.keys
            del waiting[place]
        return batch

    def _next_step(self, node: str) -> int | None:
        """Return the step that the next task is for, None where none is to be submitted now.

        Args:
            node: where a task has just ended, so that its CPU is free; "" if any may be.
        """
        steps = [number for number in self.tasks if self._has_input(number)]
        for number, pool in self.pools.items():  # a GPU must never wait for what feeds it
            first = self.steps[number].first
            own = [step for step in steps if first <= step < number]
            feeding = own or [step for step in steps if step < number]
            coming = sum(self.counts[step] for step in range(first if own else 0, number))
            if feeding and len(self.waiting[number]) + coming < pool.hunger:
                steps = feeding
                break
        near = [number for number in steps if not node or self._is_near(number, node)]
        return max(near or steps, default=None)

    def _is_near(self, number: int, node: str) -> bool:
        """Return True where a step has rows whose files are on a node, or can be on any."""
        if number == 0 or number != self.steps[number].first:
            return True
        return any(batch.node in ("", node) for batch in self.waiting[number])

    def _has_input(self, number: int) -> bool:
        if number == self.steps[number].first and not self._has_room(number):
            return False
        if self.waiting[number]:
            return True
        if number or self.exhausted:
            return False
        self._read_source()
        return bool(self.waiting[0])

    def _has_room(self, first: int) -> bool:
        """Return False while too much of what this track gives waits: rows of later tracks, or between its chains."""
        later = {step.first for step in self.steps if step.first > first}
        if sum(len(self.waiting[number]) for number in later) > AHEAD * self._num_slots():
            return False
        if self.steps[first].last == first:
            return True
        ahead = self.between_bytes + self.counts[first] * self.largest_bytes
        return not ahead or ahead + self.largest_bytes <= self.cluster.store_bytes * STORE_SHARE

    def _num_slots(self) -> int:
        """Return how many tasks the CPUs can run at once, beside the actors."""
        taken = sum(pool.num_cpus for pool in self.pools.values())
        each = max((self.steps[number].needs[0] for number in self.tasks), default=1.0)
        return max(1, math.floor((self.cluster.num_cpus - taken) / max(each, 0.01)))

    def _all_cpus_busy(self) -> bool:
        return sum(self.counts[number] for number in self.tasks) >= self._num_slots() + SPARE_TASKS

    # ------------------------------------------------------------ back

    def _landed(self) -> Iterator[tuple[Batch, list[dict[str, Any]], str]]:
        """Yield (batch, its packed rows, their node) of what ended a track; pass on or begin again all else."""
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
            pool, step = self.pools.get(batch.step), self.steps[batch.step]
            try:
                facts: Facts = ray.get(reference)
                done = ray.get(batch.result) if batch.step == step.last else None
            except ray.exceptions.RayError as error:
                died = isinstance(error, died_errors)
                self._begin_again(batch, error, died if pool is None else pool.lost(reference, died))
                continue
            if pool is not None and pool.returned(reference, facts.node, facts.has_bug, batch.tried_on):
                self._drop_payload(batch)
                self._restart(batch)  # a bug that may be the node's: tried on another
                continue
            self._drop_payload(batch)
            if pool is None and self.cluster.num_nodes > 1:
                self.freed.append(facts.node)
            if done is not None:
                self._learn(step.first, facts, len(done))
                yield batch, done, facts.node
                continue
            batch.step += 1
            batch.payload, batch.size_bytes = batch.result, facts.size_bytes
            self.between_bytes += facts.size_bytes
            self.largest_bytes = max(self.largest_bytes, facts.size_bytes)
            self.waiting[batch.step].append(batch)

    def _drop_payload(self, batch: Batch) -> None:
        self.between_bytes -= batch.size_bytes
        batch.payload, batch.size_bytes = None, 0

    def _learn(self, first: int, facts: Facts, count: int) -> None:
        """Aim at tasks of TASK_S, from those that have ended; growing by no more than twice at a time."""
        wanted = int(TASK_S * count / max(facts.seconds, 1e-6))
        self.rows_per_task[first] = max(1, min(wanted, 2 * self._num_rows(first), MAX_ROWS_PER_TASK))

    def _begin_again(self, batch: Batch, error: Exception, is_culprit: bool) -> None:
        """Put the rows of a call that died with its process back to the start, each alone; refuse those that kill."""
        from ray.exceptions import RayError, RayTaskError

        if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
            raise error
        step = self.steps[batch.step]
        batch.lost += 1
        logger.warning("%s: a process was lost with %s (%s)", step.name, batch.keys[0], type(error).__name__)
        if batch.lost > NUM_LOST:
            raise error
        self._drop_payload(batch)
        if is_culprit and self.attempts is not None:
            self.attempts.died(step.name, batch.keys)
        for packed, key in zip(batch.rows, batch.keys, strict=True):
            if self.attempts is not None and not self.attempts.may(step.name, key):
                row = unpack_row(packed)
                packed = pack_row(
                    refused(row, "bad", step.name, "worker_crash", "the processes that worked on it died")
                )
            self._restart(Batch([packed], [key], batch.step, lost=batch.lost, tried_on=batch.tried_on))

    def _restart(self, batch: Batch) -> None:
        batch.step = self.steps[batch.step].first
        self.waiting[batch.step].appendleft(batch)

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
