"""The report of an evaluation: a table for each range, and a page with the videos side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ex4d.evaluate.summary import Range
from ex4d.viewer import page
from pipelines.evaluate.stages import METHODS, WARP
from pipelines.runtime.result import Result

SHOWN = ("source", "depth", "condition", *(name for name in METHODS if name != WARP), "truth")  # condition: the warp
LABELS = {**METHODS, "truth": "true novel view"}
WIDTH = 200  # maximum width of the terminal tables, in characters


@dataclass(frozen=True)
class View:
    """One view on the page: its key, its range, and {name in SHOWN: mp4}."""

    key: str
    range: str
    videos: Mapping[str, bytes]


@dataclass(frozen=True)
class Report:
    """The results of an evaluation.

    Args:
        result: counts, rejects and problems, as for any run; `report` is the path of the page.
        tables: {range: (columns, rows of text)}.
        ranges: {range: the figures of every view}.
        shown: a few views for the page.
        facts: what was evaluated, and how.
    """

    result: Result
    tables: Mapping[str, tuple[list[str], list[list[str]]]]
    ranges: Mapping[str, Range]
    shown: Sequence[View]
    facts: Mapping[str, Any]

    @property
    def exit_code(self) -> int:
        """0 success, 1 failure."""
        return self.result.exit_code

    def table(self) -> str:
        """Return the tables and problems as text for the terminal."""
        from rich.console import Console
        from rich.table import Table

        text = io.StringIO()
        console = Console(file=text, width=WIDTH, markup=False)
        for name, (columns, rows) in self.tables.items():
            table = Table(title=f"{name}: {_explained(self.ranges[name])}")
            # Transposed, to fit terminals: a row per figure, a column per method.
            for head in ("", *(method for method in METHODS if method in self.ranges[name].figures)):
                table.add_column(head, justify="right" if head else "left", no_wrap=True)
            for figure in zip(columns[1:], *(row[1:] for row in rows), strict=True):
                table.add_row(*figure)
            console.print(table)
        counts = self.result.counts
        lines = [f"views: {counts['views_planned']} planned, {counts['views']} done, {counts['views_bad']} bad"]
        lines += [f"{row['name']}: {row['reason']}: {row['message']}" for row in self.result.rejects[:10]]
        lines += [*self.result.problems, *([f"page: {self.result.report}"] if self.result.report else [])]
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def page(self, title: str, summary: Sequence[str], videos: str | None = None, **more: Any) -> page.Page:
        """Return the HTML page.

        Args:
            videos: path of the videos relative to the page; None embeds them.
            more: further fields of the page, e.g. `losses` of a training; `facts` to add to the evaluation's.
        """
        facts = {**self.facts, **more.pop("facts", {})}
        return page.Page(
            title=title,
            summary=summary,
            rows=[page.Row(view.key, _clips(view, videos)) for view in self.shown],
            tables=[
                page.Table(name, _explained(self.ranges[name]), columns, rows)
                for name, (columns, rows) in self.tables.items()
            ],
            facts={name: str(value) for name, value in facts.items()},
            **more,
        )


def _explained(views: Range) -> str:
    clips = "1 clip" if views.count == 1 else f"{views.count} clips"
    return f"mean ± standard deviation over {clips}; frame 0, which the model is given, is left out"


def _clips(view: View, videos: str | None) -> list[page.Clip]:
    names = [name for name in SHOWN if name in view.videos]
    return [
        page.Clip(
            LABELS.get(name, name),
            page.embedded(view.videos[name]) if videos is None else f"{videos}/{view.key}.{name}.mp4",
        )
        for name in names
    ]
