"""How a parent handles a child's answer, and the child's behaviour before it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from ex4d.errors import BadSample
from ex4d.isolation import Isolated, Limits

LIMITS = Limits(wall_s=30, cpu_s=30, memory_bytes=2**30)
FACTS = {"type": "ValueError", "message": "", "values": [], "trace": ""}


@pytest.fixture
def isolated(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent))  # the child inherits the path
    with contextlib.closing(Isolated(LIMITS, "attempts")) as child:
        yield child
    sys.modules.pop("attempts", None)


def test_a_crash_is_not_taken_for_the_memory_of_an_earlier_call(isolated):
    """One child serves many videos, and its peak memory is that of the largest one."""
    with pytest.raises(BadSample, match="decode_memory"):
        isolated.call("hold", 2**31)
    with pytest.raises(BadSample, match="SIGABRT"):
        isolated.call("abort")
    assert isolated.call("hold", 900 << 20) == 900 << 20  # of 1024: it succeeds, close to the limit
    with pytest.raises(BadSample, match="SIGABRT"):
        isolated.call("abort")


def test_what_packing_an_answer_takes_counts_too(isolated):
    assert isolated.call("strided", 400 << 20).shape == (200 << 20, 2)
    with pytest.raises(BadSample, match="SIGABRT"):
        isolated.call("abort")


@pytest.mark.parametrize(
    "answer",
    [[True], [True, 1, 5], [1, 1], [False, {"type": "ValueError"}], [False, FACTS | {"values": 7}], "yes", None],
)
def test_an_answer_of_another_shape_is_a_crash(monkeypatch, answer, isolated):
    isolated.call("facts")
    monkeypatch.setattr("ex4d.isolation.process.receive", lambda *_args: answer)
    with pytest.raises(BadSample, match="decode_crash"):
        isolated.call("facts")


@pytest.mark.parametrize("memory", ["5", None, True])
def test_so_is_an_answer_that_says_nothing_of_its_memory(monkeypatch, memory, isolated):
    isolated.call("facts")
    answers = iter([[True, 1], memory])
    monkeypatch.setattr("ex4d.isolation.process.receive", lambda *_args: next(answers))
    with pytest.raises(BadSample, match="decode_crash"):
        isolated.call("facts")


def test_values_that_make_no_exception_are_an_error(monkeypatch, isolated):
    isolated.call("facts")
    answers = iter([[False, FACTS | {"type": "BadSample"}], 1])
    monkeypatch.setattr("ex4d.isolation.process.receive", lambda *_args: next(answers))
    with pytest.raises(RuntimeError, match="BadSample"):
        isolated.call("facts")
