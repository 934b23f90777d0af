"""Render a cluster's files from its ClusterConfig: KubeRay manifests, SLURM scripts, a `ray up` file for AWS."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.resources import files
from typing import Any

from ex4d import config
from pipelines.commands.cluster_config import ClusterConfig

HEADER = "# Written by `ex4d cluster render {kind}`: change its settings, not this file.\n"
USE = {
    "kuberay-preprocess": "# kubectl apply -f FILE     (KubeRay operator >= 1.6, image from cluster/Dockerfile)\n",
    "kuberay-train": "# kubectl apply -f FILE     (KubeRay operator >= 1.6, image from cluster/Dockerfile)\n",
    "kuberay-cluster": "# kubectl apply -f FILE, then `ex4d submit` through its head service\n",
    "aws": "# ray up FILE; ex4d submit …; ray down FILE\n",
}


def render(kind: str, cluster: ClusterConfig) -> str:
    """Return the text of a file; `kind` is one of KINDS."""
    contents = KINDS[kind](cluster)
    if isinstance(contents, str):
        return contents
    return HEADER.format(kind=kind) + USE[kind] + config.to_yaml(contents)


# ---------------------------------------------------------------- Kubernetes


def _rayjob_preprocess(cluster: ClusterConfig) -> dict[str, Any]:
    words = ["ex4d", "preprocess", cluster.config or "configs/preprocess_folder.yaml"]
    words += ["preprocess.input=/data/videos", "preprocess.output=/data/dataset", "ray.address=auto"]
    return _rayjob("preprocess", [*words, *cluster.overrides], cluster, gpu=(0, 0, cluster.gpu_nodes), retries=3)


def _rayjob_train(cluster: ClusterConfig) -> dict[str, Any]:
    ranks = cluster.gpu_nodes * cluster.gpus_per_node
    words = ["ex4d", "train", cluster.config or "configs/train_14b.yaml", "train.launcher=ray", "ray.address=auto"]
    words += [f"train.num_processes={ranks}", f"train.min_processes={cluster.gpus_per_node}"]
    words += ["train.data=/data/dataset", "train.output=/data/runs/14b", *cluster.overrides]
    gpu = (cluster.gpu_nodes, 1, cluster.gpu_nodes)
    return _rayjob("train", words, cluster, gpu=gpu, retries=10)


def _rayjob(name: str, words: list[str], cluster: ClusterConfig, gpu: tuple[int, int, int], retries: int) -> dict:
    spec = {
        "entrypoint": shlex.join(words),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 3600,
        "backoffLimit": retries,  # a restarted job resumes
        "rayClusterSpec": _ray_cluster(cluster, gpu, with_cpus=name != "train"),
    }
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": f"{cluster.name}-{name}"}, "spec": spec}


def _raycluster(cluster: ClusterConfig) -> dict[str, Any]:
    spec = _ray_cluster(cluster, (0, 0, cluster.gpu_nodes), with_cpus=True)
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": cluster.name}, "spec": spec}


def _ray_cluster(cluster: ClusterConfig, gpu: tuple[int, int, int], with_cpus: bool) -> dict[str, Any]:
    groups = []
    if with_cpus:
        size = {"cpu": str(cluster.node_cpus), "memory": f"{cluster.node_memory_gb}Gi"}
        groups.append(_group("cpu", (cluster.nodes, 1, cluster.max_nodes), size, cluster))
    if gpu[2]:
        size = {"cpu": str(cluster.gpu_node_cpus), "memory": f"{cluster.gpu_node_memory_gb}Gi"}
        groups.append(_group("gpu", gpu, size | {"nvidia.com/gpu": str(cluster.gpus_per_node)}, cluster))
    head = _pod("ray-head", {"cpu": "4", "memory": "16Gi"}, cluster)
    names = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    head["spec"]["containers"][0]["ports"] = [{"containerPort": port, "name": name} for name, port in names.items()]
    return {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token"},  # the operator creates the token and passes it to every pod
        "enableInTreeAutoscaling": True,
        "headGroupSpec": {
            # The head runs the driver and no tasks. The submitter is another pod, so listen on all addresses.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": head,
        },
        "workerGroupSpecs": groups,
    }


def _group(name: str, replicas: tuple[int, int, int], size: dict[str, str], cluster: ClusterConfig) -> dict[str, Any]:
    now, least, most = replicas
    pod = _pod("ray-worker", size, cluster)
    if cluster.spot:
        pod["spec"]["tolerations"] = [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]
        pod["spec"]["nodeSelector"] = {"ex4d.io/capacity": "spot"}
    counts = {"replicas": now, "minReplicas": least, "maxReplicas": most}
    return {"groupName": name, **counts, "rayStartParams": {}, "template": pod}


def _pod(name: str, size: dict[str, str], cluster: ClusterConfig) -> dict[str, Any]:
    key = {"name": "wandb", "key": "api-key", "optional": True}
    container: dict[str, Any] = {
        "name": name,
        "image": cluster.image,
        "resources": {"limits": dict(size), "requests": dict(size)},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}, {"name": "shm", "mountPath": "/dev/shm"}],
        "env": [{"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": key}}],
        "securityContext": {"runAsNonRoot": True, "allowPrivilegeEscalation": False},
    }
    if cluster.store_secret:
        container["envFrom"] = [{"secretRef": {"name": cluster.store_secret}}]
    shm = cluster.shared_memory_gb if "nvidia.com/gpu" in size else 8
    volumes = [
        {"name": "data", "persistentVolumeClaim": {"claimName": cluster.volume_claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shm}Gi"}},
    ]
    return {"spec": {"containers": [container], "volumes": volumes}}


# ---------------------------------------------------------------- SLURM


def _slurm(name: str, cluster: ClusterConfig) -> str:
    text = (files("pipelines.commands") / "templates" / f"{name}.sbatch").read_text(encoding="utf-8")
    container = ""
    if cluster.container:
        container = f"--container-image={cluster.container} --container-mounts={cluster.mounts} "
    values = {
        "NAME": cluster.name,
        "NODES": str(cluster.nodes if name == "preprocess" else cluster.gpu_nodes),
        "CPUS": str(cluster.node_cpus if name == "preprocess" else cluster.gpu_node_cpus // cluster.gpus_per_node),
        "GPUS": str(cluster.gpus_per_node),
        "TIME": cluster.time_limit,
        "CONTAINER": container,
        "HEADER": HEADER.format(kind=f"slurm-{name}").strip(),
    }
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


# ---------------------------------------------------------------- AWS


def _aws(cluster: ClusterConfig) -> dict[str, Any]:
    def node(kind: str, least: int, most: int) -> dict[str, Any]:
        config: dict[str, Any] = {"InstanceType": kind}
        if cluster.spot:
            config["InstanceMarketOptions"] = {"MarketType": "spot"}
        return {"resources": {}, "min_workers": least, "max_workers": most, "node_config": config}

    head = {"resources": {"CPU": 0}, "node_config": {"InstanceType": "m6i.xlarge"}}
    join = "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379"
    begin = (
        "RAY_AUTH_MODE=token ray start --head --port=6379 --dashboard-host=127.0.0.1 "
        "--autoscaling-config=~/ray_bootstrap_config.yaml"
    )
    return {
        "cluster_name": cluster.name,
        "max_workers": cluster.max_nodes + cluster.gpu_nodes,
        "provider": {"type": "aws", "region": cluster.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {"image": cluster.image, "container_name": "ex4d", "pull_before_run": True},
        "available_node_types": {
            "head": head,
            "cpu": node(cluster.instance, cluster.nodes, cluster.max_nodes),
            "gpu": node(cluster.gpu_instance, 0, cluster.gpu_nodes),
        },
        "head_node_type": "head",
        # Every node gets the token of the user who runs `ray up`; `ex4d cluster token` creates it.
        "file_mounts": {"/home/ex4d/.ray/auth_token": "~/.ray/auth_token"},
        "head_start_ray_commands": ["ray stop", begin],
        "worker_start_ray_commands": ["ray stop", join],
    }


KINDS: dict[str, Callable[[ClusterConfig], Any]] = {
    "kuberay-preprocess": _rayjob_preprocess,
    "kuberay-train": _rayjob_train,
    "kuberay-cluster": _raycluster,
    "slurm-preprocess": partial(_slurm, "preprocess"),
    "slurm-train": partial(_slurm, "train"),
    "aws": _aws,
}
