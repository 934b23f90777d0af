"""A cluster of two nodes that loses one midway gives the same bytes as a run in one process."""

from __future__ import annotations

import json

import kills
import pytest
import ray_head

SCRIPT = """
import json, sys, threading, time
from pathlib import Path
from pipelines.runtime.cluster import require_token
require_token()
from ray.cluster_utils import Cluster
from ex4d import config
from pipelines.preprocess import run as preprocess
from pipelines.runtime.runner import RayConfig

path, wanted = sys.argv[1], int(sys.argv[2])
section = config.load(path, preprocess.SECTIONS)["preprocess"]
node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
other = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
cluster.wait_for_nodes()
clips, lost = Path(section.output, "staging", "clips"), []

def lose():
    while len(list(clips.glob("*.tar"))) < wanted:
        time.sleep(0.02)
    lost.append(len(list(clips.glob("*.tar"))))
    cluster.remove_node(other, allow_graceful=False)

threading.Thread(target=lose, daemon=True).start()
result = preprocess.run(section, RayConfig(address=cluster.address))
print(json.dumps({"lost_after": lost, "exit_code": result.exit_code, "counts": dict(result.counts)}))
cluster.shutdown()
"""


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("wanted", [5, 30])
def test_a_node_that_is_lost_midway_costs_nothing(tmp_path, wanted):
    with kills.bench(tmp_path, num_videos=8, clips_per_video=6) as bench:
        whole = bench.finish("whole", "inline")
        bench.write_config("two")
        done = ray_head.run_script(SCRIPT, str(tmp_path / "two.yaml"), str(wanted))
        assert done.returncode == 0, done.stderr[-2000:]
        facts = json.loads(done.stdout.splitlines()[-1])
        assert facts["exit_code"] == 0
        assert wanted <= facts["lost_after"][0] < 48
        assert facts["counts"]["samples"] == 48
        assert bench.checked("two") == whole
