"""The outcome of each video and clip of a run: counts, rejects, and the records of the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.preprocess.tables import Tables
from pipelines.runtime.ledger import Ledger
from pipelines.runtime.rejects import Rejects, reject_of
from pipelines.runtime.stage import Row, is_bug, is_lasting


@dataclass
class Outcomes:
    """Collects outcomes row by row.

    Args:
        ledger, tables: those of the run.
        keeps_scores: the run only measures scores and makes no samples.
        retry: rows that were rejected for one of these reasons are retried.
        guessed_bugs: keys of clips that ended in a bug, but may turn out not to be planned once all videos are known.
        retried: {key: (reason of the earlier rejection, the outcome; "" until it is known)}.
    """

    ledger: Ledger
    tables: Tables
    keeps_scores: bool
    retry: frozenset[str]
    counts: Counter[str] = field(default_factory=Counter)
    rejects: Rejects = field(default_factory=Rejects)
    guessed_bugs: set[str] = field(default_factory=set)
    retried: dict[str, tuple[str, str]] = field(default_factory=dict)

    def reject(self, unit: str, row: Row) -> None:
        """Count a rejected video or clip."""
        self.guessed_bugs.discard(row["key"])
        self.add_rejects([reject_of(unit, row)])

    def add_rejects(self, rejects: Iterable[Mapping[str, str]]) -> None:
        """Count rejects, as made by `reject_of`."""
        found = list(rejects)
        for reject in found:
            is_video = reject["unit"] == "video"
            self.counts["videos_rejected" if is_video else f"clips_{reject['fate']}"] += 1
            self.counts["videos_bad"] += is_video and reject["fate"] == "bad"
        self.rejects.add(found)

    def failed(self, row: Row, is_guess: bool) -> None:
        """Record that this run must not retry a row; the ledger stores only lasting refusals."""
        if not is_lasting(row):
            self.tables.add_tried(row["artifact"], row["name"], row["refusal"])
        elif self.retry:  # earlier refusals are retried, but not this one
            self.tables.add_tried(row["refusal_artifact"], row["name"], row["refusal"])
        if is_guess and is_bug(row):
            self.guessed_bugs.add(row["key"])

    def was_tried(self, unit: str, row: Row) -> bool:
        """Reject a row that already failed in this run; return False for any other row."""
        refusal = self.tables.tried(row["artifact"], row["name"])
        if refusal is not None:
            self.reject(unit, row | {"refusal": refusal})
            if unit == "video":
                self.tables.drop_video(row["content"])
        return refusal is not None

    def note(self, row: Row) -> None:
        """Record the outcome of a row that was retried."""
        key, refusal = row["key"], row["refusal"]
        if key in self.retried:
            self.retried[key] = (self.retried[key][0], "done" if refusal is None else refusal["reason"])

    def write_video(self, row: Row) -> None:
        """Record a video in the ledger: its record, or its lasting rejection."""
        has_record = row["record"] and row["record"]["refusal"] == row["refusal"]  # not after an unexpected error
        record = row["record"] if has_record else {"refusal": row["refusal"]}
        self._write(row, record, record)

    def write_clip(self, row: Row) -> None:
        """Record a clip in the ledger: its sample or scores, or its lasting rejection with scores measured so far."""
        scores = {} if row["scores"] is None else {"scores": row["scores"]}
        self._write(
            row, row["scores"] if self.keeps_scores else row["staged"], row["refusal"] and row["refusal"] | scores
        )

    def _write(self, row: Row, result: Any, refusal: Any) -> None:
        if row["refusal"] is None and row["artifact"].endswith(".tar"):
            self.ledger.finished(row["artifact"], result)
        elif row["refusal"] is None:
            self.ledger.records.add(row["artifact"], result)
        elif is_lasting(row):
            self.ledger.records.add(row["refusal_artifact"], refusal)
