"""A row whose processes keep dying is given up; the count survives the run."""

from __future__ import annotations

import pytest

from pipelines.runtime.attempts import Attempts


def test_a_row_is_given_up_after_so_many_deaths_in_a_run(tmp_path):
    attempts = Attempts(str(tmp_path), 3)
    for _ in range(3):
        assert attempts.may("decode", "clip")
        attempts.begin("decode", ["clip", "other"])
        attempts.died("decode", ["clip"])
    assert not attempts.may("decode", "clip")
    assert attempts.may("decode", "other")
    assert attempts.may("depth", "clip")


def test_a_row_that_ended_well_starts_anew(tmp_path):
    attempts = Attempts(str(tmp_path), 2)
    for _ in range(5):
        attempts.begin("decode", ["clip"])
        attempts.died("decode", ["clip"])
        assert attempts.may("decode", "clip")
        attempts.end("decode", ["clip"])
    attempts.begin("decode", ["next"])
    assert Attempts(str(tmp_path), 2).earlier == {"decode next": 1}


@pytest.mark.parametrize("where", ["folder", "store"])
def test_deaths_with_whole_runs_count_less_but_not_for_ever(tmp_path, where):
    """A killed run also counts deaths of innocent rows; a row that kills every run is found nevertheless."""
    output = str(tmp_path) if where == "folder" else f"memory://{tmp_path.name}"
    tried = []
    for _ in range(12):
        run = Attempts(output, 3)
        tried.append(run.may("decode", "clip"))
        run.begin("decode", ["clip"])
    assert tried == [True] * 9 + [False] * 3


def test_an_account_of_attempts_that_is_damaged_starts_anew(tmp_path, caplog):
    Attempts(str(tmp_path), 3).begin("decode", ["clip"])
    (tmp_path / "staging" / "attempts.json").write_text('["no account"]')
    assert Attempts(str(tmp_path), 3).earlier == {}
    assert "replaced by an empty one" in caplog.text


def test_attempts_that_cannot_be_written_down_stop_nothing(tmp_path, caplog):
    (tmp_path / "staging").write_text("a file where the folder should be")
    attempts = Attempts(str(tmp_path), 3)
    attempts.begin("decode", ["key"])
    attempts.end("decode", ["key"])
    assert "cannot be recorded" in caplog.text
