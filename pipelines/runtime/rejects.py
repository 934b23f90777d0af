"""The rejects of a run, as rows of rejects.parquet, kept in a scratch database since there may be millions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ex4d.data.manifest import REJECT_COLUMNS
from ex4d.redact import without_secrets
from pipelines.runtime.scratch import scratch
from pipelines.runtime.stage import Row

_NAMES = ", ".join(REJECT_COLUMNS)


class Rejects(Sequence[Mapping[str, str]]):
    """Mappings with the keys REJECT_COLUMNS, in insertion order."""

    def __init__(self) -> None:
        self._scratch = scratch()
        self._scratch.execute(f"CREATE TABLE reject (number INTEGER PRIMARY KEY, {_NAMES})")

    def add(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Append rows."""
        marks = ", ".join(f":{name}" for name in REJECT_COLUMNS)
        self._scratch.executemany(f"INSERT INTO reject ({_NAMES}) VALUES ({marks})", rows)

    def __len__(self) -> int:
        return int(self._scratch.execute("SELECT COUNT(*) FROM reject").fetchone()[0])

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Mapping[str, str]]:
        return self._rows("number")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def in_order(self) -> Iterator[Mapping[str, str]]:
        """Yield the rows in the order of rejects.parquet."""
        return self._rows(_NAMES)

    def _rows(self, order: str) -> Iterator[Mapping[str, str]]:
        query = f"SELECT {_NAMES} FROM reject ORDER BY {order}"
        return (dict(zip(REJECT_COLUMNS, row, strict=True)) for row in self._scratch.execute(query))


def reject_of(unit: str, row: Row) -> dict[str, str]:
    """Return the reject of a row that has a refusal.

    Args:
        unit: "video" or "clip".
    """
    refusal = {name: row["refusal"][name] for name in ("fate", "stage", "reason", "message")}
    # rejects.parquet must not depend on where the input lies on this machine.
    folder = row.get("path", "").removesuffix(row.get("name", ""))
    message = refusal["message"].replace(folder, "") if folder else refusal["message"]
    if unit == "clip":
        message = f"{row['name']}: {message}"
    message = without_secrets(message.encode("utf-8", "backslashreplace").decode())
    return {**refusal, "key": row["key"], "unit": unit, "message": message}
