"""The rows of a stream that wait for a task, and which of them comes next.

A finished row may give rows of a later track, which come first and run on its node, where its files are. Between two
chains of a track rows wait in the object store, within a bound.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from pipelines.runtime.pool import Cluster, Needs
from pipelines.runtime.stage import Readable, Row, Track, pack_row
from pipelines.runtime.worker import Facts

TASK_S = 1.0  # a task gets as many rows as take about so long, so that Ray's milliseconds for it do not show
MAX_ROWS_PER_TASK = 64
AHEAD = 8  # rows of later tracks that wait, over tasks that can run at once, before no earlier ones are begun
STORE_SHARE = 0.5  # of Ray's object store, which rows between two chains may take


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

    @property
    def is_fresh(self) -> bool:
        """True where nothing has gone wrong with these rows, so that they may share a task with others."""
        return not self.lost and not self.tried_on


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

    @property
    def on_gpu(self) -> bool:
        """True where an actor does it, which keeps its GPU."""
        return bool(self.needs[1])


class Backlog:
    """What waits for each step.

    Args:
        steps: of all tracks, in order.
        rows: of the first track; they are read when no row of a later one waits, or none whose files are on a free
            node.
        cluster: how large its object store is now.
    """

    def __init__(self, steps: Sequence[Step], rows: Iterable[Row], cluster: Cluster):
        self.steps, self._source, self._cluster = steps, iter(rows), cluster
        self._readable = Readable(list({step.track.name: step.track for step in steps}.values()))
        self._firsts = {step.track.name: step.first for step in steps}
        self.waiting: list[deque[Batch]] = [deque() for _ in steps]
        self.in_flight: Counter[int] = Counter()  # batches, by step
        self._exhausted = False
        self._origins = count()
        self._between_bytes = 0  # of payloads that wait or are being read
        self._largest_bytes = 0
        self._rows_per_task: Counter[int] = Counter()  # by first step

    # ------------------------------------------------------------ in

    def read_source(self) -> None:
        """Put the next rows of the first track into the backlog."""
        found = list(islice(self._source, self._num_rows(0)))
        self._exhausted = len(found) < self._num_rows(0)
        if found:
            packed = [pack_row(self._readable(self.steps[0].track.name, row)) for row in found]
            self.waiting[0].append(Batch(packed, [row["key"] for row in found]))

    def add(self, given: Sequence[tuple[str, Row]], parent: int, node: str) -> None:
        """Add the rows (track, row) that a finished row of a step gave, on the node where it ran."""
        origin = next(self._origins)
        for name, row in given:
            packed, first = pack_row(self._readable(name, row)), self._firsts[name]
            self.waiting[first].append(Batch([packed], [row["key"]], first, node, origin))
        if given:  # one row a task, so that what they give can be spread over nodes
            self._rows_per_task[self.steps[parent].first] = 1

    def advance(self, batch: Batch, size_bytes: int) -> None:
        """Let a batch whose result has so many bytes wait for its next step."""
        batch.step += 1
        batch.payload, batch.size_bytes = batch.result, size_bytes
        self._between_bytes += size_bytes
        self._largest_bytes = max(self._largest_bytes, size_bytes)
        self.waiting[batch.step].append(batch)

    def restart(self, batch: Batch) -> None:
        """Begin a batch again, before all others."""
        self.drop_payload(batch)
        batch.step = self.steps[batch.step].first
        self.waiting[batch.step].appendleft(batch)

    def drop_payload(self, batch: Batch) -> None:
        """Forget the rows between two chains that a batch took."""
        self._between_bytes -= batch.size_bytes
        batch.payload, batch.size_bytes = None, 0

    def learn(self, first: int, facts: Facts, num_rows: int) -> None:
        """Aim at tasks of TASK_S, from those that have ended; growing by no more than twice at a time."""
        wanted = int(TASK_S * num_rows / max(facts.seconds, 1e-6))
        self._rows_per_task[first] = max(1, min(wanted, 2 * self._num_rows(first), MAX_ROWS_PER_TASK))

    # ------------------------------------------------------------ out

    def take(self, number: int, node: str) -> Batch:
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
            if other.node != batch.node or not (other.is_fresh and batch.is_fresh):
                break
            batch.rows += other.rows
            batch.keys += other.keys
            del waiting[place]
        return batch

    def next_step(self, node: str, hunger: Mapping[int, int], num_slots: int) -> int | None:
        """Return the step that the next task is for, None where none is to be submitted now.

        Args:
            node: where a task has just ended, so that its CPU is free; "" if any may be.
            hunger: {step of actors: batches that they should find}: a GPU must never wait for what feeds it.
            num_slots: tasks that can run at once.
        """
        steps = [n for n, step in enumerate(self.steps) if not step.on_gpu and self._has_input(n, num_slots)]
        for number, wanted in hunger.items():
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
        """Return how many rows a task of a track takes; where chains follow, one, so that they can be balanced."""
        return max(1, self._rows_per_task[first]) if self.steps[first].last == first else 1

    def _is_near(self, number: int, node: str) -> bool:
        """Return True where a step has rows whose files are on a node, or can be on any."""
        if number == 0 or number != self.steps[number].first:
            return True
        return any(batch.node in ("", node) for batch in self.waiting[number])

    def _has_input(self, number: int, num_slots: int) -> bool:
        if number == self.steps[number].first and not self._has_room(number, num_slots):
            return False
        if not self.waiting[number] and not number and not self._exhausted:
            self.read_source()
        return bool(self.waiting[number])

    def _has_room(self, first: int, num_slots: int) -> bool:
        """Return False while too much of what this track gives waits: rows of later tracks, or between its chains."""
        later = {step.first for step in self.steps if step.first > first}
        if sum(len(self.waiting[number]) for number in later) > AHEAD * num_slots:
            return False
        if self.steps[first].last == first:
            return True
        ahead = self._between_bytes + self.in_flight[first] * self._largest_bytes
        return not ahead or ahead + self._largest_bytes <= self._cluster.store_bytes * STORE_SHARE
