"""Render the page of a sweep: curves, parallel coordinates, importance, pairs of settings, and variation over seeds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from ex4d.viewer import charts
from ex4d.viewer.charts import Scale, number
from ex4d.viewer.html import document

MAX_PAIRS = 6
COLOURS = {"finished": "var(--mark)", "stopped": "var(--soft)", "failed": "var(--bad)", "interrupted": "var(--warm)"}


def sweep_page(
    metric: str,
    keys: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    importance: Mapping[str, float],
    repeats: Mapping[str, Sequence[float]],
    verdict: str,
) -> bytes:
    """Return the HTML page of a sweep.

    Args:
        metric: the minimised metric. keys: the settings that were varied.
        rows: the trials, best first: `point`, `state`, `value`, `step`, `curve` [[step, value], …].
        importance: relative importance of each setting. repeats: {"best" or "default": values of several seeds}.
        verdict: the sentence at the top.
    """
    usable = [row for row in rows if row["value"] is not None]
    table = [
        (
            index + 1,
            *(_text(row["point"].get(key, "–")) for key in keys),
            _text(row["value"]),
            _text(row["step"]),
            row["state"],
        )
        for index, row in enumerate(rows)
    ]
    pairs = [
        {"title": f"{a} × {b}", "chart": _pair(usable, a, b)}
        for a, b in itertools.islice(itertools.combinations(keys, 2), MAX_PAIRS)
    ]
    return document(
        "sweep.html",
        "sweep",
        styles=("page.css", "report.css"),
        metric=metric,
        verdict=verdict,
        header_cells=("", *keys, metric, "step", "state"),
        table_rows=table,
        curves=_curves(usable, metric) if usable else "",
        parallel=_parallel(usable, keys, metric) if usable else "",
        importance=[(key, f"{share:.0%}") for key, share in importance.items()],
        pairs=pairs if usable else [],
        repeats=[(name, ", ".join(_text(value) for value in values)) for name, values in repeats.items()],
    )


def _text(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value if value is not None else "–")


def _curves(rows: Sequence[Mapping[str, Any]], metric: str) -> Markup:
    drawn = [charts.Line(row["curve"], COLOURS[row["state"]], 3 if row is rows[0] else 1, dots=True) for row in rows]
    drawn = [line for line in reversed(drawn) if line.points]
    return charts.lines(drawn, f"{metric} over steps") if drawn else Markup("")


def _parallel(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str) -> Markup:
    axes = [key for key in keys if all(key in row["point"] for row in rows)]
    columns = [[row["point"][key] for row in rows] for key in axes] + [[row["value"] for row in rows]]
    scales = [Scale(column) for column in columns]
    frame = _Frame(900, 300)
    places = [frame.x(index / max(1, len(scales) - 1)) for index in range(len(scales))]
    body = ""
    for index, row in reversed(list(enumerate(rows))):
        path = " ".join(f"{x:.1f},{frame.y(s(c[index])):.1f}" for x, s, c in zip(places, scales, columns, strict=True))
        width = 3 if index == 0 else 1
        body += f'<polyline points="{path}" fill="none" stroke="{COLOURS[row["state"]]}" stroke-width="{width}"/>'
    for x, name, scale in zip(places, [*axes, metric], scales, strict=True):
        body += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(0)}" y2="{frame.y(1)}" stroke="var(--soft)"/>'
        body += frame.text(x + 6, frame.height - 6, name, "middle")
        for at, value in scale.ticks():
            # Above the line that ends there, so that both are readable.
            body += frame.text(x + 6, frame.y(at) - 5, _text(value), "start")
    return frame.svg("settings and value of each trial", body)


def _pair(rows: Sequence[Mapping[str, Any]], a: str, b: str) -> Markup:
    both = [row for row in rows if a in row["point"] and b in row["point"]]
    if not both:
        return Markup("")
    xs, ys = Scale([row["point"][a] for row in both]), Scale([row["point"][b] for row in both])
    frame, body = _Frame(440, 260), ""
    for at, value in ys.ticks():
        body += f'<path d="M{frame.x(0)} {frame.y(at):.1f}H{frame.x(1)}" stroke="var(--line)"/>'
        body += frame.text(frame.x(0) - 12, frame.y(at) + 4, _text(value), "end")
    for at, value in xs.ticks():
        body += frame.text(frame.x(at), frame.height - 10, _text(value), "middle")
    for index, row in reversed(list(enumerate(both))):
        x, y = frame.x(xs(row["point"][a])), frame.y(ys(row["point"][b]))
        title = escape(f"{_text(row['value'])} at step {row['step']}")
        radius = 9 - 6 * index / max(1, len(both) - 1)  # the best trial has the largest dot
        body += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{COLOURS[row["state"]]}" opacity="0.8">'
        body += f"<title>{title}</title></circle>"
    return frame.svg(f"{a} and {b}", body)


@dataclass(frozen=True)
class _Frame:
    """A drawing of `width` × `height` units whose inner part maps to [0, 1] in x and y, with y upwards."""

    width: float
    height: float

    def x(self, at: float) -> float:
        return 76 + at * (self.width - 152)

    def y(self, at: float) -> float:
        return self.height - 46 - at * (self.height - 72)

    def text(self, x: float, y: float, text: str, anchor: str) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

    def svg(self, label: str, body: str) -> Markup:
        shape = f'viewBox="0 0 {self.width:g} {self.height:g}" role="img" aria-label="{escape(label)}" font-size="12"'
        return Markup(f'<svg {shape}><g fill="var(--soft)">{body}</g></svg>')
