"""Run stages on rows, in this process or on a Ray cluster, with the same results."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ex4d.config import checked, setting
from ex4d.errors import ConfigError
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.cluster import connected
from pipelines.runtime.stage import Chain, Readable, Row, Stage, Track, quiet_threads

RUNNERS = ("ray", "inline")


class Runner(Protocol):
    """Runs rows through stages.

    problems: sentences about failures of machines; with any, the run fails after its commit.
    """

    @property
    def problems(self) -> Sequence[str]: ...

    def __call__(
        self, tracks: Sequence[Track], rows: Iterable[Row], context: Any, added: deque[tuple[str, Row]]
    ) -> Iterator[tuple[str, Row]]:
        """Yield (track, finished row), in any order.

        Args:
            rows: rows of the first track.
            added: while the caller has a finished row, it appends to this (track, row) for rows of later tracks, which
                run next, preferably on the node where the finished row's files are.
        """


@dataclass(frozen=True)
class RayConfig:
    """Where Ray runs."""

    address: str | None = setting(
        None,
        "Address of a running cluster: auto or host:port, not ray://…; null: start Ray here and stop it at the end.",
    )
    object_store_mb: int | None = setting(
        None,
        "Size of the object store of a Ray started here, MB; it holds clips between CPU and GPU stages; null: Ray "
        "chooses.",
        ge=1,
    )
    gpu_actors: int | None = setting(
        None,
        "Maximum number of actors per GPU stage; null: as many as the GPUs can hold, including GPUs that join later.",
        ge=1,
    )
    ranks_timeout_s: float = setting(
        1800.0, "Stop a training whose ranks cannot be placed for this long, at the start or after losing a node.", gt=0
    )

    def __post_init__(self) -> None:
        checked(self, "ray")


@contextmanager
def runner(name: str, ray_config: RayConfig, num_workers: int, attempts: Attempts | None = None) -> Iterator[Runner]:
    """Yield the runner of that name; a Ray instance that was started for it is stopped at the end.

    Args:
        attempts: decides when a row whose workers keep dying is rejected instead of retried. None: never.

    Raises:
        ConfigError: unknown name, or num_workers < 1.
    """
    if name not in RUNNERS:
        raise ConfigError("runner", name, f"allowed: {', '.join(RUNNERS)}")
    if num_workers < 1:
        raise ConfigError("num_workers", num_workers, "at least 1")
    if name == "inline":
        yield Inline()
        return
    with connected(ray_config.address, num_workers, ray_config.object_store_mb):
        yield OnRay(ray_config, attempts)


class Inline:
    """Run rows in this process, one after another. Bugs propagate."""

    problems: tuple[str, ...] = ()

    def __call__(
        self, tracks: Sequence[Track], rows: Iterable[Row], context: Any, added: deque[tuple[str, Row]]
    ) -> Iterator[tuple[str, Row]]:
        """Yield each finished row, in order; rows that it produces run before the next row."""
        quiet_threads()
        whole = {track.name: Chain(track.stages, track.keep, propagate=True) for track in tracks}
        readable = Readable(tracks)
        for first in rows:
            todo = deque([(tracks[0].name, first)])
            while todo:
                name, row = todo.popleft()
                yield name, whole[name](readable(name, row), context)
                todo.extend(added)
                added.clear()


class OnRay:
    """Run rows on a Ray cluster. A row is rejected after a bug, or if the processes that work on it die repeatedly.

    Args:
        ray_config: settings of Ray.
        attempts: decides when to reject a row whose processes die.
    """

    def __init__(self, ray_config: RayConfig, attempts: Attempts | None):
        self.ray_config, self.attempts = ray_config, attempts
        self.problems: list[str] = []

    def __call__(
        self, tracks: Sequence[Track], rows: Iterable[Row], context: Any, added: deque[tuple[str, Row]]
    ) -> Iterator[tuple[str, Row]]:
        """Yield each row when it is finished.

        Raises:
            ConfigError, ContractError: raised by a stage; this stops the run.
        """
        from pipelines.runtime.stream import Stream

        _need_gpus([stage for track in tracks for stage in track.stages], self.ray_config)
        stream = Stream(tracks, rows, context, self.attempts, self.ray_config.gpu_actors, self.problems)
        yield from stream.run(added)


def through(
    execute: Runner, stages: Sequence[Stage], rows: Iterable[Row], context: Any, keep: tuple[str, ...]
) -> Iterator[Row]:
    """Run one list of stages; yield each finished row, in any order."""
    return (row for _, row in execute((Track("", tuple(stages), keep),), rows, context, deque()))


def _need_gpus(stages: Sequence[Stage], ray_config: RayConfig) -> None:
    """Raise ConfigError if a stage needs more GPUs than a Ray instance started here has: it would wait forever."""
    import ray

    there = ray.cluster_resources().get("GPU", 0.0)
    wanted = max(stage.num_gpus for stage in stages)
    if ray_config.address is None and wanted > there:
        raise ConfigError("num_gpus", wanted, f"at most {there:g}, the GPUs of this machine; 0 runs on the CPU")
