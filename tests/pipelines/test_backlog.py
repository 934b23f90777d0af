"""The queue of a stream takes only as many rows at once as the driver can hold."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.runtime import backlog
from pipelines.runtime.backlog import Backlog, Step
from pipelines.runtime.stage import Counted, Stage, Track, new_row, size_of, unpack_row
from pipelines.runtime.worker import Facts

MB = 1 << 20


def queue(num_rows, row_bytes):
    """Return a Backlog of one step whose rows are known to be quick, and the keys of the rows read so far."""
    read = []

    def rows():
        for number in range(num_rows):
            read.append(f"{number}")
            yield new_row(f"{number}", block=np.zeros(row_bytes, np.uint8))

    return queue_of(rows()), read


def queue_of(rows):
    track = Track("all", (Stage("work", dict, ("block",), ()),), ())
    found = Backlog([Step(track, None, (1.0, 0.0, None), 0, 0)], rows, SimpleNamespace(store_bytes=0))
    for _ in range(10):
        found.learn(0, Facts(0.001, 0, "", False), 1)
    return found


def taken(waiting):
    """Take batches until the queue gives none."""
    found = []
    while waiting.next_step("", {}, 1000) is not None:
        found.append(waiting.take(0, ""))
    return found


def test_small_rows_share_a_task():
    waiting, _ = queue(200, 100)
    assert [len(batch.keys) for batch in taken(waiting)] == [64, 64, 64, 8]


def test_large_rows_do_not_share_a_task_and_only_some_are_under_way():
    waiting, read = queue(300, MB)
    first = taken(waiting)
    assert {len(batch.keys) for batch in first} == {4}
    assert len(read) == 128
    assert not waiting.waiting[0]
    waiting.finish(first[0])
    assert [batch.keys for batch in taken(waiting)] == [[f"{number}" for number in range(128, 132)]]
    for batch in first[1:]:
        waiting.finish(batch)
    rest = taken(waiting)
    assert len(read) == 132 + 124
    assert sum(batch.source_bytes for batch in rest) == sum(size_of(row) for batch in rest for row in batch.rows)


@pytest.mark.parametrize("row_mb", [5, 200])
def test_a_row_larger_than_a_task_or_than_all_that_may_be_under_way_is_done_all_the_same(row_mb, monkeypatch):
    monkeypatch.setattr(backlog, "SOURCE_BYTES", 100 * MB)
    waiting, read = queue(2, row_mb * MB)
    keys = []
    while batches := taken(waiting):
        assert all(len(unpack_row(batch.rows[0])["block"]) == row_mb * MB for batch in batches)
        keys += [batch.keys for batch in batches]
        for batch in batches:
            waiting.finish(batch)
    assert keys == [["0"], ["1"]]
    assert read == ["0", "1"]


def test_a_lost_batch_can_restart_while_no_further_row_is_read():
    waiting, read = queue(300, MB)
    first = taken(waiting)
    waiting.restart(first[0])
    assert waiting.next_step("", {}, 1000) == 0
    assert waiting.take(0, "") is first[0]
    assert len(read) == 128


def test_the_last_tasks_are_small_where_the_number_of_rows_is_known():
    rows = Counted((new_row(f"{number}", block=np.zeros(1, np.uint8)) for number in range(1000)), 1000)
    waiting = queue_of(rows)
    sizes = []
    while waiting.next_step("", {}, 4) is not None:
        sizes.append(len(waiting.take(0, "").keys))
    assert sizes[0] > 50
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-16:] == [1] * 16
    assert sum(sizes) == 1000
