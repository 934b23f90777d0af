"""Blocks of lines come back whole, from a row or a table, in the order of their numbers."""

from __future__ import annotations

import random

import pytest

from pipelines.runtime import blocks
from pipelines.runtime.blocks import COMPRESSED, STORED, Blocks, Sorter, columns, pack, unpack
from pipelines.runtime.scratch import scratch
from pipelines.runtime.stage import new_row, pack_row, unpack_row

LINES = ["a line", "", "Größe 大きさ 🎞", "a\rb\u2028c\x85d", " "]  # only a line feed ends a line


@pytest.fixture
def table():
    return Blocks(scratch(), "block")


@pytest.mark.parametrize("level", [STORED, COMPRESSED])
@pytest.mark.parametrize("lines", [[], [""], ["", ""], LINES, ["x" * 100_000]])
def test_a_block_holds_its_lines(lines, level):
    assert unpack(pack(lines, level)) == lines
    assert pack(iter(lines), level) == pack(lines, level)


def test_joined_blocks_are_a_block_of_all_lines():
    parts = [LINES, [], ["second"], [""]]
    joined = b"".join(pack(lines, level) for lines, level in zip(parts, (0, 1, 1, 0), strict=True))
    assert unpack(joined) == [line for lines in parts for line in lines]
    assert unpack(b"") == []


@pytest.mark.parametrize("groups", [{}, {"a": []}, {"b": LINES, "": ["no place"], "a": [], "ab": ["x"]}])
def test_columns_of_a_row_come_back_as_blocks_by_place(table, groups):
    row = unpack_row(pack_row(new_row("key", **columns("lines", groups))))
    table.add_row("lines", row)
    assert {place: unpack(table.at(place)) for place in table.places()} == groups


def test_blocks_of_a_place_are_read_in_the_order_of_their_numbers(table):
    for number, place, line in [(2, "a", "3"), (0, "b", "5"), (1, "a", "1"), (1, "a", "2"), (0, "ab", "4")]:
        table.add(place, pack([line]), number)
    assert unpack(table.at("a")) == ["1", "2", "3"]
    assert unpack(table.of("a")) == ["1", "2", "3", "4"]
    assert unpack(table.of("")) == list(table.lines()) == ["1", "2", "3", "4", "5"]
    assert unpack(table.of("c")) == unpack(table.at("")) == []
    assert table.places() == ["a", "ab", "b"]


def test_rows_that_arrive_in_any_order_are_read_in_that_of_their_numbers(table):
    for number in (3, 0, 2, 1):
        table.add_row("lines", columns("lines", {"a": [f"a{number}"], "b": [f"b{number}"]}), number)
    assert list(table.lines()) == ["a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3"]


def test_a_sorter_keeps_all_lines_in_order_and_few_in_memory(table, monkeypatch):
    monkeypatch.setattr(Sorter, "MAX_LINES", 3)
    lines = [(random.Random(number).choice("abc"), str(number)) for number in range(50)]
    sorter = Sorter(table, number=1)
    table.add("a", pack(["first"]), 0)
    written = []
    monkeypatch.setattr(blocks, "pack", lambda lines, level: written.append(len(lines)) or pack(lines, level))
    for place, line in lines:
        sorter.add(place, line)
    sorter.close()
    sorter.close()
    assert max(written) == 3
    for place in "abc":
        expected = ["first"] * (place == "a") + [line for own, line in lines if own == place]
        assert unpack(table.at(place)) == expected
