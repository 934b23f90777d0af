"""A page of results: one HTML file with videos side by side, figures and the loss curve."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ex4d import storage
from ex4d.geometry.depth import as_grey

STYLE = """
:root{color-scheme:light dark;--ink:#16202a;--soft:#5c6b7a;--line:#d8dfe6;--back:#fbfcfd;--mark:#0b6bcb}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#94a3b3;--line:#2b3642;--back:#0e141a;--mark:#5fb0ff}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:0 auto;max-width:1180px;
padding:24px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:28px 0 8px}p{margin:4px 0;color:var(--soft);max-width:80ch}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:8px 0 18px}
figure{margin:0}video{width:100%;border-radius:6px;display:block;background:#000;image-rendering:pixelated}
figcaption{font-size:13px;color:var(--soft);padding-top:4px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
tr.best td{color:var(--mark);font-weight:600}svg{max-width:100%;height:auto}
"""


@dataclass(frozen=True)
class Clip:
    """One labelled video of a row: where it is, a path beside the page or what `embedded` gives."""

    label: str
    src: str


@dataclass(frozen=True)
class Row:
    """Videos of equal length shown side by side and played in step."""

    title: str
    clips: Sequence[Clip]


@dataclass(frozen=True)
class Table:
    """A table with its heading, an explanation, and rows of ready-made text; `best` marks one row."""

    title: str
    explanation: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: int | None = None


@dataclass(frozen=True)
class Page:
    """Everything that stands on the page, from top to bottom."""

    title: str
    summary: Sequence[str]
    rows: Sequence[Row] = ()
    tables: Sequence[Table] = ()
    losses: Sequence[float] = ()
    facts: dict[str, str] = field(default_factory=dict)


def depth_colours(z_depth: np.ndarray) -> np.ndarray:
    """Return uint8 [T, H, W, 3] pictures of z_depth float [T, H, W]: disparity, near bright, one scale for the clip."""
    import cv2

    return np.stack(
        [cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_MAGMA), cv2.COLOR_BGR2RGB) for grey in as_grey(z_depth)]
    )


def embedded(mp4: bytes) -> str:
    """Return a video as the `src` of a Clip, so that it lies in the page itself."""
    return f"data:video/mp4;base64,{base64.b64encode(mp4).decode()}"


def write(page: Page, path: str | Path) -> str:
    """Write the page as one HTML file, to a path or URL; return where it is."""
    body = [f"<h1>{html.escape(page.title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in page.summary)]
    for row in page.rows:
        figures = "".join(_figure(clip) for clip in row.clips)
        body.append(f'<h2>{html.escape(row.title)}</h2><div class="row">{figures}</div>')
    body += [_table(table) for table in page.tables]
    if len(page.losses) > 1:
        body.append(f"<h2>Training loss</h2>{_curve(page.losses)}")
    if page.facts:
        body.append(_table(Table("Facts of this run", "", ("what", "value"), [list(i) for i in page.facts.items()])))
    script = (
        "for(const r of document.querySelectorAll('.row')){const v=[...r.querySelectorAll('video')];"
        "setInterval(()=>{for(const x of v.slice(1))if(Math.abs(x.currentTime-v[0].currentTime)>.08)"
        "x.currentTime=v[0].currentTime},500)}"
    )
    text = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(page.title)}</title><style>{STYLE}</style>{''.join(body)}<script>{script}</script></html>\n"
    )
    storage.write_bytes(path, text.encode())
    return str(path)


def _figure(clip: Clip) -> str:
    label = html.escape(clip.label)
    return (
        f'<figure><video src="{html.escape(clip.src)}" aria-label="{label}" autoplay loop muted playsinline>'
        f"</video><figcaption>{label}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{html.escape(c)}</th>' for c in table.columns)
    rows = "".join(
        f"<tr{' class=best' if i == table.best else ''}>"
        + "".join(f"<td>{html.escape(str(c))}</td>" for c in row)
        + "</tr>"
        for i, row in enumerate(table.rows)
    )
    return (
        f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.explanation)}</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _curve(values: Sequence[float], width: int = 900, height: int = 220) -> str:
    """Return an SVG line of the values (thin) and of their running mean (thick)."""
    y = np.asarray(values, dtype=np.float64)
    window = max(1, len(y) // 20)
    smooth = np.convolve(y, np.ones(window) / window, mode="valid")
    top, bottom = float(y.max()), float(y.min())
    span = max(top - bottom, 1e-12)

    def points(series: np.ndarray, start: float) -> str:
        xs = 50 + (np.arange(len(series)) + start) * (width - 60) / max(len(y) - 1, 1)
        ys = 10 + (top - series) / span * (height - 40)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))

    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="training loss" fill="none" font-size="12">'
        f'<polyline points="{points(y, 0)}" stroke="var(--line)" stroke-width="1"/>'
        f'<polyline points="{points(smooth, window / 2)}" stroke="var(--mark)" stroke-width="2"/>'
        f'<g fill="var(--soft)"><text x="0" y="18">{top:.3f}</text><text x="0" y="{height - 28}">{bottom:.3f}</text>'
        f'<text x="50" y="{height - 8}">step 1</text>'
        f'<text x="{width - 10}" y="{height - 8}" text-anchor="end">step {len(y)}</text></g></svg>'
    )
