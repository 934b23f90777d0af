"""Training under Ray Train: Ray places and restarts the ranks, our own checkpoint says where they go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ex4d.train.config import Place, TrainConfig

if TYPE_CHECKING:
    from ex4d.models.backbone import ModelConfig
    from pipelines.runner import RayConfig

MAX_FAILURES = 3


def on_ray(train: TrainConfig, model: ModelConfig, ray_config: RayConfig) -> int:
    """Train on a Ray cluster, or on a Ray started here; return the exit status.

    A rank that dies takes the group down; Ray starts it again, up to MAX_FAILURES times, and it goes on from the last
    checkpoint in `train.output`, which all nodes must see.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    here = not ray.is_initialized()
    if here:
        ray.init(address=ray_config.address, include_dashboard=False)
    on_gpu = train.device == "cuda" or (train.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    workers = train.num_processes or (int(ray.cluster_resources()["GPU"]) if on_gpu else 2)
    train = dataclasses.replace(train, data=_absolute(train.data), output=_absolute(train.output))
    trainer = TorchTrainer(
        rank_loop,
        train_loop_config={"train": train, "model": model},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(
            name="ray",
            storage_path=train.output,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    try:
        result = trainer.fit()
    finally:
        if here:
            ray.shutdown()
    return 1 if result.error else 0


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def rank_loop(chosen: dict[str, Any]) -> None:
    """Be one rank inside a Ray Train worker."""
    import ray.train

    from ex4d.train import trainer
    from pipelines.train import progress

    context = ray.train.get_context()
    place = Place(context.get_world_rank(), context.get_world_size(), context.get_local_rank())
    with progress(chosen["train"]) as show:
        trainer.train(chosen["train"], chosen["model"], place, show)
