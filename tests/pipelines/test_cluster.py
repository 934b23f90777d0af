"""Starting or joining a Ray cluster: its token, and the error if it cannot be joined."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ex4d.errors import ConfigError
from pipelines.runtime import cluster

WORK = """
import sys
from ex4d.errors import ConfigError
from pipelines.runtime import cluster
try:
    with cluster.connected(sys.argv[1] if len(sys.argv) > 1 else None):
        import ray
        print("nodes", len(ray.nodes()), ray.get(ray.remote(lambda: 6 * 7).remote()))
except ConfigError as error:
    print(error)
    sys.exit(2)
"""

OTHER = "import ray, time; ray.init(address='local', num_cpus=1); print('up', flush=True); time.sleep(300)"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def connect(*address: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", WORK, *address],
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout.strip()


def test_the_token_is_its_owners_alone_and_made_once(home, monkeypatch):
    monkeypatch.setattr(cluster.sys, "modules", {})  # this process's own Ray keeps its settings
    cluster.require_token()
    path = home / ".ray" / "auth_token"
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    token = path.read_text()
    assert len(token) == 64
    path.chmod(0o644)  # as Ray itself leaves it
    path.parent.chmod(0o755)
    cluster.require_token()
    assert (mode(path), mode(path.parent), path.read_text()) == (0o600, 0o700, token)
    assert [p.name for p in path.parent.iterdir()] == ["auth_token"]


def test_a_token_that_the_operator_gives_is_left_alone(home, monkeypatch):
    monkeypatch.setattr(cluster.sys, "modules", {})
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "mounted"))
    cluster.require_token()
    assert not (home / ".ray").exists()


def test_a_machine_that_is_too_busy_to_start_a_ray_is_one_sentence(monkeypatch):
    import ray

    def init(**_):
        raise Exception("The current node timed out during startup. This could happen because …")  # as Ray 2.60 does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="too busy"), cluster.connected(None):
        pass


def test_rays_files_lie_in_a_folder_of_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "")  # so that what is set below does not outlive the test
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = tmp_path / f"ex4d_{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    cluster.require_private_folder()
    assert (os.environ["RAY_TMPDIR"], mode(folder)) == (str(folder), 0o700)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "chosen"))
    cluster.require_private_folder()
    assert os.environ["RAY_TMPDIR"] == str(tmp_path / "chosen")


@pytest.mark.parametrize("what", ["a link", "a link to nothing", "a stranger's folder"])
def test_a_folder_that_another_user_made_is_refused(tmp_path, monkeypatch, what):
    if os.getuid() != 0 and "link" not in what:
        pytest.skip("needs root to give a folder away")
    monkeypatch.setenv("RAY_TMPDIR", "")  # so that what is set below does not outlive the test
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if what != "a link to nothing":
        (tmp_path / "theirs").mkdir()
    folder = tmp_path / f"ex4d_{os.getuid()}"
    if "link" in what:
        folder.symlink_to(tmp_path / "theirs")
    else:
        folder.mkdir()
        os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError, match="RAY_TMPDIR"):
        cluster.require_private_folder()
    assert not os.environ["RAY_TMPDIR"]


def test_auto_finds_no_ray_of_another_user_which_would_be_sent_the_token(tmp_path):
    """Two processes that look like Ray's raylet: the user's own is found."""
    waits = 'exec -a /opt/ray/raylet "$0" -c "import time; time.sleep(60)" "$1"'
    users = {"127.0.0.1:1111": None, **({"127.0.0.1:2222": 65534} if os.getuid() == 0 else {})}
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
    started = [
        subprocess.Popen(["bash", "-c", waits, python, f"--gcs-address={address}"], user=user)
        for address, user in users.items()
    ]
    try:
        deadline = time.monotonic() + 20
        while any(b"raylet" not in Path(f"/proc/{one.pid}/cmdline").read_bytes().split(b"\0")[0] for one in started):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found = cluster._own_heads()
        assert "127.0.0.1:1111" in found
        assert "127.0.0.1:2222" not in found
    finally:
        for one in started:
            one.kill()
            one.wait()


def test_no_node_starts_where_the_token_cannot_be_made(root, tmp_path):
    """`eval "$(…)"` hides a failure, and the nodes would then listen without a token."""
    ray = tmp_path / "ray"
    ray.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ray.chmod(0o755)
    environment = os.environ | {"EX4D_BIN": "/bin/false", "XDG_STATE_HOME": str(tmp_path), "EX4D_RAY_PORT": "7433"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    script = ["bash", str(root / "cluster" / "local_two_nodes.sh"), "start"]
    done = subprocess.run(script, env=environment, capture_output=True, timeout=60)
    assert done.returncode != 0
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense", "ray://127.0.0.1:10001", "auto"])
def test_an_address_without_a_ray_is_one_sentence_at_once(home, address):
    code, text = connect(address, environment={"RAY_TMPDIR": str(home)})
    assert code == 2
    assert "ray.address" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("path", ["out/dataset", "/data/dataset", "s3://bucket/dataset"])
def test_an_output_in_rays_own_folder_is_refused(path, tmp_path, monkeypatch):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    cluster.check_output("preprocess.output", path)
    monkeypatch.chdir(folder)
    if path == "out/dataset":
        with pytest.raises(ConfigError, match="absolute path"):
            cluster.check_output("preprocess.output", path)
    else:
        cluster.check_output("preprocess.output", path)


@pytest.mark.ray
@pytest.mark.heavy
def test_two_nodes_demand_the_token_and_stop_ends_only_them(root, home):
    # A Ray's sockets need a short path.
    env = {"EX4D_RAY_PORT": "7431", "RAY_TMPDIR": f"/tmp/x{os.getpid()}", "XDG_STATE_HOME": str(home / "state")}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.makedirs(env["RAY_TMPDIR"])
    script = ["bash", str(root / "cluster" / "local_two_nodes.sh")]
    other = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import ray, time; ray.init(address='local', num_cpus=1); print('up', flush=True); time.sleep(300)",
        ],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert "up" in other.stdout.readline()
        subprocess.run([*script, "start"], env=os.environ | env, check=True, timeout=120)
        for _ in range(20):
            code, text = connect("127.0.0.1:7431", environment=env)
            if text.startswith("nodes 2"):
                break
        assert (code, text) == (0, "nodes 2 42")
        wrong = home / "wrong"
        wrong.write_text("0" * 64)
        code, text = connect("127.0.0.1:7431", environment=env | {"RAY_AUTH_TOKEN_PATH": str(wrong)})
        assert code == 2
        assert "refuses" in text
        assert len(text.splitlines()) == 1
        code, text = connect("127.0.0.1:7431", environment=env | {"RAY_AUTH_MODE": "disabled"})
        assert (code, len(text.splitlines())) == (2, 1), "without a token"
        assert mode(home / ".ray" / "auth_token") == 0o600
        assert connect(environment=env) == (0, "nodes 1 42")  # no address: never the cluster that Ray remembers
        subprocess.run([*script, "stop"], env=os.environ | env, check=True, timeout=120)
        assert connect("127.0.0.1:7431", environment=env)[0] == 2
        assert other.poll() is None
        raylets = subprocess.run(["pgrep", "-f", env["RAY_TMPDIR"]], capture_output=True, text=True).stdout.split()
        assert raylets, "the other Ray lives on"
    finally:
        subprocess.run([*script, "stop"], env=os.environ | env, check=False, timeout=120)
        other.terminate()
        other.wait(30)
