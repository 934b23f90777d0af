"""The worker's side of a stream: runs a chain on rows, in a task or in an actor that keeps its models between calls."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ex4d.errors import ConfigError, ContractError
from pipelines.runtime.stage import Chain, pack_row, quiet_threads, size_of, unpack_row

CUDA_ERROR = "CUDA error"  # begins what torch says of them; "CUDA out of memory" leaves the process as it was


@dataclass(frozen=True)
class Work:
    """What a worker does with each row: a chain of stages, their context, and the driver's working directory."""

    chain: Chain
    context: Any
    folder: str

    def __call__(self, packed: dict[str, Any]) -> dict[str, Any]:
        """Return the packed row after the chain."""
        row = unpack_row(packed)
        if row["refusal"] is not None and row["refusal"]["fate"] == "stop":
            return packed
        try:
            return pack_row(self.chain(row, self.context))
        except (ConfigError, ContractError) as error:
            # Ray would wrap the exception; as a row, it reaches the driver intact.
            kind = type(error).__name__
            parts = [error.key, str(error.value), error.allowed] if isinstance(error, ConfigError) else []
            refusal = {"fate": "stop", "stage": "", "reason": kind, "message": str(error), "arguments": parts}
            return pack_row({"key": row["key"], "refusal": refusal, "seconds": {}})

    def prepare(self) -> None:
        """Set up this process like the driver's: working directory (for relative paths) and thread limits."""
        if os.path.isdir(self.folder):
            os.chdir(self.folder)
        quiet_threads()


@dataclass(frozen=True)
class Facts:
    """What the driver needs to know of a finished call besides its rows.

    Args:
        has_bug: a row ended in a bug there. lost_gpu: an error occurred after which no CUDA call of the process works.
    """

    seconds: float
    size_bytes: int
    node: str
    has_bug: bool
    lost_gpu: bool = False


def run_batch(work: Work, packed: Sequence[dict[str, Any]]) -> tuple[Facts, list[dict[str, Any]]]:
    """Run the chain on packed rows in a worker; return (Facts, the packed rows after the chain)."""
    import ray

    work.prepare()
    started = time.monotonic()
    done = [work(row) for row in packed]
    size_bytes = sum(map(size_of, done))
    bugs = [after for before, after in zip(packed, done, strict=True) if _has_bug(after) and not _has_bug(before)]
    lost_gpu = any(CUDA_ERROR in row["json"] for row in bugs)
    node = ray.get_runtime_context().get_node_id()
    return Facts(time.monotonic() - started, size_bytes, node, bool(bugs), lost_gpu), done


def _has_bug(packed: dict[str, Any]) -> bool:
    return '"reason": "bug:' in packed["json"]


class Worker:
    """An actor, i.e. a process that keeps its models between calls."""

    def __init__(self, work: Work):
        self.work = work

    def node(self) -> str:
        """Return the id of the node that the actor runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, packed: Sequence[dict[str, Any]]) -> tuple[Facts, list[dict[str, Any]]]:
        """Run the chain on packed rows; see `run_batch`."""
        return run_batch(self.work, packed)
