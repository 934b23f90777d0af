"""Write a page of results: one HTML file with videos side by side, figures and the loss curve."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ex4d import storage
from ex4d.geometry.depth import as_grey
from ex4d.viewer import charts
from ex4d.viewer.html import document


@dataclass(frozen=True)
class Clip:
    """One labelled video of a row; `src` is a path relative to the page, or the result of `embedded`."""

    label: str
    src: str


@dataclass(frozen=True)
class Row:
    """Videos of equal length, shown side by side and played in sync."""

    title: str
    clips: Sequence[Clip]


@dataclass(frozen=True)
class Table:
    """A table with a heading, an explanation, and rows of formatted text; `best` is the index of a row to mark."""

    title: str
    explanation: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None


@dataclass(frozen=True)
class Page:
    """The content of the page, from top to bottom."""

    title: str
    summary: Sequence[str]
    rows: Sequence[Row] = ()
    tables: Sequence[Table] = ()
    losses: Sequence[float] = ()
    facts: dict[str, str] = field(default_factory=dict)


def depth_colours(z_depth: np.ndarray) -> np.ndarray:
    """Colour z_depth float [T, H, W] as uint8 [T, H, W, 3]: disparity, near is bright, one scale for the clip."""
    import cv2

    return np.stack(
        [cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB) for grey in as_grey(z_depth)]
    )


def embedded(mp4: bytes) -> str:
    """Return a video as the `src` of a Clip that embeds it in the page."""
    return f"data:video/mp4;base64,{base64.b64encode(mp4).decode()}"


def write(page: Page, path: str | Path) -> str:
    """Write the page as one HTML file to a path or URL, and return it."""
    data = document(
        "results.html",
        page.title,
        styles=("page.css",),
        scripts=("page.js",),
        summary=page.summary,
        rows=page.rows,
        tables=page.tables,
        loss_curve=charts.loss_curve(page.losses) if len(page.losses) > 1 else None,
        facts=page.facts,
    )
    storage.write_bytes(path, data)
    return str(path)
