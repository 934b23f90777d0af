"""Stages, and the Guard that decides what happens to a row whose stage fails.

A row is one video or one clip: a dict of columns. A stage is a function that gets exactly the columns it declares to
read, and returns exactly the columns it declares to write. Therefore a list of stages can be checked before any work,
a column is dropped once no later stage reads it, and every stage can be tested without a runner.
"""

from __future__ import annotations

import io
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from ex4d import npy
from ex4d.errors import BadSample, ConfigError, ContractError, Filtered

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# Columns of every row, besides those that stages declare: its key, used in logs and tables; how it was rejected
# ({"fate", "stage", "reason", "message"} or None); and the seconds that each stage took.
ROW_COLUMNS = ("key", "refusal", "seconds")
# Transient failures of stores, networks and disks: rejects for these reasons are not kept for the next run.
TRANSIENT = ("unreadable", "truncated_download", "private_host")
# The video is fine, but this depth estimator cannot handle it.
NO_FAULT = ("no_parallax",)


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Args:
        name: used in rejects and tables.
        function: (columns read, context) -> columns written. The context is the job's settings, the same for all rows.
        reads, writes: names of columns. A stage may also read `key` and `refusal`.
        takes_rejected: also run on rejected rows, where columns of stages that did not run are None.
        num_cpus, num_gpus, memory_mb: resources of one call. Neighbours with equal resources run in one task, so that
            frames are not moved between processes.
    """

    name: str
    function: Callable[[Row, Any], Mapping[str, Any]]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    takes_rejected: bool = False
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    memory_mb: int | None = None

    @property
    def needs(self) -> tuple[float, float, int | None]:
        """The resources of one call; consecutive stages with equal needs share a task."""
        return self.num_cpus, self.num_gpus, self.memory_mb

    def over(self, columns: Mapping[str, str], name: str | None = None) -> Stage:
        """Return the same stage applied to other columns of the row.

        Args:
            columns: {name in the stage: name in the row}; other columns keep their names.
            name: name of the new stage; None keeps it.
        """
        reads, writes = (tuple(columns.get(own, own) for own in names) for names in (self.reads, self.writes))
        function = partial(_renamed, self.function, columns)
        return replace(self, name=name or self.name, function=function, reads=reads, writes=writes)


def _renamed(
    function: Callable[[Row, Any], Mapping[str, Any]], columns: Mapping[str, str], row: Row, context: Any
) -> Mapping[str, Any]:
    own = {theirs: mine for mine, theirs in columns.items()}
    written = function({own.get(name, name): value for name, value in row.items()}, context)
    return {columns.get(name, name): value for name, value in written.items()}


def new_row(key: str, **columns: Any) -> Row:
    """Return a new row."""
    return {"key": key, "refusal": None, "seconds": {}, **columns}


def refuse(row: Row, stage: str, error: BadSample | Filtered) -> Row:
    """Return the row marked as rejected by a stage (or the driver) because of `error`."""
    is_fault = not isinstance(error, Filtered) and error.reason not in NO_FAULT
    return refused(row, "bad" if is_fault else "filtered", stage, error.reason, error.message)


def is_bug(row: Row) -> bool:
    """Return True if a row was rejected because of an unexpected error."""
    return row["refusal"] is not None and row["refusal"]["reason"].startswith("bug:")


def is_lasting(row: Row) -> bool:
    """Return True if the same settings would reject the row again, so that retrying it is pointless."""
    return row["refusal"] is not None and row["refusal"]["reason"] not in TRANSIENT and not is_bug(row)


def refused(row: Row, fate: str, stage: str, reason: str, message: str, **more: str) -> Row:
    """Return the row marked as rejected."""
    return row | {"refusal": {"fate": fate, "stage": stage, "reason": reason, "message": message, **more}}


@dataclass(frozen=True)
class Guard:
    """Run one stage on one row and translate its exception into the row's fate.

    BadSample: bad. Filtered: filtered. ConfigError, ContractError: the run stops. Anything else is a bug: with
    `propagate` it is raised; otherwise the row is rejected as `bug:<Type>` with its traceback, and the run continues.
    """

    stage: Stage
    propagate: bool

    def __call__(self, row: Row, context: Any) -> Row:
        """Return the row with the stage's columns; if the stage fails, they are None and the row is rejected."""
        stage = self.stage
        empty = dict.fromkeys(stage.writes)
        if row["refusal"] is not None and not stage.takes_rejected:
            return {**row, **empty}
        started = time.perf_counter()
        try:
            row = {**row, **empty, **self._call(row, context)}
        except (BadSample, Filtered) as error:
            row = refuse({**row, **empty}, stage.name, error)
        except (ConfigError, ContractError):
            raise
        except Exception as error:  # the one broad except: a bug in one clip must not stop a run of a million
            if self.propagate:
                raise
            logger.error("bug in stage %s, row %s", stage.name, row["key"], exc_info=True)
            reason = f"bug:{type(error).__name__}"
            trace = traceback.format_exc()
            row = refused({**row, **empty}, "bad", stage.name, reason, str(error), traceback=trace)
        return {**row, "seconds": {**row["seconds"], stage.name: time.perf_counter() - started}}

    def _call(self, row: Row, context: Any) -> Mapping[str, Any]:
        stage = self.stage
        written = stage.function({name: row[name] for name in stage.reads}, context)
        if set(written) != set(stage.writes):
            raise TypeError(f"stage {stage.name} wrote {sorted(written)}, it declares {sorted(stage.writes)}")
        return written


@dataclass(frozen=True)
class Track:
    """One list of stages of a stream. Its finished rows may produce rows of later tracks, as a video produces clips.

    Args:
        name: name of the pass, in run.jsonl and in progress.
        keep: columns to return besides ROW_COLUMNS.
    """

    name: str
    stages: tuple[Stage, ...]
    keep: tuple[str, ...]


def check(stages: Sequence[Stage], columns: Iterable[str]) -> None:
    """Check that each stage reads only columns that rows start with or an earlier stage writes.

    Raises:
        ContractError: the list is invalid; names the stage and the column.
    """
    known = {*columns, *ROW_COLUMNS}
    for stage in stages:
        missing = [name for name in stage.reads if name not in known]
        if missing:
            raise ContractError(f"stage {stage.name} reads {missing}, which no earlier stage writes")
        taken = [name for name in stage.writes if name in ROW_COLUMNS]
        if taken:
            raise ContractError(f"stage {stage.name} writes {taken}, which belong to the runner")
        known |= set(stage.writes)


@dataclass(frozen=True)
class Counted:
    """Rows whose number is known, so that the last tasks of a pass can be small."""

    rows: Iterable[Row]
    number: int

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return self.number


class Readable:
    """Checks the columns of the first row of each track against what its stages read."""

    def __init__(self, tracks: Sequence[Track]):
        self._unseen = {track.name: track.stages for track in tracks}

    def __call__(self, name: str, row: Row) -> Row:
        """Return the row unchanged. Raises ContractError, see `check`."""
        if name in self._unseen:
            check(self._unseen.pop(name), row)
        return row


@dataclass(frozen=True)
class Chain:
    """Stages that run one after another in one process; a column is dropped after the last stage that reads it.

    Args:
        stages: in order.
        keep: columns to return besides ROW_COLUMNS.
        propagate: raise bugs instead of rejecting their rows.
    """

    stages: tuple[Stage, ...]
    keep: tuple[str, ...]
    propagate: bool

    def __call__(self, row: Row, context: Any) -> Row:
        """Return the row after all stages."""
        for index, stage in enumerate(self.stages):
            row = Guard(stage, self.propagate)(row, context)
            needed = {*ROW_COLUMNS, *self.keep, *(name for later in self.stages[index + 1 :] for name in later.reads)}
            row = {name: value for name, value in row.items() if name in needed}
        return row


def chains(stages: Sequence[Stage], keep: tuple[str, ...], propagate: bool) -> Iterator[Chain]:
    """Yield the chains of a list of stages, split where the needed resources change."""
    position = 0
    for _, members in groupby(stages, key=lambda stage: stage.needs):
        group = tuple(members)
        position += len(group)
        later = {name for stage in stages[position:] for name in stage.reads} | set(keep)
        yield Chain(group, tuple(sorted(later)), propagate)


def quiet_threads() -> None:
    """Limit OpenCV to one thread: processes share the cores, and results must not depend on the thread count."""
    import cv2

    cv2.setNumThreads(1)


def pack_row(row: Row) -> dict[str, Any]:
    """Serialize a row as {"json": str, "arrays": bytes}; arrays are stored as npz, without pickle."""
    arrays = {name: value for name, value in row.items() if isinstance(value, np.ndarray)}
    buffer = io.BytesIO()
    if arrays:
        np.savez(buffer, allow_pickle=False, **arrays)
    plain = {name: value for name, value in row.items() if name not in arrays}
    return {"json": json.dumps(plain), "arrays": buffer.getvalue()}


def size_of(packed: Mapping[str, Any]) -> int:
    """Return the bytes of a serialized row."""
    return len(packed["json"]) + len(packed["arrays"])


def unpack_row(packed: Mapping[str, Any]) -> Row:
    """Deserialize the result of `pack_row`."""
    row = json.loads(packed["json"])
    if packed["arrays"]:
        row.update(npy.archive(packed["arrays"]))
    return row
