"""The queue of a stream: rows that wait for a task, and the choice of which comes next.

A finished row may produce rows of a later track; these take priority and run on the same node, where their files are.
Between two chains of a track, rows wait in Ray's object store, within a size limit.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from pipelines.runtime.pool import Cluster, Needs
from pipelines.runtime.stage import Readable, Row, Track, pack_row, size_of
from pipelines.runtime.worker import Facts

TASK_S = 1.0  # target duration of a task, by its number of rows, so that Ray's milliseconds of overhead do not matter
MAX_ROWS_PER_TASK = 64
SHARES = 4  # tasks into which each CPU's part of the last rows is divided
AHEAD = 8  # rows of later tracks that may wait, per concurrent task, before earlier tracks are paused
TASK_BYTES = 4 << 20  # size at which a task gets no further rows
# No more rows of the first track are read while so many bytes of them are under way: the driver holds them until they
# finish. The largest are units of a fresh run, 9 MB for 4,000 videos: some 15 at once, each of a second or two.
SOURCE_BYTES = 128 << 20
STORE_SHARE = 0.5  # fraction of Ray's object store that rows between two chains may take


@dataclass
class Batch:
    """Rows that travel together.

    Args:
        rows: packed, as they entered the first chain of their track; a lost batch restarts from them.
        step: index of the step that they wait for or are in.
        node: node of the row that produced these, where their files are; "" if any node will do.
        origin: number of the row that produced these; -1 if none did.
        payload: reference to the input of the step, None at the first step; `size_bytes` is its size.
        result: reference to the output of the step.
        source_bytes: size of the rows, if they are of the first track; of a batch that was split, of all its rows.
        lost: number of restarts. tried_on: nodes where these rows ended in a bug.
    """

    rows: list[dict[str, Any]]
    keys: list[str]
    step: int = 0
    node: str = ""
    origin: int = -1
    payload: Any = None
    size_bytes: int = 0
    result: Any = None
    source_bytes: int = 0
    lost: int = 0
    tried_on: set[str] = field(default_factory=set)

    @property
    def is_fresh(self) -> bool:
        """True if nothing has gone wrong with these rows yet, so that they may share a task with others."""
        return not self.lost and not self.tried_on


@dataclass(frozen=True)
class Step:
    """A chain and its place among the chains of all tracks. first, last: indices of its track's first and last step."""

    track: Track
    work: Any
    needs: Needs
    first: int
    last: int

    @property
    def name(self) -> str:
        """Name of the work on its rows, in the attempts file and in messages."""
        return self.track.stages[0].name

    @property
    def on_gpu(self) -> bool:
        """True if actors run it, which hold a GPU."""
        return bool(self.needs[1])


class Backlog:
    """The queues of all steps.

    Args:
        steps: the steps of all tracks, in order.
        rows: rows of the first track. They are read lazily, when no row of a later track is waiting, or none whose
            files are on a free node. If they have a length, tasks become smaller towards the end.
        cluster: reports the current size of the object store.
    """

    def __init__(self, steps: Sequence[Step], rows: Iterable[Row], cluster: Cluster):
        self.steps, self._source, self._cluster = steps, iter(rows), cluster
        self._readable = Readable(list({step.track.name: step.track for step in steps}.values()))
        self._firsts = {step.track.name: step.first for step in steps}
        self.waiting: list[deque[Batch]] = [deque() for _ in steps]
        self.in_flight: Counter[int] = Counter()  # batches, by step
        self.exhausted = False  # all rows of the first track were read
        self._num_left = len(rows) if isinstance(rows, Sized) else None  # rows of the first track that were not read
        self._num_slots = 1
        self._origins = count()
        self._between_bytes = 0  # size of the payloads that wait or are being read
        self._largest_bytes = 0
        self._source_bytes = 0  # size of the rows of the first track that are under way
        self._rows_per_task: Counter[int] = Counter()  # by first step

    # ------------------------------------------------------------ into the queues

    def read_source(self) -> None:
        """Append the next rows of the first track to its queue, unless too many are under way."""
        batch = Batch([], [])
        while self._source_bytes < SOURCE_BYTES and len(batch.keys) < self._num_rows(0):
            row = next(self._source, None)
            if row is None:
                self.exhausted = True
                break
            packed = pack_row(self._readable(self.steps[0].track.name, row))
            self._num_left = None if self._num_left is None else self._num_left - 1
            batch.rows.append(packed)
            batch.keys.append(row["key"])
            batch.source_bytes += size_of(packed)
            self._source_bytes += size_of(packed)
            if batch.source_bytes >= TASK_BYTES:
                break
        if batch.keys:
            self.waiting[0].append(batch)

    def add(self, given: Sequence[tuple[str, Row]], parent: int, node: str) -> None:
        """Append the rows (track, row) that a finished row of a step produced on `node`."""
        origin = next(self._origins)
        for name, row in given:
            packed, first = pack_row(self._readable(name, row)), self._firsts[name]
            self.waiting[first].append(Batch([packed], [row["key"]], first, node, origin))
        if given:  # one row per task, so that the rows it produces can spread over the nodes
            self._rows_per_task[self.steps[parent].first] = 1

    def advance(self, batch: Batch, size_bytes: int) -> None:
        """Queue a batch for its next step; `size_bytes` is the size of its result."""
        batch.step += 1
        batch.payload, batch.size_bytes = batch.result, size_bytes
        self._between_bytes += size_bytes
        self._largest_bytes = max(self._largest_bytes, size_bytes)
        self.waiting[batch.step].append(batch)

    def restart(self, batch: Batch) -> None:
        """Restart a batch from the first step of its track, ahead of all others."""
        self.drop_payload(batch)
        batch.step = self.steps[batch.step].first
        self.waiting[batch.step].appendleft(batch)

    def drop_payload(self, batch: Batch) -> None:
        """Release the payload of a batch."""
        self._between_bytes -= batch.size_bytes
        batch.payload, batch.size_bytes = None, 0

    def finish(self, batch: Batch) -> None:
        """Count a batch that has finished its track as no longer under way."""
        self._source_bytes -= batch.source_bytes

    def learn(self, first: int, facts: Facts, num_rows: int) -> None:
        """Adapt the rows per task to TASK_S, from the duration of a finished task; at most double them at a time."""
        wanted = int(TASK_S * num_rows / max(facts.seconds, 1e-6))
        self._rows_per_task[first] = max(1, min(wanted, 2 * self._num_rows(first), MAX_ROWS_PER_TASK))

    # ------------------------------------------------------------ out of the queues

    def take(self, number: int, node: str) -> Batch:
        """Return the next batch of a step, preferably one of `node`, filled up with the rows of a task.

        If a batch of another node is taken, all batches of the same origin move to this node, as they share its files.
        """
        waiting = self.waiting[number]
        near = (place for place, batch in enumerate(waiting) if batch.node in ("", node))
        place = next(near, len(waiting) - 1) if node else 0  # if none is near, the last, which would wait longest
        batch = waiting[place]
        del waiting[place]
        if node and batch.node and batch.node != node:
            for other in (batch, *waiting):
                if other.origin == batch.origin:
                    other.node = node
        while number and len(batch.keys) < self._num_rows(number) and place < len(waiting):
            other = waiting[place]
            if other.node != batch.node or not (other.is_fresh and batch.is_fresh):
                break
            batch.rows += other.rows
            batch.keys += other.keys
            del waiting[place]
        return batch

    def next_step(self, node: str, wanted_inputs: Mapping[int, int], num_slots: int) -> int | None:
        """Return the index of the step that the next task should run, None if none should be submitted now.

        Args:
            node: where a task has just ended, so that a CPU is free; "" for any.
            wanted_inputs: {index of a GPU step: batches that should wait for it or be on their way}, so that no GPU
                idles.
            num_slots: number of tasks that can run concurrently.
        """
        self._num_slots = num_slots
        steps = [n for n, step in enumerate(self.steps) if not step.on_gpu and self._has_input(n, num_slots)]
        for number, wanted in wanted_inputs.items():
            first = self.steps[number].first
            own = [step for step in steps if first <= step < number]
            feeding = own or [step for step in steps if step < number]
            coming = sum(self.in_flight[step] for step in range(first if own else 0, number))
            if feeding and len(self.waiting[number]) + coming < wanted:
                steps = feeding
                break
        near = [number for number in steps if not node or self._is_near(number, node)]
        return max(near or steps, default=None)

    def _num_rows(self, first: int) -> int:
        """Return the rows per task of a track: one if it has several chains, so that their load can be balanced."""
        number = self._rows_per_task[first] if self.steps[first].last == first else 1
        if first == 0 and self._num_left is not None:  # else one worker would end up to TASK_S after the others
            number = min(number, self._num_left // (SHARES * self._num_slots))
        return max(1, number)

    def _is_near(self, number: int, node: str) -> bool:
        """Return True if a step has waiting rows whose files are on `node`, or that can run on any node."""
        if number == 0 or number != self.steps[number].first:
            return True
        return any(batch.node in ("", node) for batch in self.waiting[number])

    def _has_input(self, number: int, num_slots: int) -> bool:
        if number == self.steps[number].first and not self._has_room(number, num_slots):
            return False
        if not self.waiting[number] and not number and not self.exhausted:
            self.read_source()
        return bool(self.waiting[number])

    def _has_room(self, first: int, num_slots: int) -> bool:
        """Return False while too much output of this track waits: rows of later tracks, or rows between its chains."""
        later = {step.first for step in self.steps if step.first > first}
        if sum(len(self.waiting[number]) for number in later) > AHEAD * num_slots:
            return False
        if self.steps[first].last == first:
            return True
        ahead = self._between_bytes + self.in_flight[first] * self._largest_bytes
        return not ahead or ahead + self._largest_bytes <= self._cluster.store_bytes * STORE_SHARE
