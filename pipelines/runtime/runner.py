"""The two ways to run a list of stages: one after another in this process, or on Ray Data. Same rows come out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from ex4d.config import checked, setting
from ex4d.errors import ConfigError, ContractError, Ex4dError
from pipelines.runtime.cluster import connected
from pipelines.runtime.ledger import Attempts
from pipelines.runtime.stage import Chain, Row, Stage, chains, check, pack_row, refused, unpack_row

RUNNERS = ("ray", "inline")
MAX_ROWS_PER_TASK = 8  # a task costs Ray some milliseconds; a killed one is done again, whole
WAVE_ROWS = 20_000  # rows that Ray holds at once, done or to do: some 50 MB, whatever the size of the corpus

# (stages, rows, context, columns that must come out) -> finished rows, in any order
Runner = Callable[[Sequence[Stage], Sequence[Row], Any, tuple[str, ...]], Iterator[Row]]


@dataclass(frozen=True)
class RayConfig:
    """Where Ray runs."""

    address: str | None = setting(
        None,
        "Address of a running cluster: auto or host:port, not ray://…; null: start Ray here and stop it at the end.",
    )
    object_store_mb: int | None = setting(512, "Object store of a Ray started here, MB; null: Ray chooses.", ge=1)
    gpu_actors: int | None = setting(
        None, "Most actors of each stage that needs a GPU; null: as many as the GPUs can hold.", ge=1
    )
    ranks_timeout_s: float = setting(
        1800.0, "Give up a training whose ranks find no place for this long, at the start or after losing a node.", gt=0
    )

    def __post_init__(self) -> None:
        checked(self, "ray")


@contextmanager
def runner(name: str, ray_config: RayConfig, num_workers: int, attempts: Attempts | None = None) -> Iterator[Runner]:
    """Yield the runner of that name; a Ray that was started here is stopped at the end.

    Args:
        attempts: Ray tries a row again whose worker died; these say when to refuse it instead. None: never.

    Raises:
        ConfigError: unknown name, or no worker.
    """
    if name not in RUNNERS:
        raise ConfigError("runner", name, f"allowed: {', '.join(RUNNERS)}")
    if num_workers < 1:
        raise ConfigError("num_workers", num_workers, "at least 1")
    if name == "inline":
        yield inline
        return
    with connected(ray_config.address, num_workers, ray_config.object_store_mb):
        yield partial(on_ray, ray_config, num_workers, attempts)


def inline(stages: Sequence[Stage], rows: Sequence[Row], context: Any, keep: tuple[str, ...]) -> Iterator[Row]:
    """Yield each finished row, in order, run in this process. Bugs propagate."""
    if rows:
        check(stages, rows[0])
    quiet_threads()
    whole = Chain(tuple(stages), keep, propagate=True)
    for row in rows:
        yield whole(row, context)


def on_ray(
    ray_config: RayConfig,
    num_workers: int,
    attempts: Attempts | None,
    stages: Sequence[Stage],
    rows: Sequence[Row],
    context: Any,
    keep: tuple[str, ...],
) -> Iterator[Row]:
    """Yield each finished row as it comes, run on Ray Data. A bug refuses its row, and so do deaths of its worker.

    Raises:
        ConfigError, ContractError: raised by a stage; the run stops.
    """
    import ray.data

    if not rows:
        return
    check(stages, rows[0])
    _settings(ray.data.DataContext.get_current())
    _need_gpus(stages, ray_config)
    work = list(chains(stages, keep, propagate=False))
    # Frames go from chain to chain through the object store, a clip at a time.
    rows_per_task = max(1, min(MAX_ROWS_PER_TASK, len(rows) // (4 * num_workers))) if len(work) == 1 else 1
    waiting = iter(rows)
    while wave := [pack_row(row) for row in islice(waiting, WAVE_ROWS)]:
        dataset = ray.data.from_items(wave, override_num_blocks=-(-len(wave) // rows_per_task))
        for chain in work:
            dataset = _mapped(dataset, _Work(chain, context, attempts, os.getcwd()), ray_config)
        for packed in dataset.iter_rows():
            row = unpack_row(packed)
            if row["refusal"] is not None and row["refusal"]["fate"] == "stop":
                raise _stop(row["refusal"])
            yield row


def _need_gpus(stages: Sequence[Stage], ray_config: RayConfig) -> None:
    """Raise ConfigError where a Ray that was started here has not what a stage reserves: it would wait for ever."""
    import ray

    there = ray.cluster_resources().get("GPU", 0.0)
    wanted = max(stage.num_gpus for stage in stages)
    if ray_config.address is None and wanted > there:
        raise ConfigError("num_gpus", wanted, f"at most {there:g}, the GPUs of this machine; 0 works on the CPU")


def _mapped(dataset: Any, work: _Work, ray_config: RayConfig) -> Any:
    import ray

    num_cpus, num_gpus, memory_mb = work.chain.stages[0].needs
    options: dict[str, Any] = {"num_cpus": num_cpus}
    memory = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    if memory_mb is not None:
        # A machine that has less takes one call at a time, instead of waiting for ever for a larger one.
        options["memory"] = min(memory_mb << 20, max(memory))
    if not num_gpus:
        return dataset.map(partial(_run, work), **options)
    size, options = _pool(ray.cluster_resources(), memory, ray_config.gpu_actors, options, num_gpus)
    return dataset.map(
        _Worker,
        fn_constructor_args=(work,),
        compute=ray.data.ActorPoolStrategy(size=size),
        num_gpus=num_gpus,
        **options,
    )


def _pool(
    cluster: Mapping[str, float], memory: Sequence[int], wanted: int | None, options: dict[str, Any], num_gpus: float
) -> tuple[int, dict[str, Any]]:
    """Return (how many actors work on the GPUs, what each of them takes).

    Actors hold what they take to the end, and a clip reaches them through tasks that need as much: were all CPUs or all
    memory theirs, neither could begin. Where there is only enough for one, the actor takes none of it.

    Args:
        cluster: of Ray. memory: bytes of each node. options: `num_cpus` and perhaps `memory` (bytes) of a task.
    """
    size, taken = wanted or max(1, int(cluster.get("GPU", 0.0) / num_gpus)), dict(options)
    rooms = {"num_cpus": int(cluster.get("CPU", 0.0) / options["num_cpus"])}
    if "memory" in options:
        rooms["memory"] = sum(there // options["memory"] for there in memory)
    for name, room in rooms.items():
        size = max(1, min(size, room - 1))
        if room < 2:
            taken[name] = 0 if name == "num_cpus" else None  # Ray takes 1 for no word of CPUs
    return size, taken


@dataclass(frozen=True)
class _Work:
    """What a worker does with each row: a chain of stages, their context, and where the driver runs."""

    chain: Chain
    context: Any
    attempts: Attempts | None
    folder: str

    def __call__(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Return the packed row after the chain."""
        row = unpack_row(packed)
        if row["refusal"] is not None and row["refusal"]["fate"] == "stop":
            return packed
        name = self.chain.stages[0].name
        if self.attempts is not None and not self.attempts.begin(name, row["key"]) and row["refusal"] is None:
            row = refused(row, "bad", name, "worker_crash", "the processes that worked on it died")
        try:
            return pack_row(self.chain(row, self.context))
        except (ConfigError, ContractError) as error:
            # Ray would wrap it and retry; as a row it reaches the driver as what it is.
            kind = type(error).__name__
            arguments = [str(part) for part in error.args] if isinstance(error, ContractError) else _config_parts(error)
            refusal = {"fate": "stop", "stage": "", "reason": kind, "message": str(error), "arguments": arguments}
            return pack_row({"key": row["key"], "refusal": refusal, "seconds": {}})
        finally:
            if self.attempts is not None:
                self.attempts.end(name, row["key"])

    def prepare(self) -> None:
        """Make this process one where the work means the same as in the driver's: relative paths, threads."""
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        quiet_threads()


class _Worker:
    """A process that keeps its model between rows."""

    def __init__(self, work: _Work):
        work.prepare()
        self.work = work

    def __call__(self, packed: dict[str, Any]) -> dict[str, Any]:
        return self.work(packed)


def _run(work: _Work, packed: dict[str, Any]) -> dict[str, Any]:
    work.prepare()
    return work(packed)


def _config_parts(error: ConfigError) -> list[str]:
    return [error.key, str(error.value), error.allowed]


def _stop(refusal: dict[str, Any]) -> Ex4dError:
    if refusal["reason"] == "ConfigError":
        return ConfigError(*refusal["arguments"])
    return ContractError(refusal["message"])


def quiet_threads() -> None:
    """Keep OpenCV to one thread: processes share the cores, and results must not depend on a pool's size."""
    import cv2

    cv2.setNumThreads(1)


def _settings(context: Any) -> None:
    """Nothing relies on Ray's retries or on skipped blocks: rows carry their own fate, the ledger the results."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    # A task gives its rows when it has done all of them, and reading one long video may take more than the half hour
    # after which Ray would end the run. What may hang is in a child with limits of its own.
    context.execution_no_progress_timeout_s = -1
    context.max_errored_blocks = 0
    context.execution_options.preserve_order = False
    context.print_on_execution_start = False
