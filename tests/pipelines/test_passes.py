"""The loop over a pass: rows are counted, and too many unexpected errors stop the run."""

from __future__ import annotations

import pytest

from pipelines.runtime.passes import Passes, TooManyBugs
from pipelines.runtime.progress import Progress
from pipelines.runtime.stage import Chain, Stage, new_row


def invert(row, context):
    return {"inverse": 1 / row["number"]}


STAGE = Stage("invert", invert, reads=("number",), writes=("inverse",))


class Guarded:
    """Runs like a worker: a bug rejects its row."""

    problems = ("a node was quarantined",)

    def __call__(self, tracks, rows, context, added):
        for row in rows:
            yield tracks[0].name, Chain(tracks[0].stages, tracks[0].keep, propagate=False)(row, context)


def passes(max_bugs: int) -> Passes:
    return Passes("encode", Guarded(), Progress(None), max_bugs)


def rows(*numbers: int):
    return [new_row(f"row-{place}", number=number, video_s=2.0) for place, number in enumerate(numbers)]


def test_as_many_bugs_as_allowed_are_kept_and_named():
    chosen = passes(max_bugs=2)
    done = list(chosen.run("numbers", (STAGE,), rows(1, 0, 4, 0), None, ("inverse",)))
    assert [row["inverse"] for row in done] == [1.0, None, 0.25, None]
    assert [(bug["key"], bug["reason"]) for bug in chosen.bugs] == [
        ("row-1", "bug:ZeroDivisionError"),
        ("row-3", "bug:ZeroDivisionError"),
    ]
    assert chosen.worked == {"numbers": 4}
    assert chosen.progress.tallies["invert"].video_s == 8.0
    bugs, machines = chosen.problems()
    assert "2 rows ended in unexpected errors" in bugs
    assert machines == "a node was quarantined"


def test_one_more_stops_the_run_with_the_setting_that_allows_it():
    chosen = passes(max_bugs=1)
    done = chosen.run("numbers", (STAGE,), rows(1, 0, 0, 4), None)
    assert [next(done)["key"], next(done)["key"]] == ["row-0", "row-1"]
    with pytest.raises(TooManyBugs, match=r"encode\.max_bugs=1"):
        next(done)
    assert len(chosen.bugs) == 2


def test_bugs_of_all_passes_of_a_job_count_together():
    chosen = passes(max_bugs=1)
    assert len(list(chosen.run("first", (STAGE,), rows(0), None))) == 1
    with pytest.raises(TooManyBugs):
        list(chosen.run("second", (STAGE,), rows(0), None))
