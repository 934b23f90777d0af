"""The settings of a cluster; the files in cluster/ are rendered from them."""

from __future__ import annotations

from dataclasses import dataclass

from ex4d.config import checked, setting


@dataclass(frozen=True)
class ClusterConfig:
    """Where a job runs."""

    name: str = setting("ex4d", "Prefix of the names of what is created.")
    image: str = setting("ex4d:latest", "Container image, built from cluster/Dockerfile.")
    config: str = setting("", "Config file of the job inside the image; empty: the example of the job.")
    overrides: tuple[str, ...] = setting((), "section.key=value arguments of the job.")
    nodes: int = setting(4, "CPU nodes at the start, and the nodes of a SLURM job.", ge=1)
    max_nodes: int = setting(32, "CPU nodes that the autoscaler may have.", ge=1)
    node_cpus: int = setting(16, "CPUs of a CPU node.", ge=1)
    node_memory_gb: int = setting(64, "Memory of a CPU node.", ge=1)
    gpu_nodes: int = setting(2, "GPU nodes of a training; most GPU nodes of another job.", ge=0)
    gpus_per_node: int = setting(8, "GPUs of a GPU node.", ge=1)
    gpu_node_cpus: int = setting(96, "CPUs of a GPU node.", ge=1)
    gpu_node_memory_gb: int = setting(900, "Memory of a GPU node.", ge=1)
    shared_memory_gb: int = setting(64, "Size of /dev/shm on GPU nodes, which NCCL uses.", ge=1)
    spot: bool = setting(False, "Let workers run on nodes that may be taken away.")
    volume_claim: str = setting("ex4d-data", "Kubernetes volume claim mounted at /data.")
    store_secret: str | None = setting(None, "Kubernetes secret whose keys become environment (object store).")
    container: str | None = setting(None, "SLURM: image that pyxis starts, as registry#name:tag; null: none.")
    mounts: str = setting("/data:/data", "SLURM: container mounts of pyxis.")
    time_limit: str = setting("24:00:00", "SLURM: time limit.")
    instance: str = setting("m6i.4xlarge", "AWS: instance type of CPU nodes.")
    gpu_instance: str = setting("p5.48xlarge", "AWS: instance type of GPU nodes.")
    region: str = setting("us-west-2", "AWS: region.")

    def __post_init__(self) -> None:
        need = checked(self, "cluster")
        need(self.max_nodes >= self.nodes, "max_nodes", "must be at least cluster.nodes")
        for name in ("name", "image", "config", "volume_claim", "mounts", "time_limit", "region"):
            value = getattr(self, name)
            need(all(c.isalnum() or c in "-_./:,@#" for c in value), name, "must be letters, digits and -_./:,@#")
        for override in self.overrides:
            need("=" in override and "\n" not in override, "overrides", "must be section.key=value, one line each")
