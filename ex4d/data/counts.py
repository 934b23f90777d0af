"""Count a dataset's contents, which must add up: videos are split or rejected, clips are samples or rejects, once."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

import numpy as np

from ex4d.data.manifest import FATES, REJECT_COLUMNS, REJECTS, SPLITS, UNITS
from ex4d.data.staged import Contents
from ex4d.errors import ContractError


def count(contents: Contents, counts: Mapping[str, int]) -> dict[str, int]:
    """Return all counts of a dataset.

    Args:
        counts: videos_in, videos_split and clips_planned.

    Raises:
        ContractError: a clip is counted twice, a split is unknown, or the counts do not add up.
    """
    hashes, by_split = array("q"), Counter[str]()
    for item in contents.staged():
        by_split[item.split] += 1
        hashes.append(hash(item.key))
    hashes.extend(hash(row["key"]) for row in contents.rejects() if row["unit"] == "clip")
    values, times = np.unique(np.frombuffer(hashes, np.int64), return_counts=True)
    if (times > 1).any():
        _check_keys(contents, set(values[times > 1].tolist()))
    if unknown := by_split.keys() - set(SPLITS):
        raise ContractError(f"splits {sorted(unknown)} are not known; allowed: {SPLITS}")
    samples = {"samples": by_split.total(), **{f"samples_{split}": by_split[split] for split in SPLITS}}
    whole = {**counts, **reject_counts(contents.rejects()), **samples}
    if wrong := identities(whole):
        raise ContractError("the counts do not add up: " + "; ".join(wrong))
    return whole


def _check_keys(contents: Contents, suspects: set[int]) -> None:
    """Raise ContractError if a key repeats; only keys whose `hash` is in `suspects` are compared."""
    rejected = (row["key"] for row in contents.rejects() if row["unit"] == "clip")
    keys = Counter(key for key in chain((item.key for item in contents.staged()), rejected) if hash(key) in suspects)
    if twice := sorted(key for key, number in keys.items() if number > 1):
        raise ContractError(f"clips counted more than once, as samples or rejects: {twice[:5]}")


def identities(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each count that does not add up; [] if all do."""
    videos = ("videos_in", ("videos_split", "videos_rejected"))
    clips = ("clips_planned", ("samples", "clips_filtered", "clips_bad"))
    wrong = []
    for whole, parts in (videos, clips):
        if counts[whole] != sum(counts[part] for part in parts):
            wrong.append(f"{whole} = {counts[whole]} is not " + " + ".join(f"{part} {counts[part]}" for part in parts))
    return wrong


def reject_counts(rows: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Return videos_rejected, clips_filtered and clips_bad of reject rows. Raises ContractError for an invalid row."""
    counts = {"videos_rejected": 0, "clips_filtered": 0, "clips_bad": 0}
    for row in rows:
        if set(row) != set(REJECT_COLUMNS) or row["unit"] not in UNITS or row["fate"] not in FATES:
            raise ContractError(f"{REJECTS}: row {dict(row)} needs {REJECT_COLUMNS}, unit {UNITS}, fate {FATES}")
        counts["videos_rejected" if row["unit"] == "video" else f"clips_{row['fate']}"] += 1
    return counts
