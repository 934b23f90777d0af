"""Start a Ray head with its own job server and token, as a user does: `ray start --head --block`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
TOKEN = "5a" * 32
STORE_BYTES = 100 * 2**20


@dataclass
class Head:
    """A running head.

    Args:
        environment: for its users, with its token. folder: its session, with a short path because of its sockets.
    """

    folder: Path
    environment: dict[str, str]
    gcs: str
    url: str
    nodes: list[subprocess.Popen] = field(default_factory=list)

    def add_node(self, prefix: tuple[str, ...] = (), address: str = "", cpus: int = 2, **environment: str) -> None:
        """Start one more node; `prefix` is prepended to its command."""
        where = [f"--node-ip-address={address}"] if address else []
        words = [f"--address={self.gcs}", *where, f"--num-cpus={cpus}"]
        command = [*prefix, str(BIN / "ray"), "start", *words, *_COMMON]
        self.nodes.append(_start(command, self.environment | environment, self.folder / f"node{len(self.nodes)}.log"))

    def wait_for_nodes(self, count: int, prefix: tuple[str, ...] = ()) -> None:
        """Wait until so many nodes have joined."""
        script = "import sys, time, ray\nray.init(address=sys.argv[1], log_to_driver=False)\n"
        script += "while len(ray.nodes()) < int(sys.argv[2]): time.sleep(0.5)"
        command = [*prefix, sys.executable, "-c", script, self.gcs, str(count)]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=120)

    def run(self, *words: str, timeout_s: float = 300.0, **environment: str) -> tuple[int, str]:
        """Return (exit status, all output) of `ex4d WORDS` as a user of this cluster."""
        done = subprocess.run(
            [str(BIN / "ex4d"), *words],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return done.returncode, done.stdout


_COMMON = [f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", "--block"]


@contextlib.contextmanager
def head(address: str = "127.0.0.1", prefix: tuple[str, ...] = (), cpus: int = 2, **environment: str) -> Iterator[Head]:
    """Yield a head that answers; it and its nodes are ended by their process ids."""
    folder = Path(tempfile.mkdtemp(prefix="x4", dir="/tmp"))
    token = folder / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ours = {
        **kept,
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(folder)},
        **{"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"},
    }
    ports = [free_port() for _ in range(5)]
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    words = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    if address != "127.0.0.1":
        words.append(f"--dashboard-host={address}")
    command = [*prefix, str(BIN / "ray"), "start", "--head", f"--node-ip-address={address}", *words, *_COMMON]
    command.append(f"--num-cpus={cpus}")
    started = Head(folder, ours, f"{address}:{ports[0]}", f"http://{address}:{ports[1]}")
    started.nodes.append(_start(command, ours | environment, folder / "head.log"))
    try:
        _await(started.url, prefix)
        yield started
    finally:
        for process in reversed(started.nodes):
            end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _start(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    """Start a node, with a retry: Ray gives up after 30 s, which a busy machine may exceed."""
    for _ in range(3):
        with open(log, "wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        while process.poll() is None and "Ray runtime started" not in log.read_text(errors="replace"):
            time.sleep(0.2)
        if process.poll() is None:
            return process
    raise AssertionError(f"the node did not start: {log.read_text(errors='replace')[-2000:]}")


def _await(url: str, prefix: tuple[str, ...]) -> None:
    """Wait until the job server answers; it answers 401 without a token."""
    deadline = time.monotonic() + 120
    script = f"import urllib.request; urllib.request.urlopen('{url}/api/gcs_healthz', timeout=5)"
    while True:
        if prefix:  # another network: query from there
            if subprocess.run([*prefix, sys.executable, "-c", script], capture_output=True).returncode == 0:
                return
        else:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/api/gcs_healthz", timeout=5):
                return
        assert time.monotonic() < deadline, "the head did not start"
        time.sleep(1.0)


def end(process: subprocess.Popen) -> None:
    """End a node and all processes that it started, by process id."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        for child in [psutil.Process(process.pid), *below]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.wait(30)


def free_port() -> int:
    """Return an unused TCP port of the loopback address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_script(source: str, *arguments: str, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    """Run Python source that starts its own Ray in a separate process, since a process can join only one cluster."""
    folder = tempfile.mkdtemp(prefix="ex4d-")
    try:
        return subprocess.run(
            [sys.executable, "-c", source, *arguments],
            env=os.environ | {"RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
