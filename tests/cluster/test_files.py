"""What cluster/ starts are commands that exist, with configs that exist, and scripts that a shell can read."""

from __future__ import annotations

import shlex
import subprocess

import pytest
import yaml

from pipelines import cli

SCRIPTS = ("local_two_nodes.sh", "slurm/train.sbatch", "slurm/preprocess.sbatch")
MANIFESTS = ("kuberay/preprocess.yaml", "kuberay/train.yaml")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse(root, name):
    subprocess.run(["bash", "-n", str(root / "cluster" / name)], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_explain_themselves_without_arguments(root, name):
    done = subprocess.run(["bash", str(root / "cluster" / name)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage" in done.stderr


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_ray_jobs_that_call_our_commands(root, name):
    manifest = yaml.safe_load((root / "cluster" / name).read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    command, *arguments = shlex.split(manifest["spec"]["entrypoint"])
    assert command == "ex4d"
    parsed = cli.parse(arguments)
    assert (root / parsed.config).is_file()
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert not [
                entry["name"] for entry in container.get("env", []) if "KEY" in entry["name"] and "value" in entry
            ]


def test_slurm_script_starts_the_trainer_and_requeues_when_preempted(root, tmp_path):
    """Run train.sbatch with stand-ins for SLURM's own commands, which note how they were called."""
    log = tmp_path / "calls"
    for name, body in {
        "scontrol": f'echo "scontrol $*" >> {log}; [ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
        "srun": f'echo "srun $* MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT" >> {log}; exit 75',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[1-2]"}
    script = root / "cluster" / "slurm" / "train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "c.yaml", "train.num_steps=5"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    calls = log.read_text()
    assert done.returncode == 75
    assert "ex4d train c.yaml train.num_steps=5 MASTER_ADDR=node1 MASTER_PORT=20041" in calls
    assert "scontrol requeue 41" in calls
