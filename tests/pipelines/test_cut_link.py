"""Preprocess over two nodes with their own addresses: a cut link or a killed node changes no byte."""

from __future__ import annotations

import subprocess
import time

import kills
import pytest
import ray_head
from namespaces import ADDRESSES, network

pytestmark = [pytest.mark.heavy, pytest.mark.ray, pytest.mark.timeout(1500)]
CUT_S = 20.0


def test_a_cut_link_and_a_killed_node_change_no_byte(tmp_path):
    with kills.bench(tmp_path, num_videos=14, clips_per_video=6) as bench, network() as net:
        whole, path, output = bench.finish_here("whole"), bench.write_config("cut"), tmp_path / "cut"
        with ray_head.head(ADDRESSES["a"], net.inside("a"), cpus=1) as head:
            head.add_node(net.inside("b"), ADDRESSES["b"], cpus=1)
            head.wait_for_nodes(2, net.inside("a"))
            command = [*net.inside("a"), str(ray_head.BIN / "ex4d"), "preprocess", str(path), f"ray.address={head.gcs}"]
            with open(tmp_path / "log", "wb") as log:
                job = subprocess.Popen(command, env=head.environment, stdout=log, stderr=log)
            done = _wait_for_clips(output, 6, job)
            net.plug("b", False)
            time.sleep(CUT_S)
            net.plug("b", True)
            while job.poll() is None and (cut := _clips(output)) < done + 4:
                time.sleep(0.1)
            ray_head.end(head.nodes[-1])
            assert job.wait(900) == 0, (tmp_path / "log").read_text()[-2000:]
        print(f"{done} clips at the cut, {cut} at the kill")
        assert cut < 84, "the node was killed on the way"
        assert bench.checked("cut") == whole


@pytest.mark.parametrize("blocked", [False, True])
def test_the_doctor_finds_a_blocked_port_between_the_nodes(blocked):
    with network() as net, ray_head.head(ADDRESSES["a"], net.inside("a")) as head:
        head.add_node(net.inside("b"), ADDRESSES["b"])
        if blocked:
            for end in ADDRESSES:  # either node may be the listening one
                net.block(end, 29555)
        words = [*net.inside("a"), str(ray_head.BIN / "ex4d"), "doctor", "--cluster", "--address", head.gcs]
        words += ["--min-disk-gb", "0.001", "--port", "29555"]
        head.wait_for_nodes(2, net.inside("a"))
        done = subprocess.run(words, env=head.environment, capture_output=True, text=True, timeout=300)
        line = next(line for line in done.stdout.splitlines() if "all-reduce" in line)
        assert done.returncode == int(blocked), done.stdout
        assert ("FAIL" in line) == blocked
        assert ("29555" in done.stdout) == blocked


def _clips(output) -> int:
    return len(list(output.glob("staging/clips/*.tar")))


def _wait_for_clips(output, count: int, job: subprocess.Popen) -> int:
    deadline = time.monotonic() + 600
    while job.poll() is None and (there := _clips(output)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return there
