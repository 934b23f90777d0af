"""Train under Ray Train: Ray places and restarts the ranks, which resume from our own checkpoints."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ex4d.train import checkpoint
from ex4d.train.config import EXIT_PREEMPTED, TrainConfig
from pipelines.runtime.cluster import connected
from pipelines.train.ray_rank import rank_loop, rendezvous

if TYPE_CHECKING:
    from ex4d.models.backbone import ModelConfig
    from pipelines.runtime.runner import RayConfig

logger = logging.getLogger(__name__)

SILENT_S = 15.0  # a run whose rank 0 has been silent for this long is considered lost
MAX_FAILURES = 3  # per start; if a start reached a new checkpoint, the run is started again


def on_ray(train: TrainConfig, model: ModelConfig, ray_config: RayConfig, resize_every_s: float = 60.0) -> int:
    """Train on a Ray cluster, or on a Ray instance started here; return the exit status.

    If a rank or node dies, the group stops and Ray restarts it from the last checkpoint in `train.output`, which all
    nodes must see: on as many processes as before, or with `train.min_processes` on those that are available.
    If they are not available within `ray.ranks_timeout_s`, the exit status is 1.
    SIGTERM to this process, or to a rank of a run that is not elastic, leads to a checkpoint and EXIT_PREEMPTED. In an
    elastic run, SIGTERM to a rank means that its node is going away, and the run continues without it. SIGTERM while
    no rank runs ends the run at once.

    Args:
        resize_every_s: interval at which an elastic run checks whether more processes are available.
    """
    start_s, retries = _tries(train, ray_config.ranks_timeout_s)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_s)
    with connected(ray_config.address, object_store_mb=ray_config.object_store_mb, show_workers=True):
        from ray.train import ControllerError, TrainingFailedError

        with _asking_to_stop() as (flag, asked):
            while True:
                before = _step(train)
                try:
                    result = _fit(_trainer(train, model, flag, resize_every_s, retries), flag, asked)
                except ControllerError as error:
                    print(f"ex4d train: {_no_ranks(train, ray_config, error)}", file=sys.stderr)
                    return 1
                except TrainingFailedError as error:
                    if _step(train) <= before:
                        failures = sorted(getattr(error, "worker_failures", {}).items())
                        cause = "; ".join(f"rank {rank}: {failure}" for rank, failure in failures) or str(error)
                        print(f"ex4d train: {cause}", file=sys.stderr)
                        return 1
                    logger.warning("a checkpoint was written since the last start; starting again after: %s", error)
                else:
                    code, message = (EXIT_PREEMPTED, "") if result is None else result.return_value
                    if message:
                        print(f"ex4d train: {message}", file=sys.stderr)
                    return code


def _tries(train: TrainConfig, limit_s: float) -> tuple[float, int]:
    """Return how long one attempt to place the ranks may take, s, and the number of retries (each logs a page)."""
    # An elastic run falls back to fewer ranks after a failed attempt, so its attempts are short.
    start_s = min(60.0, limit_s) if train.min_processes else limit_s / 4
    return start_s, max(0, round(limit_s / start_s) - 1)


def _fit(trainer: Any, flag: Any, asked: threading.Event) -> Any:
    """Return the result of `trainer.fit()`; None if `asked` is set while no rank is running that could notice it."""
    import ray

    outcome: Future = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:  # noqa: BLE001 - re-raised in the waiting thread
            outcome.set_exception(error)

    # In a thread, so that the main thread can end the run while Ray waits for nodes.
    threading.Thread(target=fit, daemon=True).start()
    while not wait([outcome], timeout=1.0).done:
        if asked.is_set() and ray.get(flag.silent_s.remote()) > SILENT_S:
            print(
                "ex4d train: no rank is running that could write a checkpoint; the last checkpoint is kept",
                file=sys.stderr,
            )
            return None
    return outcome.result()


def _trainer(train: TrainConfig, model: ModelConfig, flag: Any, resize_every_s: float, retries: int) -> Any:
    import ray
    import ray.train.torch

    api: Any = ray.train  # its types are those of Ray Train V1, which has no elastic runs

    class Trainer(api.torch.TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            """Return Ray's own callbacks except the cleaner of placement groups, for when the controller dies.

            Ray removes the ranks' group anyway when this command ends. The cleaner queries the dashboard of the newest
            Ray instance on the head's machine. Without a dashboard it logs two lines per second; another instance's
            dashboard makes it remove the group of a live run.
            """
            kept = super()._create_default_callbacks()
            return [one for one in kept if type(one).__name__ != "PlacementGroupCleanerCallback"]

    on_gpu = train.device == "cuda" or (train.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    workers = train.num_processes or (int(ray.cluster_resources()["GPU"]) if on_gpu else 2)
    train = train.absolute()
    return Trainer(
        rank_loop,
        train_loop_config={"train": train, "model": model, "flag": flag, "folder": os.getcwd()},
        scaling_config=api.ScalingConfig(
            num_workers=(train.min_processes, workers) if train.min_processes else workers,
            use_gpu=on_gpu,
            elastic_resize_monitor_interval_s=resize_every_s,
        ),
        torch_config=rendezvous(),
        run_config=api.RunConfig(
            name="ray",
            storage_path=train.output,
            failure_config=api.FailureConfig(max_failures=MAX_FAILURES, controller_failure_limit=retries),
        ),
    )


def _step(train: TrainConfig) -> int:
    path = checkpoint.latest(train.output)
    return checkpoint.read_state(path).step if path else 0


def _no_ranks(train: TrainConfig, ray_config: RayConfig, error: Exception) -> str:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    return (
        f"the ranks found no place within ray.ranks_timeout_s={ray_config.ranks_timeout_s:g} s ({len(nodes)} nodes: "
        f"{there}; {str(error).splitlines()[0]}). The last checkpoint is of step {_step(train)}; run the same command "
        "when the nodes are back, or with train.min_processes on fewer"
    )


# ---------------------------------------------------------------- signals from the command to the ranks


class StopFlag:
    """An actor on the command's node: the command sets the flag, and rank 0 polls it every second."""

    def __init__(self) -> None:
        self._asked, self._heard = False, -math.inf

    def ask(self) -> None:
        """Request the stop."""
        self._asked = True

    def asked(self) -> bool:
        """Return True if rank 0, which polls this, should stop."""
        self._heard = time.monotonic()
        return self._asked

    def silent_s(self) -> float:
        """Return the seconds since rank 0 last polled."""
        return time.monotonic() - self._heard


@contextmanager
def _asking_to_stop() -> Iterator[tuple[Any, threading.Event]]:
    """Yield a StopFlag that SIGTERM or Ctrl-C sets, and an event that is set with it; the process continues."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    flag: Any = ray.remote(StopFlag).options(num_cpus=0, scheduling_strategy=here).remote()
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag, asked
        return

    def ask(*_: object) -> None:
        flag.ask.remote()
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag, asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
