"""The pages of a dataset: what it holds and what was refused; and, before it is made, what thresholds would keep.

Everything that is shown is escaped: names of files come from outside. Equal data give equal bytes.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ex4d.quality import SCORES
from ex4d.viewer import charts
from ex4d.viewer.page import STYLE

REPORT_STYLE = """
:root{--warm:#d8902a;--bad:#c43d3d;--card:#fff}
@media(prefers-color-scheme:dark){:root{--warm:#e0a94f;--bad:#e57373;--card:#151d26}}
body{max-width:1240px}h2{margin:36px 0 4px;font-size:18px}h3{font-size:15px;margin:0}
header{border-bottom:1px solid var(--line);padding-bottom:14px;margin-bottom:8px}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:16px 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:118px}
.tiles b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
.tiles span{color:var(--soft);font-size:13px}.split{width:100%;height:18px;display:block;margin-top:10px}
.legend{display:flex;flex-wrap:wrap;gap:18px;font-size:13px;margin:6px 0 14px}.legend i{display:inline-block;width:10px;
height:10px;border-radius:2px;margin-right:6px}.legend small{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(370px,1fr));gap:14px;margin-top:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;min-width:0}
.card p{font-size:13px;margin:2px 0 6px}.card svg{width:100%}.card table{width:100%;font-size:13px}
.strip{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:4px;margin:4px 0}
.strip figcaption{font-size:12px;padding-top:2px}
.strip img{width:100%;display:block;border-radius:4px}.sheet{grid-template-columns:repeat(auto-fill,minmax(560px,1fr))}
.name{font:12px/1.4 ui-monospace,monospace;color:var(--soft);overflow-wrap:anywhere}.caption{font-size:13px}
h3.score{margin-top:26px}h3 small{color:var(--soft);font-weight:400}
td.text{text-align:left;white-space:pre-line;overflow-wrap:anywhere;max-width:720px}td{vertical-align:top}th.text{text-align:left}
"""


@dataclass(frozen=True)
class Preview:
    """One sample of the contact sheet.

    Args:
        title, lines: text beside the pictures.
        frames, masked: uint8 [N,H,W,3] pictures in a row each: the clip, and the clip under its masks.
        labels: a line under each of the masked ones.
    """

    title: str
    lines: Sequence[str]
    frames: np.ndarray
    masked: np.ndarray
    labels: Sequence[str]


def masked_picture(frame: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return uint8 [H,W,3]: the frame where bool [H,W] `visible` is True, else grey stripes."""
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
        scores: {score: of every sample}.
        thresholds: {score: {"min" or "max": threshold}} of the filters that are on.
        facts: what stands at the end.
        problems: sentences, where the run failed.
    """
    body = [_header(name, "What came in, what came out, and why the rest did not.", problems)]
    body.append(
        _tiles(
            [
                ("videos in", counts["videos_in"]),
                ("clips planned", counts["clips_planned"]),
                ("samples", counts["samples"]),
            ]
        )
    )
    body.append("<h2>Where everything went</h2>")
    body.append("<p>Every video and every clip is in exactly one part of its bar.</p>")
    body.append(
        charts.split_bar(
            [("split into clips", counts["videos_split"]), ("rejected", counts["videos_rejected"])], "videos in"
        )
    )
    clip_parts = [("samples", counts["samples"]), ("filtered", counts["clips_filtered"]), ("bad", counts["clips_bad"])]
    body.append(charts.split_bar(clip_parts, "clips planned"))
    body.append(_reject_table(rejects))
    if previews:
        body.append(
            "<h2>Contact sheet</h2><p>Samples chosen by the hash of their keys: first, middle and last frame, then the "
            "last frame under each mask; stripes are hole.</p>"
        )
        body.append(f'<div class="cards sheet">{"".join(_preview(one) for one in previews)}</div>')
    if scores and any(len(values) for values in scores.values()):
        body.append("<h2>Scores of the samples</h2><p>A dashed line is a threshold that was on.</p>")
        body.append(
            f'<div class="cards">{"".join(_score_card(n, v, thresholds.get(n, {})) for n, v in _known(scores))}</div>'
        )
    body.append("<h2>Facts</h2>" + _table(("what", "value"), list(facts.items()), text=(0, 1)))
    return _document(f"{name}: dataset report", body)


def score_page(
    name: str,
    counts: Mapping[str, int],
    scores: Mapping[str, Sequence[float]],
    thresholds: Mapping[str, Mapping[str, float]],
    kept: int,
    rejects: Sequence[Mapping[str, str]],
) -> bytes:
    """Return the HTML page of scores that were measured before anything dear: for each, what a threshold would keep.

    Args:
        counts: of the run; `clips_planned`, `videos_in`.
        scores: {score: of every clip}.
        thresholds: {score: {"min" or "max": threshold}} of the filters that are on.
        kept: clips that pass all of them.
        rejects: rows of what could not be scored.
    """
    total = max((len(values) for values in scores.values()), default=0)
    body = [
        _header(
            name,
            "Measured on the picture alone, before depth and masks. Nothing was filtered and no shard was written.",
            (),
        )
    ]
    tiles = [("videos in", counts["videos_in"]), ("clips planned", counts["clips_planned"]), ("clips scored", total)]
    body.append(_tiles([*tiles, ("kept by the thresholds that are set", kept)]))
    body.append(
        "<h2>Scores</h2><p>How the clips are spread, and the share of them that each threshold keeps. The dashed "
        "line is the threshold that is set, or else the suggested one.</p>"
    )
    body += [_threshold_card(n, v, thresholds.get(n, {})) for n, v in _known(scores)]
    body.append(_reject_table(rejects))
    return _document(f"{name}: scores", body)


def _known(scores: Mapping[str, Sequence[float]]) -> list[tuple[str, Sequence[float]]]:
    return [(name, scores[name]) for name in SCORES if len(scores.get(name, ()))]


def _score_card(name: str, values: Sequence[float], limits: Mapping[str, float]) -> str:
    data = np.asarray(values, np.float64)
    line = next(iter(limits.values()), None)
    low, median, high = (charts.number(float(value)) for value in np.percentile(data, (0, 50, 100)))
    middle = f"median {median}, {low} to {high}"
    return (
        f'<div class="card"><h3>{name}</h3><p>{html.escape(SCORES[name].meaning)}</p>'
        f"{charts.histogram(data, f'{name}: histogram', line)}<p>{middle}</p></div>"
    )


def _threshold_card(name: str, values: Sequence[float], limits: Mapping[str, float]) -> str:
    score, data = SCORES[name], np.sort(np.asarray(values, np.float64))
    keep, mark = next(iter(limits.items()), (score.keep, score.suggested))
    rows = []
    for share in (0.99, 0.95, 0.9, 0.75, 0.5):
        rows.append((charts.number(_threshold_of(data, keep, share)), f"{share:.0%} of clips, or a little more"))
    for text, limit, side in [
        ("suggested", score.suggested, score.keep),
        *(("set", t, side) for side, t in limits.items()),
    ]:
        if limit is not None:
            count = int((data >= limit).sum() if side == "min" else (data <= limit).sum())
            rows.append((f"{charts.number(limit)} ({text})", f"{count / len(data):.1%}: {count:,} of {len(data):,}"))
    charted = (charts.histogram(data, f"{name}: histogram", mark), charts.kept_curve(data, keep, f"{name}: kept", mark))
    return (
        f'<h3 class="score">{name} <small>preprocess.filters.{keep}_{name}</small></h3>'
        f"<p>{html.escape(score.meaning)}; kept {'at or above' if keep == 'min' else 'at or below'} the threshold.</p>"
        f'<div class="cards"><div class="card">{charted[0]}</div><div class="card">{charted[1]}</div>'
        f'<div class="card">{_table(("threshold", "keeps"), rows)}</div></div>'
    )


def _threshold_of(data: np.ndarray, keep: str, share: float) -> float:
    """Return the strictest threshold that keeps at least `share` of sorted values."""
    count = int(np.ceil(share * len(data)))
    return float(data[len(data) - count] if keep == "min" else data[count - 1])


def _reject_table(rejects: Sequence[Mapping[str, str]]) -> str:
    if not rejects:
        return "<h2>Refused</h2><p>Nothing was refused.</p>"
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in sorted(rejects, key=lambda row: row["key"]):
        names = groups.setdefault((row["unit"], row["fate"], row["stage"], row["reason"]), [])
        names.append(row["message"] if row["unit"] == "clip" else f"{row['key']}: {row['message']}")
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    rows = [(*key, f"{len(names):,}", "\n".join(_short(name) for name in names[:3])) for key, names in ordered]
    heading = "<h2>Refused</h2><p>A filter is a decision by a threshold; bad is what could not be used.</p>"
    return heading + _table(("unit", "fate", "stage", "reason", "count", "for example"), rows, text=(0, 1, 2, 3, 5))


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}…"


def _preview(one: Preview) -> str:
    pictures = "".join(_image(frame, "frame") for frame in one.frames)
    masked = "".join(
        f"<figure>{_image(frame, label)}<figcaption>{html.escape(label)}</figcaption></figure>"
        for frame, label in zip(one.masked, one.labels, strict=True)
    )
    lines = "".join(f'<div class="caption">{html.escape(_short(line))}</div>' for line in one.lines if line)
    return (
        f'<div class="card"><div class="strip">{pictures}</div><div class="strip masks">{masked}</div>'
        f'<div class="name">{html.escape(_short(one.title))}</div>{lines}</div>'
    )


def _image(frame: np.ndarray, label: str) -> str:
    import cv2

    _, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 85])
    text = html.escape(label)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}" alt="{text}" title="{text}">'


def _header(name: str, summary: str, problems: Sequence[str]) -> str:
    wrong = "".join(f'<p style="color:var(--bad)">{html.escape(problem)}</p>' for problem in problems)
    return f"<header><h1>{html.escape(name)}</h1><p>{html.escape(summary)}</p>{wrong}</header>"


def _tiles(tiles: Sequence[tuple[str, int]]) -> str:
    inside = "".join(f"<div><b>{count:,}</b><span>{html.escape(what)}</span></div>" for what, count in tiles)
    return f'<div class="tiles">{inside}</div>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    kinds = [' class="text"' if index in text else "" for index in range(len(columns))]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    lines = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{html.escape(str(cell))}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _document(title: str, body: Sequence[str]) -> bytes:
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{REPORT_STYLE}</style>{''.join(body)}</html>\n"
    )
    return text.encode("utf-8", "backslashreplace")
