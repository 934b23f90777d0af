"""The counts of a dataset, which must add up: every video and clip is a sample or a reject, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ex4d.data.manifest import FATES, REJECT_COLUMNS, REJECTS, SPLITS, UNITS
from ex4d.data.staged import Staged
from ex4d.errors import ContractError


def count(items: list[Staged], rejected: list[dict[str, str]], counts: Mapping[str, int]) -> dict[str, int]:
    """Return all counts of a dataset.

    Args:
        counts: videos_in, videos_split and clips_planned.

    Raises:
        ContractError: a clip is counted twice, a split is not known, or the counts do not add up.
    """
    keys = [item.key for item in items] + [row["key"] for row in rejected if row["unit"] == "clip"]
    if len(set(keys)) != len(keys):
        twice = sorted(key for key, number in Counter(keys).items() if number > 1)
        raise ContractError(f"clips counted more than once, as samples or rejects: {twice[:5]}")
    if unknown := {item.split for item in items} - set(SPLITS):
        raise ContractError(f"splits {sorted(unknown)} are not known; allowed: {SPLITS}")
    by_split = Counter(item.split for item in items)
    samples = {"samples": len(items), **{f"samples_{split}": by_split[split] for split in SPLITS}}
    whole = {**counts, **reject_counts(rejected), **samples}
    if wrong := identities(whole):
        raise ContractError("the counts do not add up: " + "; ".join(wrong))
    return whole


def identities(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each count that does not add up; [] where all do."""
    videos = ("videos_in", ("videos_split", "videos_rejected"))
    clips = ("clips_planned", ("samples", "clips_filtered", "clips_bad"))
    wrong = []
    for whole, parts in (videos, clips):
        if counts[whole] != sum(counts[part] for part in parts):
            wrong.append(f"{whole} = {counts[whole]} is not " + " + ".join(f"{part} {counts[part]}" for part in parts))
    return wrong


def reject_counts(rows: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """Return videos_rejected, clips_filtered and clips_bad of reject rows; ContractError for unknown words."""
    counts = {"videos_rejected": 0, "clips_filtered": 0, "clips_bad": 0}
    for row in rows:
        if set(row) != set(REJECT_COLUMNS) or row["unit"] not in UNITS or row["fate"] not in FATES:
            raise ContractError(f"{REJECTS}: row {dict(row)} needs {REJECT_COLUMNS}, unit {UNITS}, fate {FATES}")
        counts["videos_rejected" if row["unit"] == "video" else f"clips_{row['fate']}"] += 1
    return counts
