"""Summarise the figures of many views in one table per range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ex4d.evaluate.frechet import Gaussian, frechet_distance
from ex4d.evaluate.measures import MEASURES, PERCENT, Figures

FRECHET = {"image": "Fréchet distance, pictures", "video": "Fréchet distance, videos"}


@dataclass
class Range:
    """The views of one range: {method: figures of each view}, and {"METHOD.image": features of all views}."""

    figures: dict[str, list[Figures]] = field(default_factory=dict)
    features: dict[str, Gaussian] = field(default_factory=dict)

    def add(self, figures: Mapping[str, Figures], features: Mapping[str, np.ndarray]) -> None:
        """Add one view."""
        for method, values in figures.items():
            self.figures.setdefault(method, []).append(dict(values))
        for name, rows in features.items():
            self.features.setdefault(name, Gaussian()).add(rows)

    @property
    def count(self) -> int:
        """Number of views."""
        return max(map(len, self.figures.values()), default=0)

    def distances(self) -> dict[str, dict[str, float]]:
        """Return {method: {"image" or "video": Fréchet distance to the real ones}} where both sets have two samples."""
        distances: dict[str, dict[str, float]] = {}
        for name, made in self.features.items():
            method, _, kind = name.rpartition(".")
            real = self.features[f"real.{kind}"]
            if method != "real" and min(real.count, made.count) > 1:
                distances.setdefault(method, {})[kind] = frechet_distance(made, real)
        return distances


def spread(values: Sequence[float | None], digits: int = 2, percent: bool = False) -> str:
    """Return "mean ± standard deviation" of the known values, with their number if some are missing; "" for none."""
    known = np.array([value for value in values if value is not None], np.float64) * (100 if percent else 1)
    if not len(known):
        return ""
    fewer = f" (of {len(known)})" if len(known) < len(values) else ""
    return f"{known.mean():.{digits}f} ± {known.std():.{digits}f}{fewer}"


def table(
    views: Range, labels: Mapping[str, str], distances: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Return (columns, rows) of text: a row per method, in the order of `labels`, without empty columns.

    Args:
        distances: from `views.distances`.
    """
    names = [name for name in MEASURES if any(row[name] is not None for rows in views.figures.values() for row in rows)]
    kinds = [kind for kind in FRECHET if any(kind in row for row in distances.values())]
    counted = [f"{FRECHET[kind]} (n = {views.features[f'real.{kind}'].count})" for kind in kinds]
    columns = ["method", *(MEASURES[name].label for name in names), *counted]
    rows = []
    for method, label in labels.items():
        if method not in views.figures:
            continue
        cells = []
        for name in names:
            values = [row[name] for row in views.figures[method]]
            cells.append(spread(values, MEASURES[name].digits, name in PERCENT))
        cells += [f"{distances[method][kind]:.2f}" if kind in distances.get(method, {}) else "" for kind in kinds]
        rows.append([label, *cells])
    return columns, rows


def lead(views: Range, method: str, over: str, name: str) -> float | None:
    """Return the mean paired difference of a figure between two methods; None without pairs."""
    ours, theirs = ([row[name] for row in views.figures.get(of, [])] for of in (method, over))
    differences = [a - b for a, b in zip(ours, theirs, strict=False) if a is not None and b is not None]
    return float(np.mean(differences)) if differences else None
