"""Draw small SVG charts: a histogram with a threshold, the share kept at each threshold, a stacked bar, lines.

Each is Markup: its text is escaped here, and templates insert it unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 190, 42, 20, 12
BINS = 36


def number(value: float) -> str:
    """Return a number with three significant digits."""
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def limits(values: np.ndarray, marks: Sequence[float] = ()) -> tuple[float, float]:
    """Return the ends of an axis that covers the marks and all values but the highest half per cent."""
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    low, high = min([low, *marks]), max([high, *marks])
    if high - low < 1e-12:
        return low - max(abs(low) * 0.05, 1e-3), high + max(abs(high) * 0.05, 1e-3)
    return low, high


def histogram(values: Sequence[float] | np.ndarray, label: str, mark: float | None = None) -> Markup:
    """Return an SVG histogram of finite values; values beyond the axis count in the last bar. `mark`: a threshold."""
    data = np.asarray(values, np.float64)
    low, high = limits(data, [] if mark is None else [mark])
    counts, _ = np.histogram(np.clip(data, low, high), bins=BINS, range=(low, high))
    most = max(1, int(counts.max()))
    plot_w, plot_h = WIDTH - LEFT - 6, HEIGHT - TOP - BOTTOM
    step = plot_w / BINS
    bars = "".join(
        f'<rect x="{LEFT + i * step:.1f}" y="{TOP + plot_h * (1 - c / most):.1f}" width="{step - 1:.1f}" '
        f'height="{plot_h * c / most:.1f}"><title>{int(c)} from {number(low + i * (high - low) / BINS)}</title></rect>'
        for i, c in enumerate(counts)
        if c
    )
    line = "" if mark is None else _vertical(LEFT + (mark - low) / (high - low) * plot_w)
    return _svg(label, f'<g fill="var(--mark)">{bars}</g>{line}{_axes(number(low), number(high), str(most))}')


def kept_curve(values: Sequence[float] | np.ndarray, keep: str, label: str, mark: float | None = None) -> Markup:
    """Return an SVG line of the share of values that each threshold keeps: those >= it ("min") or <= it ("max")."""
    data = np.sort(np.asarray(values, np.float64))
    low, high = limits(data, [] if mark is None else [mark])
    at = np.linspace(low, high, 121)
    below = np.searchsorted(data, at, side="left" if keep == "min" else "right") / len(data)
    kept = 1 - below if keep == "min" else below
    plot_w, plot_h = WIDTH - LEFT - 6, HEIGHT - TOP - BOTTOM
    points = " ".join(
        f"{LEFT + (a - low) / (high - low) * plot_w:.1f},{TOP + plot_h * (1 - k):.1f}"
        for a, k in zip(at, kept, strict=True)
    )
    grid = "".join(f'<path d="M{LEFT} {TOP + plot_h * part}H{WIDTH - 6}" stroke="var(--line)"/>' for part in (0, 0.5))
    line = "" if mark is None else _vertical(LEFT + (mark - low) / (high - low) * plot_w)
    curve = f'<polyline points="{points}" fill="none" stroke="var(--mark)" stroke-width="2"/>'
    return _svg(label, f"{grid}{curve}{line}{_axes(number(low), number(high), '100 %')}")


def split_bar(parts: Sequence[tuple[str, int]], label: str) -> Markup:
    """Return a stacked SVG bar of the shares of (name, count), with a legend of the counts and their sum, `label`."""
    whole = sum(count for _, count in parts)
    total = max(1, whole)
    colours = ("var(--mark)", "var(--warm)", "var(--bad)")
    at, bars, names = 0.0, "", f"<span><b>{whole:,}</b> {escape(label)} =</span>"
    for index, (name, count) in enumerate(parts):
        width = 1000 * count / total
        bars += f'<rect x="{at:.1f}" width="{max(0.0, width - 2):.1f}" height="18" rx="3" fill="{colours[index % 3]}"/>'
        at += width
        names += (
            f'<span><i class="part-{index % 3}"></i>{escape(name)} <b>{count:,}</b> '
            f"<small>{count / total:.1%}</small></span>"
        )
    shape = 'viewBox="0 0 1000 18" preserveAspectRatio="none" class="split" role="img"'
    legend = f'<div class="legend">{names}</div>'
    return Markup(f'<svg {shape} aria-label="{escape(label)}">{bars}</svg>{legend}')


class Scale:
    """Maps the values of one axis to [0, 1]: logarithmic if they span more than a decade; names in sorted order."""

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

    def ticks(self) -> list[tuple[float, Any]]:
        """Return (position, value) of the axis labels: each name, or the ends and the middle."""
        if self.names:
            return [(self(name), name) for name in self.names]
        if self.low == self.high:
            return [(0.5, self.low)]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [(0.0, self.low), (0.5, middle), (1.0, self.high)]


@dataclass(frozen=True)
class Line:
    """A line of a chart: its points (x, y), and its style. `dots`: whether to mark each point."""

    points: Sequence[Sequence[float]]
    colour: str = "var(--mark)"
    width: float = 1.0
    dots: bool = False


def lines(drawn: Sequence[Line], label: str, x_name: str = "step", width: int = 900, height: int = 240) -> Markup:
    """Return an SVG of lines over shared axes, the last one on top; at least one must have a point."""
    points = [point for line in drawn for point in line.points]
    across, up = Scale([x for x, _ in points]), Scale([y for _, y in points])
    left, bottom = 60, height - 34

    def place(point: Sequence[float]) -> tuple[float, float]:
        return left + across(point[0]) * (width - left - 30), bottom - up(point[1]) * (bottom - 14)

    body = ""
    for at, value in up.ticks():
        y = bottom - at * (bottom - 14)
        body += f'<path d="M{left} {y:.1f}H{width - 30}" stroke="var(--line)"/>'
        body += f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    for x, at, anchor in ((left, across.low, "start"), (width - 30, across.high, "end")):
        body += f'<text x="{x}" y="{height - 12}" text-anchor="{anchor}">{escape(x_name)} {at:g}</text>'
    for line in drawn:
        places = [place(point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        body += f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="{line.width:g}"/>'
        if line.dots:
            body += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{line.colour}"/>' for x, y in places)
    shape = f'viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" font-size="12"'
    return Markup(f'<svg {shape}><g fill="var(--soft)">{body}</g></svg>')


def loss_curve(losses: Sequence[float]) -> Markup:
    """Return an SVG line of the losses (thin) and of their running mean (thick)."""
    y = np.asarray(losses, dtype=np.float64)
    window = max(1, len(y) // 20)
    smooth = np.convolve(y, np.ones(window) / window, mode="valid")
    steps = np.arange(1, len(y) + 1)
    each = Line(np.stack([steps, y], axis=1).tolist(), "var(--line)")
    mean = Line(np.stack([steps[: len(smooth)] + (window - 1) / 2, smooth], axis=1).tolist(), width=2)
    return lines([each, mean], "training loss")


def _vertical(x: float) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{HEIGHT - BOTTOM}" stroke="var(--bad)" stroke-width="1.5" '
        'stroke-dasharray="4 3"/>'
    )


def _axes(low: str, high: str, top: str) -> str:
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - 6}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)"/>'
        f'<g fill="var(--soft)" font-size="11"><text x="{LEFT}" y="{HEIGHT - 6}">{low}</text>'
        f'<text x="{WIDTH - 6}" y="{HEIGHT - 6}" text-anchor="end">{high}</text>'
        f'<text x="{LEFT - 5}" y="{TOP + 8}" text-anchor="end">{top}</text>'
        f'<text x="{LEFT - 5}" y="{HEIGHT - BOTTOM}" text-anchor="end">0</text></g>'
    )


def _svg(label: str, body: str) -> Markup:
    shape = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}"'
    return Markup(f"<svg {shape}>{body}</svg>")
