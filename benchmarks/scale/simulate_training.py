"""Simulate how long training takes on a cluster: steps wait for the slowest rank and the all-reduce; nodes may fail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from simulate import INF, Cluster, Outcome


@dataclass(frozen=True)
class Training:
    """A training run.

    Args:
        step_s: compute time of a rank per step. spread: standard deviation of its logarithm.
        start_s: from the start of the processes to the first step; end_s: after the last step.
        gradient_mb: reduced over all ranks per step. batch_mb: read by a rank per step, while it computes.
        weights_mb: read by each node at every start. save_s: time of a checkpoint, every `save_every` steps.
        reduce_mb_s: bandwidth of an all-reduce within a node; latency_s: of each of its 2 (ranks − 1) messages.
    """

    num_steps: int
    step_s: float
    spread: float = 0.0
    start_s: float = 0.0
    end_s: float = 0.0
    gradient_mb: float = 0.0
    batch_mb: float = 0.0
    weights_mb: float = 0.0
    save_every: int = 1_000_000_000
    save_s: float = 0.0
    reduce_mb_s: float = INF
    latency_s: float = 0.0


def train(run: Training, cluster: Cluster, seed: int = 0) -> Outcome:
    """Simulate a training on all ranks of a cluster. A lost node costs the steps since the last checkpoint."""
    random = np.random.default_rng(seed)
    ranks_of_node = cluster.gpus or cluster.cpus
    ranks = cluster.nodes * ranks_of_node
    slowest = cluster.slow_by if round(cluster.slow_share * cluster.nodes) else 1.0
    busy = cluster.busy if ranks_of_node > 1 else 1.0
    read_s = run.batch_mb * max(ranks_of_node / cluster.node_mb_s, ranks / cluster.store_mb_s)
    load_s = run.weights_mb * max(1 / cluster.node_mb_s, cluster.nodes / cluster.store_mb_s)
    reduce_s = all_reduce_s(run, cluster, ranks)
    now_s, step, saved = run.start_s + load_s, 0, 0
    outcome = Outcome(0.0, 0.0)
    fails_s = random.exponential(cluster.mtbf_s / cluster.nodes) if cluster.mtbf_s < INF else INF
    saved_s = now_s
    while step < run.num_steps:
        last = float(np.exp(run.spread * random.standard_normal(ranks).max())) if run.spread else 1.0
        now_s += max(run.step_s * last * slowest * busy, read_s) + reduce_s
        step += 1
        if step % run.save_every == 0:
            now_s += run.save_s
        if now_s > fails_s:
            outcome.failures += 1
            outcome.lost_s += fails_s - saved_s
            step, now_s = saved, fails_s + cluster.detect_s + cluster.repair_s + run.start_s + load_s
            fails_s = now_s + random.exponential(cluster.mtbf_s / cluster.nodes)
            saved_s = now_s
        elif step % run.save_every == 0:
            saved, saved_s = step, now_s
    outcome.wall_s, outcome.work_s = now_s + run.end_s, run.num_steps * run.step_s * ranks
    return outcome


def all_reduce_s(run: Training, cluster: Cluster, ranks: int) -> float:
    """Return the time of a ring all-reduce: at `reduce_mb_s` within a node, between nodes at the slower link."""
    if ranks == 1:
        return 0.0
    mb_s = min(run.reduce_mb_s, cluster.node_mb_s) if cluster.nodes > 1 else run.reduce_mb_s
    return 2 * (ranks - 1) / ranks * run.gradient_mb / mb_s + 2 * (ranks - 1) * run.latency_s
