"""Simulate how long preprocess takes on a cluster, by discrete events.

As in `pipelines/runtime/stream.py`, rows go through chains of stages, finished rows yield rows of the next track (a
video yields its clips), later tracks have priority, tasks take about a second, and there is one driver. A node has
CPUs, GPUs and a network link; all nodes share a store. A node may be slow, or fail: its tasks restart on other nodes.
Links and the driver serve one request after another at full speed, which gives the throughput of fair sharing.
`scaling.py` measures costs and runs, `scaling_curve.py` compares them.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np

TASK_S, MAX_ROWS_PER_TASK, AHEAD = 1.0, 64, 8  # as in pipelines/runtime/backlog.py
INF = math.inf


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes.

    Args:
        cpus, gpus: tasks that a node runs at once. In training, a node has one rank per GPU, or per CPU without GPUs.
        node_mb_s: bandwidth of a node; store_mb_s: total bandwidth of the store.
        busy: factor on a task's time while all CPUs of its node are busy.
        slow_share: share of slow nodes; slow_by: factor on their tasks' time.
        mtbf_s: mean time between failures of one node; detect_s: until its tasks restart; repair_s: until it is back.
    """

    nodes: int = 1
    cpus: int = 1
    gpus: int = 0
    node_mb_s: float = INF
    store_mb_s: float = INF
    busy: float = 1.0
    slow_share: float = 0.0
    slow_by: float = 1.0
    mtbf_s: float = INF
    detect_s: float = 30.0
    repair_s: float = 600.0


class Step(NamedTuple):
    """Cost of one chain of stages for a row: seconds on a "cpu" or "gpu", after reading `mb` over the network."""

    kind: str
    seconds: float
    mb: float = 0.0


class Row(NamedTuple):
    """A row of a track, and the rows of the next track that it yields when it finishes."""

    steps: Sequence[Step]
    gives: Sequence[Row] = ()


@dataclass(frozen=True)
class Pass:
    """Rows of one pass; all rows of a track have the same kinds of steps.

    Args:
        tracks: for each track, the extra seconds of a process's first task.
        plan_s: the driver's work before the pass, while no task runs.
    """

    rows: Sequence[Row]
    tracks: Sequence[float] = (0.0,)
    plan_s: float = 0.0


@dataclass(frozen=True)
class Overhead:
    """Time of a run beside its stages: start and end, the driver's time per task and per row, a worker's per row."""

    start_s: float = 0.0
    driver_s: float = 0.0
    driver_row_s: float = 0.0
    row_s: float = 0.0


@dataclass
class Outcome:
    """The result of a simulated run: its duration, the work of all tasks, and the work lost in node failures."""

    wall_s: float
    work_s: float
    lost_s: float = 0.0
    failures: int = 0


@dataclass
class Task:
    """Rows of one task. step: index over all tracks of the step that they wait for or are in; work_s: work of that."""

    rows: list[Row]
    step: int = 0
    started_s: float = 0.0
    work_s: float = 0.0


@dataclass
class Node:
    """A node. `life` counts its failures, to recognise events from before one; `lost`: tasks that must restart."""

    slow_by: float
    link_free_s: float = 0.0
    life: int = 0
    warm: Counter[int] = field(default_factory=Counter)
    running: dict[int, Task] = field(default_factory=dict)
    lost: list[Task] = field(default_factory=list)


class Preprocess:
    """One simulated run of `ex4d preprocess`."""

    def __init__(self, cluster: Cluster, overhead: Overhead, seed: int = 0):
        self.cluster, self.overhead = cluster, overhead
        self.random = np.random.default_rng(seed)
        num_slow = round(cluster.slow_share * cluster.nodes)
        self.nodes = [Node(cluster.slow_by if index < num_slow else 1.0) for index in range(cluster.nodes)]
        self.free = {kind: deque((node, 0) for _ in range(each) for node in self.nodes) for kind, each in self._slots()}
        self.events: list[tuple[float, int, str, Node, int]] = []
        self.numbers = count()
        self.now_s, self.driver_free_s, self.store_free_s = overhead.start_s, 0.0, 0.0
        self.outcome = Outcome(0.0, 0.0)
        for node in self.nodes:
            self._fail_some_day(node)

    def _slots(self) -> tuple[tuple[str, int], ...]:
        return ("cpu", self.cluster.cpus), ("gpu", self.cluster.gpus)

    def run(self, passes: Sequence[Pass]) -> Outcome:
        """Simulate the passes one after another, and return the outcome."""
        for one in passes:
            self.now_s += one.plan_s
            self._run_pass(one)
        self.outcome.wall_s = self.now_s
        return self.outcome

    def _run_pass(self, one: Pass) -> None:
        levels, example = [], one.rows[:1]
        while example:  # the first row of each track shows its steps
            levels.append([step.kind for step in example[0].steps])
            example = example[0].gives[:1]
        self.kinds = [kind for kinds in levels for kind in kinds]
        self.track = [number for number, kinds in enumerate(levels) for _ in kinds]
        self.first = [self.track.index(number) for number in range(len(levels))]
        self.waiting: list[deque[Task]] = [deque() for _ in self.kinds]
        self.source, self.left = deque(one.rows), len(one.rows)
        self.flying: Counter[int] = Counter()
        self.rows_per_task: Counter[int] = Counter()
        self.warm_s = one.tracks
        for node in self.nodes:
            node.warm.clear()
        while self.left:
            while (step := self._next_step()) is not None:
                self._begin(self._take(step), step)
            if not self.events:
                raise RuntimeError("every node is gone, and none comes back")
            self.now_s, number, what, node, life = heapq.heappop(self.events)
            {"end": self._end, "fail": self._fail, "back": self._back, "again": self._again}[what](number, node, life)

    def _next_step(self) -> int | None:
        """Return the step to start now: one that feeds a GPU which would run out of work, else the latest."""
        able = [step for step in range(len(self.kinds)) if self._has_input(step) and self._has_slot(self.kinds[step])]
        for gpu in (step for step, kind in enumerate(self.kinds) if kind == "gpu"):
            first = self.first[self.track[gpu]]
            own = [step for step in able if first <= step < gpu]
            feeding = own or [step for step in able if step < gpu]
            hunger = 2 * self.cluster.gpus * self.cluster.nodes
            coming = sum(self.flying[step] for step in range(first if own else 0, gpu))
            if feeding and len(self.waiting[gpu]) + coming < hunger:
                return max(feeding)
        return max(able, default=None)

    def _has_input(self, step: int) -> bool:
        ahead = sum(len(self.waiting[first]) for first in self.first if first > step)
        if step in self.first and ahead > AHEAD * self.cluster.nodes * self.cluster.cpus:
            return False
        return bool(self.waiting[step] or (step == 0 and self.source))

    def _has_slot(self, kind: str) -> bool:
        slots = self.free[kind]
        while slots and slots[0][1] != slots[0][0].life:  # slots of a node that failed
            slots.popleft()
        return bool(slots)

    def _take(self, step: int) -> Task:
        waiting, track = self.waiting[step], self.track[step]
        number = max(1, self.rows_per_task[track]) if self.track.count(track) == 1 else 1
        if not waiting:
            return Task([self.source.popleft() for _ in range(min(number, len(self.source)))])
        task = waiting.popleft()
        while step == self.first[track] and waiting and len(task.rows) < number:
            task.rows += waiting.popleft().rows
        return task

    def _begin(self, task: Task, step: int) -> None:
        node, life = self.free[self.kinds[step]].popleft()
        number, task.step, task.started_s = next(self.numbers), step, self.now_s
        node.running[number] = task
        self.flying[step] += 1
        driver_s = self.overhead.driver_s + self.overhead.driver_row_s * len(task.rows)
        self.driver_free_s = max(self.now_s, self.driver_free_s) + driver_s
        track = self.track[step]
        steps = [row.steps[step - self.first[track]] for row in task.rows]
        starts_s = self._read(node, self.driver_free_s, sum(one.mb for one in steps))
        is_full = len(node.running) >= self.cluster.cpus > 1
        task.work_s = sum(one.seconds for one in steps) * node.slow_by * (self.cluster.busy if is_full else 1)
        if sum(self.track[other.step] == track for other in node.running.values()) > node.warm[track]:
            node.warm[track] += 1
            task.work_s += self.warm_s[track]
        self.outcome.work_s += task.work_s
        ends_s = starts_s + self.overhead.row_s * len(task.rows) + task.work_s
        self._at(ends_s, "end", node, life, number)

    def _read(self, node: Node, begin_s: float, mb: float) -> float:
        """Return the time at which `mb` megabytes have passed through the store and the node's link."""
        if not mb:
            return begin_s
        self.store_free_s = max(begin_s, self.store_free_s) + mb / self.cluster.store_mb_s
        node.link_free_s = max(begin_s, node.link_free_s) + mb / self.cluster.node_mb_s
        return max(self.store_free_s, node.link_free_s)

    def _at(self, when_s: float, what: str, node: Node, life: int, number: int | None = None) -> None:
        heapq.heappush(self.events, (when_s, next(self.numbers) if number is None else number, what, node, life))

    def _end(self, number: int, node: Node, life: int) -> None:
        if life != node.life:
            return  # lost with its node
        task = node.running.pop(number)
        track, following = self.track[task.step], task.step + 1
        self.flying[task.step] -= 1
        self.free[self.kinds[task.step]].append((node, life))
        if following < len(self.kinds) and self.track[following] == track:
            self.waiting[following].append(Task(task.rows, following))
            return
        given = [row for finished in task.rows for row in finished.gives]
        self.left += len(given) - len(task.rows)
        if given:
            self.waiting[following].extend(Task([row], following) for row in given)
        wanted = 1 if given else int(TASK_S * len(task.rows) / max(task.work_s, 1e-6))
        self.rows_per_task[track] = max(1, min(wanted, 2 * max(1, self.rows_per_task[track]), MAX_ROWS_PER_TASK))

    # ------------------------------------------------------------ failures

    def _fail_some_day(self, node: Node) -> None:
        if self.cluster.mtbf_s < INF:
            self._at(self.now_s + self.random.exponential(self.cluster.mtbf_s), "fail", node, node.life)

    def _fail(self, number: int, node: Node, life: int) -> None:
        self.outcome.failures += 1
        self._at(self.now_s + self.cluster.detect_s, "again", node, life)
        if self.cluster.repair_s < INF:
            self._at(self.now_s + self.cluster.repair_s, "back", node, life)
        node.life += 1
        node.lost += node.running.values()
        self.outcome.lost_s += sum(self.now_s - task.started_s for task in node.running.values())
        node.running.clear()

    def _again(self, number: int, node: Node, life: int) -> None:
        """Restart the tasks of a lost node from the beginning."""
        for task in node.lost:
            self.flying[task.step] -= 1
            first = self.first[self.track[task.step]]
            self.waiting[first].extendleft(Task([row], first) for row in task.rows)
        node.lost.clear()

    def _back(self, number: int, node: Node, life: int) -> None:
        node.warm.clear()
        for kind, each in self._slots():
            self.free[kind].extend((node, node.life) for _ in range(each))
        self._fail_some_day(node)
