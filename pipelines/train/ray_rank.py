"""One rank under Ray Train: it joins the other ranks, trains, and stops when the command or its node requests it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from ex4d.errors import ConfigError
from ex4d.train import checkpoint
from ex4d.train.config import EXIT_PREEMPTED, Place, usable_ranks
from pipelines.runtime.cluster import free_address

logger = logging.getLogger(__name__)

# State of this process if it is a rank: a stop was requested, by SIGTERM here or by the command; it was the command.
_stop_asked, _command_stops = threading.Event(), threading.Event()


def rendezvous() -> Any:
    """Return a TorchConfig that tells the ranks where rank 0 is, but leaves opening the process group to the engine.

    Ray's own config would open it over all workers, of which an elastic run may use fewer, and let Ray handle SIGTERM.
    """
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class Rendezvous(Backend):
        share_cuda_visible_devices = True  # each rank uses the GPU of its local rank

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            address, port = worker_group.execute_single(0, _free_address)
            worker_group.execute(_prepare, address, port)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Rendezvous

    return Config()


def _free_address() -> tuple[str, int]:
    import ray

    return free_address(ray.util.get_node_ip_address())


def _prepare(address: str, port: int) -> None:
    """Prepare this worker to be a rank. Runs in its main thread, the only thread that can set signal handlers."""
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    signal.signal(signal.SIGTERM, lambda *_: _stop_asked.set())


def rank_loop(chosen: dict[str, Any]) -> tuple[int, str]:
    """Run one rank inside a Ray Train worker; return (exit status, message).

    Permanent errors are returned. Errors that a restart may fix are raised, so that Ray restarts the group.
    """
    import ray.train

    from ex4d.train import report, trainer
    from ex4d.train.progress import Progress

    train, context = chosen["train"], ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if train.min_processes:
        path = checkpoint.latest(train.output)
        workers = usable_ranks(train, workers, checkpoint.read_state(path).global_batch_size if path else None)
        if rank >= workers:
            return 0, ""  # the global batch is not divisible by the number of processes: this one stays idle
    if Path(chosen["folder"]).is_dir():
        os.chdir(chosen["folder"])  # so that relative paths mean the same as for the command
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    if rank == 0:
        threading.Thread(target=_wait_for_stop, args=(chosen["flag"],), daemon=True).start()
    try:
        with Progress(train) as show:
            place = Place(rank, workers, context.get_local_rank())
            code = trainer.train(train, chosen["model"], place, show, _stop_asked.is_set, RemoteValidation)
    except report.NonFinite as error:
        return 1, str(error)
    except ConfigError as error:
        return 2, str(error)
    if code == EXIT_PREEMPTED and train.min_processes and rank == 0 and not _command_stops.is_set():
        raise RankLeaves("SIGTERM to a rank; the run goes on with those that stay")
    return code, ""


class RankLeaves(Exception):
    """A rank of an elastic run got SIGTERM and a checkpoint was written. Ray restarts the others without it."""


class Judge:
    """An actor that validates one set of weights: a process with its own resources, which ends with rank 0."""

    def evaluate_weights(self, folder: str) -> None:
        """Validate the weights in a folder and write the result into it."""
        from ex4d.train import validation

        os.nice(19)
        validation.evaluate_weights(Path(folder))


class RemoteValidation:
    """A validation that runs in an actor (see validator.Handle), with a GPU of its own unless `device` is cpu."""

    def __init__(self, folder: Path, device: str):
        import ray

        self._folder = folder
        gpus = 0 if device == "cpu" else 1
        actor: Any = ray.remote(Judge).options(num_cpus=0, num_gpus=gpus, scheduling_strategy="DEFAULT")
        self._actor = actor.remote()
        self._done = self._actor.evaluate_weights.remote(str(folder))

    def poll(self) -> int | None:
        """Return the exit status, or None while it is running."""
        import ray

        if not ray.wait([self._done], timeout=0)[0]:
            return None
        try:
            ray.get(self._done)
        except ray.exceptions.RayError as error:
            (self._folder / "log.txt").write_text(str(error), encoding="utf-8")
            return 1
        finally:
            self.kill()
        return 0

    def kill(self) -> None:
        """Kill the actor."""
        import ray

        ray.kill(self._actor)


def _wait_for_stop(flag: Any) -> None:
    """Poll the command for as long as this process lives; the command treats silence as a lost rank."""
    import ray

    try:
        while True:
            if ray.get(flag.asked.remote()):
                _command_stops.set()
                _stop_asked.set()
            time.sleep(1.0)
    except ray.exceptions.RayError as error:  # the command is gone, and this process soon will be
        logger.warning("lost the connection to the command: %s", error)
