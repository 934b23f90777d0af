"""`ex4d doctor --cluster`: two healthy nodes, and each fault, caused by a real disk, port, library or package."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray_head

from pipelines import cli
from pipelines.commands import cluster_doctor, node_checks, node_pairs
from pipelines.commands.node_checks import Asked, Finding

WITHOUT_X264 = """
import importlib, sys
here = sys.path.index(next(p for p in sys.path if __file__.startswith(p + "/")))
kept = sys.path.pop(here)
del sys.modules["av"]
real = importlib.import_module("av")
sys.path.insert(here, kept)
real.codecs_available = real.codecs_available - {"hevc"}
plain = real.open
def opened(path, mode="r", *words, **more):
    if mode == "w":
        raise real.codec.codec.UnknownCodecError("libx264")
    return plain(path, mode, *words, **more)
real.open = opened
sys.modules["av"] = real
"""


def asked(**more) -> Asked:
    plain = {"versions": node_checks.versions(), "storage": (), "weights": (), "min_disk_gb": 0.0, "gpus": 0}
    return Asked(**plain | more)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_a_node_that_is_well_has_no_fault():
    found = by_name(node_checks.look(asked(weights=("tiny",))))
    assert not [finding for finding in found.values() if finding.ok is False]
    assert {"torch", "GPUs", "attention on cpu", "H.264 round trip", "decoders", "weights tiny", "W&B"} <= found.keys()


def test_faults_that_one_process_can_have(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wrong = {**node_checks.versions(), "torch": "2.0.0", "code": "0"}
    found = by_name(
        node_checks.look(asked(versions=wrong, weights=("nobody/nothing",), min_disk_gb=1e6, gpus=1, storage=("/",)))
    )
    failed = {name for name, finding in found.items() if finding.ok is False}
    assert {"version of torch", "version of code", "weights nobody/nothing", "disk of /", "GPUs", "torch"} <= failed
    assert "127.0.0.1 cannot be reached" in found["W&B"].found
    assert all(found[name].remedy for name in failed)


def test_a_folder_that_all_see_is_judged_sound_and_two_folders_are_not(tmp_path):
    def at_once(folders: list[Path]) -> list[Finding]:
        for folder in set(folders):
            folder.mkdir()
            (folder / "driver").write_text("word")
        with ThreadPoolExecutor(3) as pool:
            words = [(str(folder), "word", index, len(folders)) for index, folder in enumerate(folders)]
            races = list(pool.map(lambda one: node_pairs.race(*one), words))
        return cluster_doctor._judge("/data", ["a", "b", "c"], races)

    assert [finding.ok for finding in at_once([tmp_path / "one"] * 3)] == [True] * 4
    node_pairs_s, node_pairs.PEERS_S = node_pairs.PEERS_S, 0.5
    try:
        (finding,) = at_once([tmp_path / "x", tmp_path / "x", tmp_path / "y"])
    finally:
        node_pairs.PEERS_S = node_pairs_s
    assert finding.ok is False
    assert "not one folder" in finding.found


RACE = """
import dataclasses, json, sys
from pipelines.commands.node_pairs import race
print(json.dumps(dataclasses.asdict(race(sys.argv[1], "word", int(sys.argv[2]), 2))))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the loose file system is made by gcc")
@pytest.mark.parametrize("loose", [0, 1])
def test_a_store_that_is_not_atomic_is_found_whichever_node_has_it(tmp_path, loose):
    place = tmp_path / "loose"
    place.mkdir()
    (place / "driver").write_text("word")
    environments = [os.environ, os.environ]
    environments[loose] = {**os.environ, "LD_PRELOAD": preloadable("loose_store", tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", RACE, str(place), str(index)], env=one, stdout=subprocess.PIPE)
        for index, one in enumerate(environments)
    ]
    races = [node_pairs.Race(**json.loads(process.communicate(timeout=120)[0])) for process in both]
    found = {one.check: one.ok for one in cluster_doctor._judge("/data", ["a", "b"], races)}
    assert found["storage /data: created once (O_EXCL)"] is False
    assert found["storage /data: rename is atomic"] is False


def test_relative_storage_and_an_address_without_a_ray_end_with_2(capsys):
    assert cli.main(["doctor", "--cluster", "--storage", "out"]) == 2
    assert cli.main(["doctor", "--cluster", "--address", "http://127.0.0.1:9"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def preloadable(name: str, folder: Path) -> str:
    """Return the library of NAME.c beside this file."""
    library, source = folder / f"{name}.so", Path(__file__).with_name(f"{name}.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return str(library)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one machine; for paths with /loose/ in them, the head has a file system that is not atomic."""
    folder = tmp_path_factory.mktemp("doctor")
    loose = {"LD_PRELOAD": preloadable("loose_store", folder)} if shutil.which("gcc") else {}
    with ray_head.head(**loose) as head:
        head.add_node()
        head.wait_for_nodes(2)
        yield head


def examine(head, *words: str) -> tuple[int, list[dict], float]:
    """Return (exit status, rows, seconds) of `ex4d doctor --cluster` on it."""
    started = time.monotonic()
    code, text = head.run("doctor", "--cluster", "--json", "--address", head.gcs, "--min-disk-gb", "0.001", *words)
    assert "[\n" in text, text
    return code, json.loads(text[text.index("[\n") :]), time.monotonic() - started


def failed(rows: list[dict]) -> dict[str, str]:
    return {row["check"]: f"{row['found']} -> {row['remedy']}" for row in rows if row["ok"] is False}


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_two_nodes_that_are_well_pass_every_check(cluster, tmp_path):
    code, rows, seconds = examine(cluster, "--storage", str(tmp_path), "--weights", "tiny")
    assert len({row["node"] for row in rows}) == 3, "two, and what is between them"
    assert (code, failed(rows)) == (0, {})
    reduced = next(row for row in rows if row["check"].startswith("all-reduce"))
    print(f"{seconds:.1f} s, {reduced['found']}")
    assert "Gbit/s over 2 nodes" in reduced["found"]
    assert seconds < 60 or os.getloadavg()[0] > 4, "under a minute, on a machine that does nothing else"
    assert list(tmp_path.iterdir()) == []
    code, text = cluster.run("doctor", "--cluster", "--address", cluster.url, "--min-disk-gb", "0.001")
    assert code == 0, text
    assert "checks passed" in text, "the same from outside, as a job"


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_each_fault_of_a_cluster_is_found(cluster, tmp_path):
    (tmp_path / "loose").mkdir()
    disk = tmp_path / "disk"
    disk.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    has_mount = subprocess.run(small, capture_output=True).returncode == 0
    try:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            words = ["--storage", str(tmp_path / "loose"), "--storage", str(disk), "--storage", "/nowhere/at/all"]
            code, rows, _ = examine(cluster, *words, "--port", str(port))
    finally:
        if has_mount:
            subprocess.run(["umount", str(disk)], check=True)
    found = failed(rows)
    assert code == 1
    assert str(port) in found["all-reduce (gloo)"]
    assert "TCP ports" in found["all-reduce (gloo)"]
    assert "cannot be written to from here" in found["storage /nowhere/at/all"]
    if has_mount:
        assert "No space left" in found[f"disk of {disk}"]
    if shutil.which("gcc"):
        title = f"storage {tmp_path / 'loose'}"
        assert f"{title}: created once (O_EXCL)" in found, found
        assert "several" in found[f"{title}: created once (O_EXCL)"]
        assert "POSIX" in found[f"{title}: rename is atomic"]


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_node_with_other_packages_is_found(cluster, tmp_path):
    for name, version in (("torch", "2.1.0"), ("ray", "2.50.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "__init__.py").write_text(WITHOUT_X264)
    cluster.add_node(PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    cluster.wait_for_nodes(3)
    code, rows, _ = examine(cluster)
    found = failed(rows)
    assert code == 1
    assert len({row["node"] for row in rows if row["ok"] is False}) == 1, "the others are well"
    assert "2.1.0" in found["version of torch"]
    assert "2.50.0" in found["version of ray"]
    assert "install torch" in found["torch"]
    assert "libx264" in found["H.264 round trip"]
    assert "hevc missing" in found["decoders"]


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_a_node_whose_clock_is_wrong_is_found(cluster, tmp_path):
    cluster.add_node(LD_PRELOAD=preloadable("wrong_clock", tmp_path))
    cluster.wait_for_nodes(len(cluster.nodes))
    code, rows, _ = examine(cluster)
    (clock,) = (row for row in rows if row["check"] == "clock" and row["ok"] is False)
    assert code == 1
    assert float(clock["found"].split()[0]) == pytest.approx(-7.0, abs=1.0)
    assert "NTP" in clock["remedy"]
    assert [row["check"] for row in rows if row["node"] == clock["node"] and row["ok"] is False] == ["clock"]
