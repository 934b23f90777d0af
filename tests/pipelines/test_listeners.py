"""A one-machine run can be reached from this machine alone, and by nobody without the token."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from ex4d.synthetic import SyntheticConfig, write_corpus

HOST = """
import sys
from pipelines.runtime import cluster
with cluster.connected(None, 1):
    import ray
    ray.get(ray.remote(lambda: 1).remote())
    print(ray.get_runtime_context().gcs_address, flush=True)
    print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
    sys.stdin.readline()
"""
CLIENT = """
import sys, grpc
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2 as asked, gcs_service_pb2_grpc as stubs
channel = init_grpc_channel(sys.argv[1], [("grpc.enable_http_proxy", 0)])
try:
    stubs.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(asked.GetAllNodeInfoRequest(), timeout=20)
    print("let in")
except grpc.RpcError as error:
    print(error.code().name)
"""


def listening(parent: int) -> set[tuple[str, str]]:
    """Return (name, address) of each TCP listener of a process and of all that it started."""
    found = set()
    try:
        family = [psutil.Process(parent), *psutil.Process(parent).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in family:
        try:
            ends = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            found |= {(process.name(), end) for end in ends}
        except psutil.Error:
            continue  # it ended meanwhile
    return found


def is_loopback(address: str) -> bool:
    """Return whether an address is a loopback address, also in IPv6 notation."""
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def watched(command: list[str], folder: Path, environment: dict[str, str]) -> set[tuple[str, str]]:
    """Run a command until it succeeds; return every listener that was seen."""
    seen: set[tuple[str, str]] = set()
    with open(folder / "told.txt", "wb") as told:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=told, stderr=subprocess.STDOUT)
        while process.poll() is None:
            seen |= listening(process.pid)
            time.sleep(0.5)
    assert process.returncode == 0, (folder / "told.txt").read_text(errors="replace")[-2000:]
    return seen


@pytest.mark.ray
@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("launcher", ["auto", "ray"])
def test_a_run_on_one_machine_listens_on_the_loopback_alone(tmp_path, launcher):
    """Preprocess on Ray, then train with two ranks: each listener of their processes, sampled twice a second."""
    write_corpus(tmp_path / "in", SyntheticConfig(num_videos=2, num_frames=5, size=(32, 32), supersample=1))
    tree = {
        "preprocess": {"input": "in", "output": "out", "num_frames": 5, "size": [32, 32], "num_workers": 1,
                       "near_duplicates": "off"},
        "train": {"data": "out", "output": "run", "num_steps": 3, "global_batch_size": 2, "micro_batch_size": 1,
                  "num_processes": 2, "device": "cpu", "launcher": launcher},
        "model": {"lora_rank": 2, "lora_alpha": 2.0, "adapter_hidden": 8},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "pipelines.cli"]
    made = watched([*command, "preprocess", "config.yaml"], tmp_path, environment)
    trained = watched([*command, "train", "config.yaml"], tmp_path, environment)
    assert {"gcs_server", "raylet"} <= {name for name, _ in made}
    assert len(trained) > 0
    assert [one for one in sorted(made | trained) if not is_loopback(one[1])] == []


@pytest.mark.ray
@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_the_demo_listens_on_the_loopback_alone(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    seen = watched(
        [sys.executable, "-m", "pipelines.cli", "demo", "--output", str(tmp_path / "demo")], tmp_path, environment
    )
    assert [one for one in sorted(seen) if not is_loopback(one[1])] == []


@pytest.mark.ray
@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_client_without_the_token_is_refused_by_a_ray_of_one_machine(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_TMPDIR"} | {"HOME": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    host = subprocess.Popen([sys.executable, "-c", HOST], env=environment, **pipes)
    try:
        address, session = host.stdout.readline().strip(), Path(host.stdout.readline().strip())
        assert session.parts[-2] == "ray"
        assert session.parent.parent.stat().st_mode & 0o777 == 0o700, "nobody else reaches its sockets and logs"
        (tmp_path / "wrong").write_text("0" * 64)
        token = str(tmp_path / ".ray" / "auth_token")
        said = {}
        for name, how in {
            "right": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token},
            "wrong": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")},
            "none": {"RAY_AUTH_MODE": "disabled"},
        }.items():
            command = [sys.executable, "-c", CLIENT, address]
            done = subprocess.run(command, env=environment | how, capture_output=True, text=True, timeout=100)
            said[name] = done.stdout.strip() or done.stderr[-300:]
        assert said == {"right": "let in", "wrong": "UNAUTHENTICATED", "none": "UNAUTHENTICATED"}
    finally:
        host.communicate("\n", timeout=60)
