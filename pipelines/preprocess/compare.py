"""Compare the videos of one unit: which are copies, and which lack a record; and collect their frame hashes.

Copies have the same content hash, so they are in one unit, and workers find them. Near duplicates may be in any units;
the driver finds them from a few numbers of each video (`identity.py`).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.preprocess import identity, units
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.tables import pack_rows
from pipelines.runtime.blocks import columns
from pipelines.runtime.ledger import known_of
from pipelines.runtime.rejects import reject_of
from pipelines.runtime.stage import Row, Stage, refused


def compare_unit(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Find copies and videos without a record, and collect the frame hashes that reveal near duplicates.

    Args:
        row: columns of `Ledger.unit` and `Tables.unit`. `retry`: reasons to retry: rejections for one of them are
            deleted, except for those that this run has made, which `tried` holds as [artifact, name].

    Returns:
        `compared`: `rejects` of copies, `retried`, `changes` of the ledger, `pairs` for `Tables.add_pairs`, and
        `num_missing`; `missing`: the packed rows of videos without a record; `identity.COLUMNS`; and the columns of
        `names_of`.
    """
    known, tried = known_of(row, config.output), {tuple(pair) for pair in row["tried"]}
    firsts, copies = units.videos_of(row)
    rejects = [
        reject_of("video", refused(copy, "filtered", "hash", "duplicate", f"same content as {first}"))
        for copy, first in copies
    ]
    units.load(known, firsts)
    collector, found, missing, retried = identity.Collector(), list[Row](), list[Row](), dict[str, str]()
    for video in firsts:
        name = units.finished(known, video)
        if row["retry"] and name == video["refusal_artifact"] and (name, video["name"]) not in tried:
            reason = (known.get(name) or {})["refusal"]["reason"]
            if reason in row["retry"]:
                known.remove(name)
                retried[video["key"]], name = reason, ""
        if not name:
            missing.append(video)
            continue
        record = known.get(name) or {}
        if name == video["artifact"] and record["refusal"] is None:
            found.append(video)
            collector.add(*identity_of(video, record))
    compared = {"rejects": rejects, "retried": retried, "changes": known.changes, "num_missing": len(missing)}
    compared["pairs"] = pairs_of(found)
    packed = np.frombuffer(pack_rows(missing), np.uint8)
    return {"compared": compared, "missing": packed, **collector.columns(), **names_of(found, config)}


def identity_of(video: Row, record: Row) -> tuple[Any, ...]:
    """Return the arguments of `Collector.add` for a video."""
    other = (video["other_sha256"], record["other"]["hashes"]) if "other_sha256" in video else None
    return video["sha256"], record["hashes"], record["info"]["size"], record["info"]["duration_s"], other


def pairs_of(videos: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (content, sha256) of the videos whose content is not their sha256."""
    return [(video["content"], video["sha256"]) for video in videos if video["content"] != video["sha256"]]


def names_of(videos: Sequence[Row], config: PreprocessConfig) -> dict[str, Any]:
    """Return the columns `names` and `names_ends` for `Tables.add_names`; empty if no name will be looked up."""
    groups: dict[str, list[str]] = defaultdict(list)
    for video in videos if config.near_duplicates == "filter" else ():
        groups[video["sha256"][:2]].append(json.dumps([video["sha256"], video["name"]]))
    return columns("names", groups)


COMPARE = Stage(
    "compare",
    compare_unit,
    reads=units.UNIT,
    writes=("compared", "missing", *identity.COLUMNS, "names", "names_ends"),
)
