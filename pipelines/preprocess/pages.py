"""Write the HTML pages of a run to `report/` in the dataset folder, which is excluded from the dataset's tree hash."""

from __future__ import annotations

import hashlib
import heapq
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ex4d import storage
from ex4d.errors import Filtered
from ex4d.quality import SCORES
from pipelines.preprocess.filters import FilterConfig, decide
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.runtime.result import Result

FOLDER = "report"
PREVIEWS = 12
THUMBNAIL_PX = 192
PLACE = ["key", "shard", "offset", "length"]
_SCORE_ROW = ("key", "source_path", "start_frame", "end_frame", "refused_by")
EXAMPLES = 20_000  # values per histogram; more would not move any bar by a pixel


def write(config: PreprocessConfig, scored: Iterable[Mapping[str, Any]], result: Result) -> str:
    """Write the page of a run; return its path."""
    return write_scores(config, scored, result) if config.score_only else write_report(config, result)


def write_scores(config: PreprocessConfig, clips: Iterable[Mapping[str, Any]], result: Result) -> str:
    """Write the page of scores, with scores.parquet and scores.json beside it; return its path.

    Args:
        clips: results of `units.scored`, sorted by key.
    """
    import pyarrow as pa

    from ex4d.data import manifest
    from ex4d.viewer import report_page

    rows, refused = _score_rows(config, clips), Counter[str]()
    first = next(rows, {})
    names = [name for name in SCORES if name in first]
    values = {name: array("d") for name in names}  # of every clip: the page has exact counts per threshold

    def counted() -> Iterator[dict[str, Any]]:
        for row in chain([first] if first else (), rows):
            refused[row["refused_by"]] += 1
            for name in names:
                values[name].append(row[name])
            yield row

    kinds = {**dict.fromkeys(_SCORE_ROW, pa.string()), "start_frame": pa.int64(), "end_frame": pa.int64()}
    schema = pa.schema([*kinds.items(), *((name, pa.float64()) for name in names)])
    with _folder(config) as folder:
        with open(folder / "scores.json", "w") as text:
            manifest.write_table(folder / "scores.parquet", _with_json(counted(), text), schema)
        for name in ("scores.parquet", "scores.json"):
            storage.move_file(folder / name, storage.join(config.output, FOLDER, name))
    page = report_page.score_page(
        _name(config), result.counts, values, _thresholds(config.filters), refused[""], result.rejects
    )
    return _write(config, "scores.html", page)


def _score_rows(config: PreprocessConfig, clips: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in clips:
        path = row["name"].encode("utf-8", "backslashreplace").decode()
        facts = (row["key"], path, row["start_frame"], row["end_frame"], _refused_by(row["scores"], config.filters))
        yield {**dict(zip(_SCORE_ROW, facts, strict=True)), **row["scores"]}


def _with_json(rows: Iterable[dict[str, Any]], file: IO[str]) -> Iterator[dict[str, Any]]:
    """Write each row to a JSON list, then yield it."""
    before = "["
    for row in rows:
        file.write(before + json.dumps([row], indent=1)[1:-2])
        before = ","
        yield row
    file.write("[]\n" if before == "[" else "\n]\n")


@contextmanager
def _folder(config: PreprocessConfig) -> Iterator[Path]:
    """Yield a temporary folder; it is on the disk of a local output, so that moving a file is a rename."""
    place = storage.local_path(config.output) if storage.is_local(config.output) else None
    with tempfile.TemporaryDirectory(prefix=".tmp-report-", dir=place) as folder:
        yield Path(folder)


def write_report(config: PreprocessConfig, result: Result) -> str:
    """Write the page of the dataset; return its path. Without a commit the page shows only the rejects."""
    from ex4d.data.manifest import read_dataset
    from ex4d.viewer import report_page

    scores: dict[str, list[float]] = {}
    previews: list[report_page.Preview] = []
    if result.committed:
        scores, chosen = _sampled(config)
        dataset = read_dataset(config.output)
        previews = [_preview(config.output, dataset, row) for row in chosen]
    page = report_page.dataset_page(
        _name(config),
        result.counts,
        result.rejects,
        scores,
        _thresholds(config.filters),
        previews,
        _facts(config),
        result.problems,
    )
    return _write(config, "index.html", page)


def _sampled(config: PreprocessConfig) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Return about EXAMPLES values of each score, and the rows of PREVIEWS samples; the manifest is read in batches."""
    import pyarrow.parquet as pq

    from ex4d.data.manifest import MANIFEST

    chosen: list[dict[str, Any]] = []
    with storage.open_read(storage.join(config.output, MANIFEST)) as file:
        manifest = pq.ParquetFile(file)
        scores: dict[str, list[float]] = {name: [] for name in SCORES if f"score_{name}" in manifest.schema_arrow.names}
        place, step = 0, max(1, manifest.metadata.num_rows // EXAMPLES)
        for batch in manifest.iter_batches(columns=[*PLACE, *(f"score_{name}" for name in scores)]):
            for name, values in scores.items():
                values += batch[f"score_{name}"].to_pylist()[-place % step :: step]
            place += len(batch)
            rows = batch.select(PLACE).to_pylist()
            chosen = heapq.nsmallest(
                PREVIEWS, [*chosen, *rows], key=lambda row: hashlib.sha256(row["key"].encode()).digest()
            )
    return scores, chosen


def _preview(output: str, dataset: Mapping[str, Any], row: Mapping[str, Any]) -> Any:
    import numpy as np

    from ex4d.data import foreign
    from ex4d.data.tar import read_sample
    from ex4d.geometry import masks
    from ex4d.quality.pictures import shrink
    from ex4d.viewer.report_page import Preview, masked_picture

    url = storage.join(output, row["shard"])
    members = read_sample(storage.read_bytes(url, row["offset"], row["length"]), row["key"])
    one = foreign.sample_of(dataset, members, foreign.is_foreign(output))
    frames = one.frames
    masked = np.stack([masked_picture(frames[-1], visible[-1]) for visible in one.visible])
    facts = one.provenance
    kinds = [masks.KINDS[int(kind)] for kind in one.kind]
    labels = [f"{kind}, {share:.0%} holes" for kind, share in zip(kinds, one.hole_share[:, -1], strict=True)]
    return Preview(
        f"{one.key} · {facts['source_path']} · {facts['start_s']:.2f} to {facts['end_s']:.2f} s",
        (one.caption,),
        shrink(frames[[0, len(frames) // 2, -1]], THUMBNAIL_PX),
        shrink(masked, THUMBNAIL_PX),
        labels,
    )


def _refused_by(scores: Mapping[str, float], filters: FilterConfig) -> str:
    try:
        decide(scores, filters)
    except Filtered as error:
        return error.reason
    return ""


def _thresholds(filters: FilterConfig) -> dict[str, dict[str, float]]:
    """Return {score: {"min" or "max": threshold}} of the active filters."""
    found: dict[str, dict[str, float]] = {}
    for key, value in vars(filters).items():
        side, _, name = key.partition("_")
        if value is not None:
            found.setdefault(name, {})[side] = value
    return found


def _facts(config: PreprocessConfig) -> dict[str, str]:
    from pipelines.preprocess.fingerprints import dataset_settings, versions

    shown = {name: json.dumps(value) for name, value in dataset_settings(config).items()}
    return shown | {f"version of {name}": version for name, version in versions().items()}


def _name(config: PreprocessConfig) -> str:
    return config.output.rstrip("/").rpartition("/")[2]


def _write(config: PreprocessConfig, name: str, data: bytes) -> str:
    url = storage.join(config.output, FOLDER, name)
    storage.write_bytes(url, data)
    return url
