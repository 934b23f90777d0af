"""The stream over a cluster: lost work is redone elsewhere, pools follow the cluster, broken nodes are avoided.

Each test starts a cluster of its own, in a process of its own: one process can be in one cluster only. GPUs are
pretended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HEAD = """
import collections, json, os, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from pipelines.runtime import pool, runner
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.stage import Stage, new_row
folder = sys.argv[1]

def node_of():
    return ray.get_runtime_context().get_node_id()

def mark(name, value):
    with open(os.path.join(folder, name), "a") as file:
        file.write(value + "\\n")

def lines(name):
    path = os.path.join(folder, name)
    return open(path).read().split() if os.path.exists(path) else []

def decode(row, context):
    return {"pixels": row["number"]}

def depth(row, context):
    time.sleep(0.05)
    mark("gpu", node_of())
    return {"depth": row["pixels"] * 2}

def masks(row, context):
    time.sleep(0.01)
    return {"mask": row["depth"] + 1}

STAGES = (
    Stage("decode", decode, reads=("number",), writes=("pixels",)),
    Stage("depth", depth, reads=("pixels",), writes=("depth",), num_gpus=1.0),
    Stage("masks", masks, reads=("depth",), writes=("mask",)),
)
NODE = {"object_store_memory": 100 * 2**20, "include_dashboard": False}

def one_gpu():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, **NODE})
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster

def with_depth(function):
    return (STAGES[0], Stage("depth", function, reads=("pixels",), writes=("depth",), num_gpus=1.0), STAGES[2])

def rows(count):
    return [new_row(f"row-{number:04d}", number=number) for number in range(count)]

def report(done, execute, **more):
    refused = {row["key"]: row["refusal"]["reason"] for row in done if row["refusal"]}
    right = sorted(row["number"] for row in done if row["mask"] == 2 * row["number"] + 1)
    facts = {"count": len(done), "right": len(right), "refused": refused, "on": collections.Counter(lines("gpu"))}
    print(json.dumps(facts | {"problems": list(execute.problems), **more}), flush=True)
    ray.shutdown()
    os._exit(0)  # the cluster's end is not what is tested
"""


def run(folder: Path, script: str) -> dict:
    """Run a script and return its last line of output."""
    (folder / "script.py").write_text(HEAD + script)
    short = tempfile.mkdtemp(prefix="ex4d-")  # a socket's path has a limit
    done = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder)],
        env=os.environ | {"RAY_TMPDIR": short},
        capture_output=True,
        text=True,
        timeout=280,
    )
    print(done.stderr[-3000:])
    assert done.returncode == 0
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.ray
def test_a_row_that_kills_its_worker_is_refused_and_its_neighbours_are_kept(tmp_path):
    facts = run(
        tmp_path,
        """
def poison(row, context):
    mark("tried", row["key"])
    if row["number"] == 7:
        os._exit(9)
    return {"mask": 2 * row["number"] + 1}

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
stages = (Stage("poison", poison, reads=("key", "number"), writes=("mask",)),)
execute = runner.OnRay(runner.RayConfig(), Attempts(folder, 2))
done = list(runner.through(execute, stages, rows(60), None, ("number", "mask")))
report(done, execute, tries=lines("tried").count("row-0007"))
""",
    )
    assert (facts["count"], facts["right"], facts["refused"]) == (60, 59, {"row-0007": "worker_crash"})
    assert facts["tries"] <= 3  # once among others, then alone


@pytest.mark.heavy
@pytest.mark.ray
def test_a_pool_takes_a_gpu_that_joins_midway_and_leaves_a_node_that_dies(tmp_path):
    facts = run(
        tmp_path,
        """
cluster = one_gpu()

def source():
    # Until a node has joined and left. Ray starts nodes in the main thread alone, and that is what reads the rows.
    other, count = None, 0
    for number, row in enumerate(rows(100_000)):
        yield row
        done = lines("gpu")
        if other is None and len(done) >= 20:
            other = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 * 2**20)
        elif not count and len(set(done)) == 2:
            count = len(done)
        elif count and len(done) >= count + 20:
            mark("both", "1")
            cluster.remove_node(other, allow_graceful=False)
            break

execute = runner.OnRay(runner.RayConfig(address=cluster.address), Attempts(folder, 3))
done = list(runner.through(execute, STAGES, source(), None, ("number", "mask")))
report(done, execute, both=len(lines("both")))
""",
    )
    assert (facts["refused"], facts["problems"], facts["both"]) == ({}, [], 1)
    assert facts["right"] == facts["count"] > 100
    assert len(facts["on"]) == 2


@pytest.mark.heavy
@pytest.mark.ray
def test_a_broken_gpu_is_quarantined_and_named_and_everything_else_completes(tmp_path):
    facts = run(
        tmp_path,
        """
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, **NODE})
other = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 * 2**20)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)

def broken(row, context):
    time.sleep(0.2)
    if node_of() == context:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return depth(row, context)

stages = with_depth(broken)
execute = runner.OnRay(runner.RayConfig(address=cluster.address), Attempts(folder, 3))
bad = other.node_id
done = list(runner.through(execute, stages, rows(60), bad, ("number", "mask")))
report(done, execute, bad=bad)
""",
    )
    assert (facts["count"], facts["right"], facts["refused"]) == (60, 60, {})
    (problem,) = facts["problems"]
    assert facts["bad"][:12] in problem
    assert "quarantined" in problem


@pytest.mark.heavy
@pytest.mark.ray
def test_a_bug_of_the_row_and_not_of_the_node_stays_a_bug(tmp_path):
    facts = run(
        tmp_path,
        """
cluster = one_gpu()

def picky(row, context):
    return {"depth": 2 * row["pixels"] // (row["pixels"] != 5)}

stages = with_depth(picky)
execute = runner.OnRay(runner.RayConfig(address=cluster.address), None)
report(list(runner.through(execute, stages, rows(20), None, ("number", "mask"))), execute)
""",
    )
    assert (facts["right"], facts["refused"], facts["problems"]) == (19, {"row-0005": "bug:ZeroDivisionError"}, [])


@pytest.mark.heavy
@pytest.mark.ray
def test_a_process_that_lost_its_gpu_costs_one_row(tmp_path):
    """After an illegal access every CUDA call of the process fails: the only GPU goes to another process."""
    facts = run(
        tmp_path,
        """
cluster = one_gpu()

def sticky(row, context):
    time.sleep(0.05)
    if row["pixels"] == 5 or "GPU_IS_LOST" in os.environ:
        os.environ["GPU_IS_LOST"] = "1"
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return depth(row, context)

stages = with_depth(sticky)
execute = runner.OnRay(runner.RayConfig(address=cluster.address), Attempts(folder, 3))
report(list(runner.through(execute, stages, rows(20), None, ("number", "mask"))), execute)
""",
    )
    assert (facts["right"], facts["refused"], facts["problems"]) == (19, {"row-0005": "bug:RuntimeError"}, [])
