"""Render the pages of a dataset: its contents and rejects, and, before it is built, what thresholds would keep.

All text is escaped, since file names are untrusted. Equal data give equal bytes.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ex4d.quality import SCORES
from ex4d.viewer import charts
from ex4d.viewer.html import document

STYLES = ("page.css", "report.css")


@dataclass(frozen=True)
class Preview:
    """One sample of the contact sheet.

    Args:
        title, lines: text beside the pictures.
        frames, masked: uint8 [N,H,W,3], one row of pictures each: the clip, and the clip under its masks.
        labels: a caption for each masked picture.
    """

    title: str
    lines: Sequence[str]
    frames: np.ndarray
    masked: np.ndarray
    labels: Sequence[str]


def masked_picture(frame: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return uint8 [H,W,3]: the frame where `visible`, bool [H,W], is True, else grey stripes."""
    height, width = visible.shape
    wide = max(2, max(height, width) // 48)
    stripes = (np.arange(height)[:, None] + np.arange(width)) // wide % 2
    hole = np.where(stripes[..., None], np.uint8(62), np.uint8(40))
    return np.where(visible[..., None], frame, hole)


def dataset_page(
    name: str,
    counts: Mapping[str, int],
    rejects: Sequence[Mapping[str, str]],
    scores: Mapping[str, Sequence[float]],
    thresholds: Mapping[str, Mapping[str, float]],
    previews: Sequence[Preview],
    facts: Mapping[str, str],
    problems: Sequence[str] = (),
) -> bytes:
    """Return the HTML page of a finished run.

    Args:
        name: of the dataset.
        counts: as in dataset.json.
        rejects: rows of rejects.parquet.
        scores: {score: values of all samples}.
        thresholds: {score: {"min" or "max": threshold}} of the enabled filters.
        facts: the table at the end.
        problems: sentences about what went wrong, if the run failed.
    """
    clip_parts = [("samples", counts["samples"]), ("filtered", counts["clips_filtered"]), ("bad", counts["clips_bad"])]
    video_parts = [("split into clips", counts["videos_split"]), ("rejected", counts["videos_rejected"])]
    return document(
        "dataset.html",
        f"{name}: dataset report",
        STYLES,
        name=name,
        problems=problems,
        counts=counts,
        bars=[charts.split_bar(video_parts, "videos in"), charts.split_bar(clip_parts, "clips planned")],
        refused=_reject_rows(rejects),
        previews=[_preview(one) for one in previews],
        scores=[_score(score, values, thresholds.get(score, {})) for score, values in _known(scores)],
        facts=facts,
    )


def score_page(
    name: str,
    counts: Mapping[str, int],
    scores: Mapping[str, Sequence[float]],
    thresholds: Mapping[str, Mapping[str, float]],
    kept: int,
    rejects: Sequence[Mapping[str, str]],
) -> bytes:
    """Return the HTML page of scores measured before the expensive stages, with what each threshold would keep.

    Args:
        counts: of the run; `clips_planned`, `videos_in`.
        scores: {score: values of all clips}.
        thresholds: {score: {"min" or "max": threshold}} of the enabled filters.
        kept: number of clips that pass all filters.
        rejects: rows of the videos and clips that could not be scored.
    """
    total = max((len(values) for values in scores.values()), default=0)
    tiles = [("videos in", counts["videos_in"]), ("clips planned", counts["clips_planned"]), ("clips scored", total)]
    return document(
        "scores.html",
        f"{name}: scores",
        STYLES,
        name=name,
        tile_counts=[*tiles, ("kept by the thresholds that are set", kept)],
        scores=[_thresholds(score, values, thresholds.get(score, {})) for score, values in _known(scores)],
        refused=_reject_rows(rejects),
    )


def _known(scores: Mapping[str, Sequence[float]]) -> list[tuple[str, Sequence[float]]]:
    return [(name, scores[name]) for name in SCORES if len(scores.get(name, ()))]


def _score(name: str, values: Sequence[float], limits: Mapping[str, float]) -> dict[str, Any]:
    data = np.asarray(values, np.float64)
    low, median, high = (charts.number(float(value)) for value in np.percentile(data, (0, 50, 100)))
    return {
        "name": name,
        "meaning": SCORES[name].meaning,
        "histogram": charts.histogram(data, f"{name}: histogram", next(iter(limits.values()), None)),
        "range": f"median {median}, {low} to {high}",
    }


def _thresholds(name: str, values: Sequence[float], limits: Mapping[str, float]) -> dict[str, Any]:
    score, data = SCORES[name], np.sort(np.asarray(values, np.float64))
    keep, mark = next(iter(limits.items()), (score.keep, score.suggested))
    rows = []
    for share in (0.99, 0.95, 0.9, 0.75, 0.5):
        rows.append((charts.number(_threshold_of(data, keep, share)), f"{share:.0%} of clips, or a little more"))
    named = [("suggested", score.suggested, score.keep), *(("set", limit, side) for side, limit in limits.items())]
    for text, limit, side in named:
        if limit is not None:
            count = int((data >= limit).sum() if side == "min" else (data <= limit).sum())
            rows.append((f"{charts.number(limit)} ({text})", f"{count / len(data):.1%}: {count:,} of {len(data):,}"))
    return {
        "name": name,
        "keep": keep,
        "meaning": score.meaning,
        "histogram": charts.histogram(data, f"{name}: histogram", mark),
        "kept_curve": charts.kept_curve(data, keep, f"{name}: kept", mark),
        "thresholds": rows,
    }


def _threshold_of(data: np.ndarray, keep: str, share: float) -> float:
    """Return the strictest threshold that keeps at least `share` of sorted values."""
    count = int(np.ceil(share * len(data)))
    return float(data[len(data) - count] if keep == "min" else data[count - 1])


def _reject_rows(rejects: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Return a row for each (unit, fate, stage, reason): with its count and three examples; most frequent first."""
    counts: Counter[tuple[str, ...]] = Counter()
    examples: dict[tuple[str, ...], list[tuple[str, int, str]]] = {}
    for number, row in enumerate(rejects):
        kind = (row["unit"], row["fate"], row["stage"], row["reason"])
        text = row["message"] if row["unit"] == "clip" else f"{row['key']}: {row['message']}"
        counts[kind] += 1
        examples[kind] = sorted([*examples.get(kind, ()), (row["key"], number, text)])[:3]
    ordered = sorted(counts, key=lambda kind: (-counts[kind], kind))
    return [(*kind, f"{counts[kind]:,}", "\n".join(_short(name) for *_, name in examples[kind])) for kind in ordered]


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}…"


def _preview(one: Preview) -> dict[str, Any]:
    return {
        "title": _short(one.title),
        "lines": [_short(line) for line in one.lines if line],
        "frames": [_image(frame, "frame") for frame in one.frames],
        "masked": [_image(frame, label) for frame, label in zip(one.masked, one.labels, strict=True)],
    }


def _image(frame: np.ndarray, label: str) -> dict[str, str]:
    import cv2

    _, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return {"src": f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}", "label": label}
