"""Two ranks on two nodes with their own addresses: a cut link or a killed node changes no loss."""

from __future__ import annotations

import subprocess
import time

import pytest
import ray_head
from make_run import make_base, make_config, make_dataset
from namespaces import ADDRESSES, network
from run_command import finish, losses, start, steps, wait_for

pytestmark = [pytest.mark.heavy, pytest.mark.ray, pytest.mark.timeout(1800)]
CUT_S = 20.0


def test_a_cut_link_and_a_killed_node_change_no_loss(tmp_path):
    make_dataset(tmp_path)
    make_base(tmp_path)
    run = {"num_steps": 40, "save_every": 5, "micro_batch_size": 2, "num_processes": 2, "zero_stage": 2}
    whole, output = tmp_path / "whole", tmp_path / "cut"
    config = make_config(tmp_path, **run, output=str(whole))
    code, text = finish(start(config))
    assert code == 0, text
    with network() as net, ray_head.head(ADDRESSES["a"], net.inside("a"), cpus=1) as head:
        head.add_node(net.inside("b"), ADDRESSES["b"], cpus=1)
        head.wait_for_nodes(2, net.inside("a"))
        words = ["train", str(config), f"train.output={output}", "train.launcher=ray", f"ray.address={head.gcs}"]
        with open(tmp_path / "log", "wb") as log:
            command = [*net.inside("a"), str(ray_head.BIN / "ex4d"), *words]
            job = subprocess.Popen(command, env=head.environment | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        try:
            wait_for(lambda: len(steps(output)) >= 7 or job.poll() is not None, "step 7", 300)
            net.plug("b", False)
            time.sleep(CUT_S)
            during = len(steps(output))
            net.plug("b", True)
            if head.nodes[-1].poll() is not None:  # Ray gave the node up meanwhile
                head.add_node(net.inside("b"), ADDRESSES["b"], cpus=1)
            wait_for(lambda: len(steps(output)) > during + 3 or job.poll() is not None, "steps after the cut", 300)
            killed_at = len(steps(output))
            ray_head.end(head.nodes[-1])
            head.add_node(net.inside("b"), ADDRESSES["b"], cpus=1)
            code = job.wait(600)
        finally:
            job.kill()
        assert code == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"link cut at step 7 to {during}, node killed at step {killed_at}")
    assert killed_at < 40
    assert losses(output) == losses(whole)
