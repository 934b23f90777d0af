"""The rendered batch scripts on a real SLURM of two nodes, both on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray_head import free_port

from ex4d.data.verify import verify
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.commands.cluster_config import ClusterConfig
from pipelines.commands.cluster_render import render
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
import make_run
import run_command

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
BIN = Path(sys.executable).parent
CLIPS = {"num_frames": 9, "size": [64, 64], "clips_per_shot": 3, "depth": "sidecar", "masks": {"num_masks": 1}}

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1200)]


def _configuration(folder: Path) -> str:
    """Return a slurm.conf of two nodes on this machine; the first has its name, which resolves."""
    host = socket.gethostname()
    control, first, second = free_port(), free_port(), free_port()
    facts = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 Boards=1 Gres=gpu:2 State=UNKNOWN"
    return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
NodeName={host} Port={first} {facts}
NodeName=node2 Port={second} {facts}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """A running SLURM; yields the environment of its users."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if lacking or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(PROGRAMS)} (slurm-wlm, munge); missing: {', '.join(lacking) or 'root'}")
    folder = Path(f"/tmp/x4slurm{os.getpid()}")
    (folder / "state").mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder))
    for number in range(2):  # devices are files that are there
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "HOME": str(folder)}
    environment |= {"RAY_worker_niceness": "0"}  # default 15, with which they starve on a busy machine
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin", "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    files = {"key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
    munge = [f"--{name}={folder}/{file}" for name, file in {**files, "socket": "munge.socket"}.items()]
    daemons = [
        ["munged", "-F", "--force", *munge],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", socket.gethostname()],
        ["slurmd", "-D", "-N", "node2"],
    ]
    running = []
    try:
        for words in daemons:
            with open(folder / "daemons.log", "ab") as log:
                running.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
            time.sleep(2.0)
        deadline = time.monotonic() + 60
        while (said := _said(environment, "sinfo", "-h", "-o", "%t %D")).strip() != "idle 2":
            assert time.monotonic() < deadline, said + (folder / "daemons.log").read_text()[-3000:]
            time.sleep(1.0)
        yield environment
    finally:
        _said(environment, "scancel", "--user=root")  # otherwise the steps of a failed test outlive the daemons
        deadline = time.monotonic() + 30
        while _said(environment, "squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(1.0)
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _said(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def _submit(environment: dict[str, str], script: Path, *words: str) -> str:
    """Return the id of a batch job whose log is `log` beside the script."""
    where = (f"--chdir={script.parent}", f"--output={script.parent}/log")
    done = _said(environment, "sbatch", "--parsable", *where, str(script), *words).strip()
    assert done.isdigit(), done
    return done


def _ended(environment: dict[str, str], job: str) -> str:
    """Return the state of a batch job, once it has ended."""
    deadline = time.monotonic() + 900
    while (state := _state(environment, job)) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
        assert time.monotonic() < deadline, state
        time.sleep(1.0)
    return state


def _state(environment: dict[str, str], job: str) -> str:
    return _said(environment, "scontrol", "show", "job", job).partition("JobState=")[2].split()[0]


@pytest.mark.ray
def test_preprocess_over_two_nodes_has_the_bytes_of_one_process(slurm, tmp_path):
    write_corpus(tmp_path / "in", SyntheticConfig(num_videos=4, num_frames=27, size=(64, 64), supersample=1))
    whole = PreprocessConfig(input=str(tmp_path / "in"), output=str(tmp_path / "whole"), **_typed(CLIPS))
    assert preprocess.run(whole, runner_name="inline").exit_code == 0
    chosen = {**CLIPS, "input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"preprocess": chosen}))
    script = tmp_path / "preprocess.sbatch"
    script.write_text(render("slurm-preprocess", ClusterConfig(nodes=2, node_cpus=1, time_limit="00:20:00")))
    state = _ended(slurm, _submit(slurm, script, str(tmp_path / "c.yaml")))
    log = (tmp_path / "log").read_text(errors="replace")
    assert state == "COMPLETED", log[-3000:]
    assert "12 planned, 12 samples" in log
    made, wanted = (verify(str(tmp_path / name), full=False) for name in ("out", "whole"))
    assert made.ok
    assert made.tree_sha256 == wanted.tree_sha256


def test_train_starts_a_rank_for_each_task(slurm, tmp_path):
    shown = tmp_path / "shown"
    program = tmp_path / "ex4d"
    program.write_text(f'#!/bin/sh\necho "$SLURM_PROCID of $SLURM_STEP_NUM_TASKS $MASTER_ADDR $*" >> {shown}\n')
    program.chmod(0o755)
    script = tmp_path / "train.sbatch"
    chosen = ClusterConfig(gpu_nodes=2, gpus_per_node=2, gpu_node_cpus=2, time_limit="00:20:00")
    script.write_text(render("slurm-train", chosen))
    state = _ended(slurm, _submit(slurm | {"EX4D_BIN": str(program)}, script, "c.yaml", "train.num_steps=3"))
    assert state == "COMPLETED", (tmp_path / "log").read_text(errors="replace")[-3000:]
    lines = sorted(shown.read_text().splitlines())
    assert [line.split()[:3] for line in lines] == [[str(rank), "of", "4"] for rank in range(4)]
    assert {line.split()[3] for line in lines} == {"127.0.0.1"}, "NodeAddr of slurm.conf"
    assert all(line.endswith("train c.yaml train.num_steps=3") for line in lines)


def test_training_that_gets_a_signal_is_requeued_and_ends_with_the_losses_of_an_undisturbed_one(slurm, tmp_path):
    make_run.make_dataset(tmp_path)
    make_run.make_base(tmp_path)
    whole, output = tmp_path / "whole", tmp_path / "there"
    chosen = {"num_steps": 80, "save_every": 1000, "micro_batch_size": 2}
    path = make_run.make_config(tmp_path, **chosen, output=str(whole))
    code, text = run_command.finish(run_command.start(path, "train.num_processes=2"))
    assert code == 0, text
    script = tmp_path / "train.sbatch"
    cluster = ClusterConfig(gpu_nodes=2, gpus_per_node=1, gpu_node_cpus=1, time_limit="00:20:00")
    script.write_text(render("slurm-train", cluster))
    job = _submit(slurm, script, str(path), f"train.output={output}")
    log = tmp_path / "log"
    run_command.wait_for(
        lambda: len(run_command.steps(output)) >= 10 or _state(slurm, job) not in ("PENDING", "RUNNING"), "step 10"
    )
    assert _state(slurm, job) == "RUNNING", log.read_text(errors="replace")[-3000:]
    _said(slurm, "scancel", "--signal=TERM", job)  # as three minutes before the time limit
    state, text = _ended(slurm, job), log.read_text(errors="replace")
    assert state == "COMPLETED", text[-3000:]
    assert "stopped by a signal with a checkpoint; requeueing" in text
    assert {line["processes"] for line in run_command.steps(output)} == {2}
    assert run_command.losses(output) == run_command.losses(whole)


def _typed(values: dict) -> dict:
    from ex4d.geometry.masks import MaskConfig

    return values | {"size": tuple(values["size"]), "masks": MaskConfig(**values["masks"])}
