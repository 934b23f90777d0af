"""The page of a sweep: curves, parallel coordinates, importance, pairs of settings, and the noise of seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from ex4d.viewer.charts import number
from ex4d.viewer.html import document

WIDTH, HEIGHT, EDGE = 900.0, 300.0, 46.0
MAX_PAIRS = 6
COLOURS = {"finished": "var(--mark)", "stopped": "var(--soft)", "failed": "var(--bad)"}


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
        metric: what was minimised. keys: the settings that varied.
        rows: the trials, best first: `point`, `state`, `value`, `step`, `curve` [[step, value], …].
        importance: share of each setting in what decides. repeats: {"best", "default"}: values of several seeds.
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


class _Scale:
    """Places the values of one setting on [0, 1]: by logarithm where they span more than a decade, names in order."""

    def __init__(self, values: Sequence[Any]):
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        self.names = [] if numbers else sorted({str(value) for value in values})
        self.log = numbers and min(values) > 0 and max(values) / min(values) > 10
        ends: tuple[Any, Any] = (min(values), max(values)) if numbers else (self.names[0], self.names[-1])
        self.low, self.high = ends

    def __call__(self, value: Any) -> float:
        if self.names:
            return self.names.index(str(value)) / max(1, len(self.names) - 1)
        low, high, at = (math.log(x) if self.log else float(x) for x in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5


def _curves(rows: Sequence[Mapping[str, Any]], metric: str) -> Markup:
    points = [point for row in rows for point in row["curve"]]
    if not points:
        return Markup("")
    x_scale, y_scale = _Scale([step for step, _ in points]), _Scale([value for _, value in points])
    body = ""
    for row in reversed(rows):
        at = [(_x(x_scale(step)), _y(y_scale(value))) for step, value in row["curve"]]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        width = 2.5 if row is rows[0] else 1
        body += f'<polyline points="{line}" fill="none" stroke="{COLOURS[row["state"]]}" stroke-width="{width}"/>'
        body += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{COLOURS[row["state"]]}"/>' for x, y in at)
    ends = (_text(float(y_scale.low)), _text(float(y_scale.high)), _text(x_scale.low), _text(x_scale.high))
    return _svg(f"{metric} over steps", body + _ends(*ends))


def _parallel(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str) -> Markup:
    axes = [key for key in keys if all(key in row["point"] for row in rows)]
    columns = [[row["point"][key] for row in rows] for key in axes] + [[row["value"] for row in rows]]
    scales = [_Scale(column) for column in columns]
    places = [_x(index / max(1, len(scales) - 1)) for index in range(len(scales))]
    body = ""
    for index, row in reversed(list(enumerate(rows))):
        line = " ".join(f"{x:.1f},{_y(s(c[index])):.1f}" for x, s, c in zip(places, scales, columns, strict=True))
        width = 3 if index == 0 else 1
        body += f'<polyline points="{line}" fill="none" stroke="{COLOURS[row["state"]]}" stroke-width="{width}"/>'
    for x, name, scale in zip(places, [*axes, metric], scales, strict=True):
        body += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{EDGE}" y2="{HEIGHT - EDGE}" stroke="var(--soft)"/>'
        for y, text in ((HEIGHT - EDGE + 16, scale.low), (EDGE - 8, scale.high), (HEIGHT - 8, name)):
            body += f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(_text(text))}</text>'
    return _svg("settings and value of each trial", body)


def _pair(rows: Sequence[Mapping[str, Any]], a: str, b: str) -> Markup:
    both = [row for row in rows if a in row["point"] and b in row["point"]]
    if not both:
        return Markup("")
    xs, ys = _Scale([row["point"][a] for row in both]), _Scale([row["point"][b] for row in both])
    body = ""
    for index, row in reversed(list(enumerate(both))):
        x, y = _x(xs(row["point"][a])), _y(ys(row["point"][b]))
        title = escape(f"{_text(row['value'])} at step {row['step']}")
        radius = 9 - 6 * index / max(1, len(both) - 1)  # the best is the largest
        body += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{COLOURS[row["state"]]}" opacity="0.8">'
        body += f"<title>{title}</title></circle>"
    return _svg(f"{a} and {b}", body + _ends(_text(ys.low), _text(ys.high), _text(xs.low), _text(xs.high)))


def _x(at: float) -> float:
    return 2 * EDGE + at * (WIDTH - 4 * EDGE)


def _y(at: float) -> float:
    return HEIGHT - EDGE - at * (HEIGHT - 2 * EDGE)


def _ends(bottom: str, top: str, left: str, right: str) -> str:
    x = EDGE * 2 - 8
    return (
        f'<text x="{x}" y="{HEIGHT - EDGE}" text-anchor="end">{escape(bottom)}</text>'
        f'<text x="{x}" y="{EDGE + 4}" text-anchor="end">{escape(top)}</text>'
        f'<text x="{_x(0)}" y="{HEIGHT - 14}" text-anchor="middle">{escape(left)}</text>'
        f'<text x="{_x(1)}" y="{HEIGHT - 14}" text-anchor="middle">{escape(right)}</text>'
    )


def _svg(label: str, body: str) -> Markup:
    shape = f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(label)}" font-size="12"'
    return Markup(f'<svg {shape}><g fill="var(--soft)">{body}</g></svg>')
