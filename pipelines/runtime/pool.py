"""Actors of a chain that needs a GPU: as many as the cluster has room for and the work needs, on healthy nodes only."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

CALLS = 2  # calls that an actor may hold: one that runs, and one whose rows are transferred meanwhile
IDLE_S = 30.0  # an actor that idles this long gives its CPU and GPU back, unless it is the first of its pool
REFRESH_S = 1.0  # minimum interval between two queries of the cluster's state
RUN_OF_FAILURES = 3  # consecutive rows that end in a bug on one node before it is quarantined

Needs = tuple[float, float, int | None]  # num_cpus, num_gpus, memory_mb of a call


class Cluster:
    """The cluster's current resources: nodes join and leave while a pass runs."""

    def __init__(self) -> None:
        self._asked = -REFRESH_S
        self.refresh()

    def refresh(self) -> None:
        """Query Ray, unless that was done a moment ago."""
        if time.monotonic() - self._asked < REFRESH_S:
            return
        import ray

        self._asked = time.monotonic()
        nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        self.num_nodes = len(nodes)
        self.memory = [int(resources.get("memory", 0)) for resources in nodes.values()]
        self.gpus = {node: resources["GPU"] for node, resources in nodes.items() if resources.get("GPU")}
        self.num_cpus = sum(resources.get("CPU", 0.0) for resources in nodes.values())
        self.store_bytes = sum(resources.get("object_store_memory", 0.0) for resources in nodes.values())

    def options(self, needs: Needs) -> dict[str, Any]:
        """Return the Ray options of one call, except for GPUs."""
        num_cpus, _, memory_mb = needs
        options: dict[str, Any] = {"num_cpus": num_cpus}
        if memory_mb is not None:
            # A machine with less memory runs one call at a time; else the call would wait forever for a larger node.
            options["memory"] = min(memory_mb << 20, max(self.memory))
        return options


def room(
    num_cpus: float, num_gpus: float, memory: Sequence[int], options: dict[str, Any], each: float
) -> tuple[int, dict[str, Any]]:
    """Return (number of actors that fit on the GPUs, what each of them reserves besides its GPU).

    Actors hold their resources, and rows reach them through tasks that need as much again. If actors held all CPUs or
    all memory, neither could start. If there is only enough for one, the actor reserves none.

    Args:
        num_cpus, num_gpus: totals of the cluster. memory: bytes of each node.
        options: `num_cpus` and optionally `memory` (bytes) of a call. each: GPUs per actor.
    """
    # Ray never spreads a share over two GPUs: of 0.3 each of them holds three.
    size = int(num_gpus / each) if each >= 1 else int(num_gpus) * int(1 / each + 1e-6)
    size, taken = max(1, size), dict(options)
    rooms = {"num_cpus": int(num_cpus / options["num_cpus"]) if options["num_cpus"] else size + 1}
    if "memory" in options:
        rooms["memory"] = sum(there // options["memory"] for there in memory)
    for name, places in rooms.items():
        size = max(1, min(size, places - 1))
        if places < 2:
            taken[name] = 0 if name == "num_cpus" else None  # Ray reserves 1 CPU if it is given None
    return size, taken


@dataclass
class Member:
    """An actor: its handle, its node ("" until it has started), its pending calls, and whether we killed it."""

    actor: Any
    started: Any
    num_cpus: float
    node: str = ""
    calls: deque[Any] = field(default_factory=deque)
    idle_since: float = field(default_factory=time.monotonic)
    was_killed: bool = False


class Pool:
    """The actors of one chain.

    Args:
        worker: the actor's class.
        work: reference to the argument of its constructor.
        most: maximum number of actors; None: as many as fit. At least one is always requested.
        problems: receives a sentence for each node that is quarantined.
    """

    def __init__(self, worker: type, work: Any, needs: Needs, most: int | None, cluster: Cluster, problems: list[str]):
        self.worker, self.work, self.needs, self.most = worker, work, needs, most
        self.cluster, self.problems = cluster, problems
        self.members: list[Member] = []
        self.of_call: dict[Any, Member] = {}
        self.failures: Counter[str] = Counter()
        self.quarantined: set[str] = set()

    @property
    def num_cpus(self) -> float:
        """CPUs that the actors reserve."""
        return sum(member.num_cpus for member in self.members)

    @property
    def wanted_inputs(self) -> int:
        """Number of batches that should be waiting for the actors or be on their way."""
        return CALLS * max(1, len(self.members)) + 1

    def resize(self, num_waiting: int, is_awaited: bool) -> None:
        """Add an actor if work waits for the pool and the next step waits for the pool's output; drop idle actors."""
        import ray

        for member in [member for member in self.members if not member.node]:
            if ray.wait([member.started], timeout=0)[0]:
                try:
                    member.node = ray.get(member.started)
                except ray.exceptions.RayError:
                    self._drop(member)
        gpus = sum(count for node, count in self.cluster.gpus.items() if node not in self.quarantined)
        options = self.cluster.options(self.needs)
        most, taken = room(self.cluster.num_cpus, gpus, self.cluster.memory, options, self.needs[1])
        most = most if self.most is None else min(self.most, max(most, len(self.members) + 1))
        starting = any(not member.node for member in self.members)
        is_full = num_waiting and all(len(member.calls) >= CALLS for member in self.members)
        if not self.members or (is_full and is_awaited and not starting and len(self.members) < most):
            self._start(taken)
        for member in self.members[1:]:
            if not member.calls and member.node and time.monotonic() - member.idle_since > IDLE_S:
                self._kill(member)

    def _start(self, taken: dict[str, Any]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {**taken, "num_gpus": self.needs[1], "max_restarts": 0}
        if self.quarantined:
            used = Counter(member.node for member in self.members)
            good = [node for node in self.cluster.gpus if node not in self.quarantined]
            if good:
                node = min(good, key=lambda node: used[node] / self.cluster.gpus[node])
                options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        actor: Any = ray.remote(self.worker).options(**options).remote(self.work)
        self.members.append(Member(actor, actor.node.remote(), float(taken["num_cpus"])))

    def free(self, avoided: set[str]) -> Member | None:
        """Return an actor that accepts another call, preferably not on the avoided nodes; None if all are busy."""
        there = [member for member in self.members if member.node]
        there = [member for member in there if member.node not in avoided] or there
        free = [member for member in there if len(member.calls) < CALLS]
        return min(free, key=lambda member: len(member.calls), default=None)

    def call(self, member: Member, rows: Any) -> list[Any]:
        """Submit a call; return the references to its Facts and its packed rows."""
        references: list[Any] = member.actor.run.options(num_returns=2).remote(rows)
        member.calls.append(references[0])
        self.of_call[references[0]] = member
        return references

    def returned(self, call: Any, node: str, has_bug: bool, tried_on: set[str], lost_gpu: bool = False) -> bool:
        """Record that a call returned; return True if its bug may be the node's fault and another node can try.

        Args:
            tried_on: nodes where these rows ended in a bug before; after a bug, `node` is added.
            lost_gpu: the actor cannot use its GPU any more and is replaced.
        """
        member = self.of_call.pop(call)
        member.calls.remove(call)
        member.idle_since = time.monotonic()
        if lost_gpu:
            self._kill(member)
        if not has_bug:
            self.failures[node] = 0
            return False
        self.failures[node] += 1
        tried_on.add(node)
        others = set(self.cluster.gpus) - self.quarantined - {node}
        if others and self.failures[node] >= RUN_OF_FAILURES and node not in self.quarantined:
            self._quarantine(node)
        return bool(others - tried_on)

    def _quarantine(self, node: str) -> None:
        self.quarantined.add(node)
        sentence = (
            f"node {node[:12]} failed {RUN_OF_FAILURES} rows in succession and was quarantined; its rows were done on "
            "other nodes. Check its GPU, or remove the node from the cluster"
        )
        logger.error(sentence)
        self.problems.append(sentence)
        for member in [member for member in self.members if member.node == node]:
            self._kill(member)

    def lost(self, call: Any, actor_died: bool) -> bool:
        """Record that a call failed; return True if the actor died working on it, unless we killed the actor."""
        member = self.of_call.pop(call)
        was_first = bool(member.calls) and member.calls[0] == call
        if actor_died:
            self._drop(member)
        else:
            member.calls.remove(call)
        return actor_died and was_first and not member.was_killed

    def _kill(self, member: Member) -> None:
        import ray

        member.was_killed = True
        ray.kill(member.actor)
        self._drop(member)

    def _drop(self, member: Member) -> None:
        if member in self.members:
            self.members.remove(member)

    def close(self) -> None:
        """Kill the actors."""
        import ray

        for member in self.members:
            ray.kill(member.actor)
