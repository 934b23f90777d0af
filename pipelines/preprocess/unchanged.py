"""Tell the sources that have not changed since an earlier run from those that have to be hashed.

The driver sends known sources in groups, divided by the first digits of the name of their record in the ledger.
Workers compare the tags or times of the files in a group with what the ledger recorded, and return the unchanged
videos as lines, sorted by unit. All others, whatever the reason, are hashed one by one like new ones.
"""

from __future__ import annotations

import json
from collections import defaultdict
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np

from ex4d.config import fingerprint
from ex4d.storage.urls import BUCKETS
from ex4d.threads import in_order
from pipelines import inputs
from pipelines.preprocess import fetch, fingerprints, pairs
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.stages.identify import identify
from pipelines.preprocess.units import ARTIFACTS
from pipelines.runtime.blocks import columns, pack, unpack
from pipelines.runtime.parts import merged, name_hash
from pipelines.runtime.stage import Row, Stage, new_row

# Threads that ask for tags, in each task: a bucket serves thousands of requests a second, a web server does not.
NUM_THREADS = {True: 16, False: 4}
HASHES = ("record_hashes", "refusal_hashes")  # columns
GROUP_DIGITS = 2  # maximum digits of the names of a group
SOURCE_COLUMNS = ("name", "path", "root", "twin", "namesake", "spans")
# Columns of a video that later passes need.
VIDEO_COLUMNS = (
    *("name", "path", "twin", "namesake", "spans", "sha256", "size_bytes", "caption", "pair"),
    *("depth_file", "depth_place"),
)


def record_name(url: str) -> str:
    """Return the name of the ledger's record of a video's files: their hashes, and tags that change with the files."""
    return f"sources/{fingerprint(url)}"


def line_of(source: inputs.Source) -> str:
    """Return a source as a line for `check_group`."""
    texts = (source.name, source.path, source.root, source.twin, source.namesake)  # the first of SOURCE_COLUMNS
    return f"[{','.join(map(encode_basestring_ascii, texts))},{json.dumps(source.spans)}]"  # faster than one `dumps`


def row_of(line: str, known: Any = None) -> Row:
    """Return the row of a source. Args: line: from `line_of`. known: the record of its files in the ledger."""
    facts = dict(zip(SOURCE_COLUMNS, json.loads(line), strict=True))
    facts["spans"] = [inputs.Span(*span)._asdict() for span in facts["spans"]]
    return new_row(facts["name"], **facts, known_source=known)


def video_of(row: Row, digests: tuple[str, str]) -> Row:
    """Return the row of a video after the stage `identify`, with its `content` and the names of its records.

    Args:
        digests: from `fingerprints.video_fingerprints`.
    """
    content = pairs.content(row["sha256"], row["pair"])
    names = {name: f"videos/{content}.{digest}.json" for name, digest in zip(ARTIFACTS, digests, strict=True)}
    facts = {name: row[name] for name in VIDEO_COLUMNS}
    return new_row(row["key"], **facts, content=content, **names, **pairs.other_of(row))


def check_group(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return the unchanged videos of a group of sources, and the other sources.

    Args:
        row: `sources`: block of `line_of`. `records`: block of the records of their files.
            `digits`: number of digits of a unit.

    Returns:
        `videos`, `videos_ends`: rows of `video_of` as JSON, by unit, see `blocks.columns`. `changed`: block of lines
        of JSON, [name, `line_of`, record or null]. `contents`, HASHES: uint64 hashes of the content of each unchanged
        video and of the names of its record and refusal.
    """
    records, lines = merged(row["records"].tobytes()), unpack(row["sources"].tobytes())
    digests = fingerprints.video_fingerprints(config)
    groups: dict[str, list[str]] = defaultdict(list)
    changed, hashes = [], {name: list[np.uint64]() for name in ("contents", *HASHES)}

    def check(line: str) -> tuple[str, Any, Row | None]:
        record = records.get(record_name(json.loads(line)[1]))
        known = None if record is None else json.loads(record)
        return line, known, None if known is None else _unchanged(row_of(line, known), config, digests)

    in_buckets = any(json.loads(line)[1].startswith(BUCKETS) for line in lines[:1])
    for line, known, video in in_order(check, lines, NUM_THREADS[in_buckets]):
        if video is None:
            changed.append(json.dumps([json.loads(line)[0], line, known]))
        else:
            groups[video["content"][: row["digits"]]].append(json.dumps(video))
            for name, column in zip(hashes, ("content", *ARTIFACTS), strict=True):
                hashes[name].append(name_hash(video[column]))
    arrays = {name: np.array(values, np.uint64) for name, values in hashes.items()}
    return {**columns("videos", groups), "changed": np.frombuffer(pack(changed), np.uint8), **arrays}


def without_record(row: Row, group: Row, lacking: np.ndarray) -> Row:
    """Return a row after `check_group` with some unchanged videos moved to the changed ones.

    Args:
        group: the row before `check_group`.
        lacking: bool, for each unchanged video.
    """
    lines = {json.loads(line)[0]: line for line in unpack(group["sources"].tobytes())}
    records, wanted = merged(group["records"].tobytes()), set(row["contents"][lacking].tolist())
    groups: dict[str, list[str]] = defaultdict(list)
    changed = unpack(row["changed"].tobytes())
    for text in unpack(row["videos"].tobytes()):
        video = json.loads(text)
        if int(name_hash(video["content"])) not in wanted:
            groups[video["content"][: group["digits"]]].append(text)
            continue
        record = records[record_name(video["path"])]
        changed.append(json.dumps([video["name"], lines[video["name"]], json.loads(record)]))
    arrays = {"changed": np.frombuffer(pack(changed), np.uint8), "contents": row["contents"][~lacking]}
    return {**row, **columns("videos", groups), **arrays}


def _unchanged(row: Row, config: PreprocessConfig, digests: tuple[str, str]) -> Row | None:
    """Return the row of a video whose files are all as the ledger recorded them, else None."""
    try:
        found = fetch.sidecar_rules(lambda own, _: identify(own, config, may_read=False), row, config)
    except Exception:  # noqa: BLE001 (nothing is lost: the row then passes the stage `identify`, whose Guard decides)
        return None
    return video_of({**row, **found}, digests) if found["fetched"] == row["known_source"] else None


UNCHANGED = Stage(
    "unchanged",
    check_group,
    reads=("sources", "records", "digits"),
    writes=("videos", "videos_ends", "changed", "contents", *HASHES),
)
