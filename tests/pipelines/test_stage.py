"""The Guard assigns fates, lists of stages are checked, and both runners give the same rows."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from ex4d.errors import BadSample, ConfigError, ContractError, Filtered
from pipelines.runtime import runner
from pipelines.runtime.stage import Chain, Guard, Stage, chains, check, is_bug, new_row, pack_row, unpack_row


@pytest.fixture
def by_value(ray_local):
    """Pickle the test's functions by value, since Ray's workers cannot import a test file."""
    ray_local.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray_local
    ray_local.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def picky(row, context):
    number = row["number"]
    if number in context["bad"]:
        raise BadSample("unlucky", f"number {number}")
    if number in context["filtered"]:
        raise Filtered("small", number, 10)
    if number in context["bugs"]:
        return {"value": np.full(3, number // 0)}
    return {"value": np.full(3, number, np.int64)}


def total(row, context):
    return {"total": int(row["value"].sum())}


def record(row, context):
    return {"recorded": row["refusal"]["reason"] if row["refusal"] else "good"}


def breach(row, context):
    raise ContractError("the artifact is not what it claims") if row["number"] == 3 else BadSample("other")


def choice(row, context):
    raise ConfigError("preprocess.depth", "magic", "allowed: sidecar")


PICKY = Stage("picky", picky, reads=("number",), writes=("value",))
TOTAL = Stage("total", total, reads=("value",), writes=("total",))
RECORD = Stage("record", record, reads=("refusal",), writes=("recorded",), takes_rejected=True)
STAGES = (PICKY, TOTAL, RECORD)
CONTEXT = {"bad": (2, 5), "filtered": (7,), "bugs": ()}


def rows(count):
    return [new_row(f"row-{number:04d}", number=number) for number in range(count)]


@pytest.mark.parametrize(
    ("number", "fate", "reason", "message"),
    [(2, "bad", "unlucky", "number 2"), (7, "filtered", "small", "score 7, threshold 10")],
)
def test_guard_turns_an_error_into_a_fate_and_fills_the_columns(number, fate, reason, message):
    row = Guard(PICKY, propagate=True)(new_row("key", number=number), CONTEXT)
    assert row["refusal"] == {"fate": fate, "stage": "picky", "reason": reason, "message": message}
    assert row["value"] is None
    assert set(row["seconds"]) == {"picky"}


def test_a_refused_row_passes_later_stages_untouched_but_reaches_those_that_ask():
    row = Chain(STAGES, ("total", "recorded"), propagate=True)(new_row("key", number=2), CONTEXT)
    assert (row["total"], row["recorded"]) == (None, "unlucky")
    assert set(row["seconds"]) == {"picky", "record"}


def test_a_bug_propagates_inline_and_refuses_its_row_elsewhere():
    context = CONTEXT | {"bugs": (4,)}
    with pytest.raises(ZeroDivisionError):
        Guard(PICKY, propagate=True)(new_row("key", number=4), context)
    row = Guard(PICKY, propagate=False)(new_row("key", number=4), context)
    assert row["refusal"]["reason"] == "bug:ZeroDivisionError"
    assert "number // 0" in row["refusal"]["traceback"]
    assert is_bug(row)


@pytest.mark.parametrize(("function", "kind"), [(breach, ContractError), (choice, ConfigError)])
def test_contract_and_config_errors_stop_the_run(function, kind):
    with pytest.raises(kind):
        Guard(Stage("stop", function, ("number",), ()), propagate=False)(new_row("key", number=3), {})


def test_undeclared_columns_are_a_bug():
    liar = Stage("liar", lambda row, context: {"value": 1, "more": 2}, reads=(), writes=("value",))
    with pytest.raises(TypeError, match="liar"):
        Guard(liar, propagate=True)(new_row("key"), {})
    assert is_bug(Guard(liar, propagate=False)(new_row("key"), {}))


def test_a_stage_sees_only_what_it_declares():
    nosy = Stage("nosy", lambda row, context: {"seen": sorted(row)}, reads=("number",), writes=("seen",))
    assert Guard(nosy, propagate=True)(new_row("key", number=1, other=2), {})["seen"] == ["number"]


def test_a_list_that_cannot_work_is_found_before_any_work():
    with pytest.raises(ContractError, match=r"total reads \['value'\]"):
        check((TOTAL, PICKY), ("number",))
    with pytest.raises(ContractError, match="belong to the runner"):
        check((Stage("bad", picky, (), ("refusal",)),), ())
    check(STAGES, ("number",))


def test_columns_are_dropped_after_their_last_reader_and_chains_split_by_resources():
    gpu = Stage("gpu", total, reads=("value",), writes=("total",), num_gpus=0.5)
    first, second, third = chains((PICKY, gpu, RECORD), ("recorded",), propagate=True)
    row = first(new_row("key", number=1), CONTEXT)
    assert set(row) == {"key", "refusal", "seconds", "value"}
    row = second(row, CONTEXT)
    assert set(row) == {"key", "refusal", "seconds"}
    assert set(third(row, CONTEXT)) == {"key", "refusal", "seconds", "recorded"}


def test_rows_travel_with_one_schema():
    good = new_row("key", frames=np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), name="a\udcff", score=0.5)
    packed = pack_row(good)
    back = unpack_row(packed)
    assert np.array_equal(back["frames"], good["frames"])
    assert (back["name"], back["score"], back["refusal"]) == ("a\udcff", 0.5, None)
    bare = pack_row(new_row("key"))
    assert {name: type(value) for name, value in bare.items()} == {name: type(value) for name, value in packed.items()}


def test_inline_runs_in_order_and_counts():
    done = list(runner.through(runner.Inline(), STAGES, rows(10), CONTEXT, ("total",)))
    assert [row["total"] for row in done] == [0, 3, None, 9, 12, None, 18, None, 24, 27]


def test_unknown_runner_and_no_workers_are_refused_before_any_work():
    with pytest.raises(ConfigError, match="runner"), runner.runner("spark", runner.RayConfig(), 1):
        pass
    with pytest.raises(ConfigError, match="num_workers"), runner.runner("inline", runner.RayConfig(), 0):
        pass


@pytest.mark.ray
def test_one_bad_row_in_a_thousand_costs_one_row(by_value):
    context = {"bad": (617,), "filtered": (), "bugs": ()}
    with runner.runner("ray", runner.RayConfig(), 2) as execute:
        done = list(runner.through(execute, STAGES, rows(1000), context, ("number", "total", "recorded")))
    assert sorted(row["number"] for row in done) == list(range(1000))
    assert [row["number"] for row in done if row["refusal"]] == [617]
    assert Counter(row["recorded"] for row in done) == {"good": 999, "unlucky": 1}
    assert all(row["total"] == 3 * row["number"] for row in done if not row["refusal"])


@pytest.mark.ray
def test_ray_refuses_bugs_keeps_fates_and_crosses_resource_borders(by_value):
    context = {"bad": (2, 5), "filtered": (7,), "bugs": (4,)}
    half = Stage("total", total, reads=("value",), writes=("total",), num_cpus=0.5)
    with runner.runner("ray", runner.RayConfig(), 2) as execute:
        done = list(runner.through(execute, (PICKY, half, RECORD), rows(12), context, ("number", "total")))
    fates = {row["number"]: row["refusal"]["reason"] for row in done if row["refusal"]}
    assert fates == {2: "unlucky", 5: "unlucky", 7: "small", 4: "bug:ZeroDivisionError"}
    assert sum(row["total"] for row in done if not row["refusal"]) == 3 * (66 - 18)


@pytest.mark.ray
@pytest.mark.parametrize(("function", "kind"), [(breach, ContractError), (choice, ConfigError)])
def test_on_ray_too_a_broken_contract_or_choice_stops_the_run_as_what_it_is(by_value, function, kind):
    stage = Stage("stop", function, ("number",), ())
    with runner.runner("ray", runner.RayConfig(), 2) as execute, pytest.raises(kind):
        list(runner.through(execute, (stage,), rows(6), {}, ()))


@pytest.mark.ray
def test_rows_are_taken_from_a_generator_no_faster_than_they_are_worked_on(by_value):
    taken = []

    def source():
        for row in rows(400):
            taken.append(row["key"])
            yield row

    with runner.runner("ray", runner.RayConfig(), 2) as execute:
        done = runner.through(execute, (PICKY,), source(), CONTEXT, ("number",))
        first = next(done)
        assert len(taken) < 40
        numbers = [first["number"], *(row["number"] for row in done)]
    assert sorted(numbers) == list(range(400))


@pytest.mark.ray
def test_more_memory_than_there_is_means_one_at_a_time_and_not_for_ever(by_value):
    greedy = Stage("total", total, reads=("value",), writes=("total",), memory_mb=2**30)
    with runner.runner("ray", runner.RayConfig(), 2) as execute:
        done = list(runner.through(execute, (PICKY, greedy), rows(2), CONTEXT, ("total",)))
    assert sorted(row["total"] for row in done) == [0, 3]
