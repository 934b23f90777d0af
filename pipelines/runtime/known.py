"""What a ledger knows of the artifacts of one unit of videos, on a worker; and how old artifacts are read."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ex4d import storage
from ex4d.errors import ContractError

logger = logging.getLogger(__name__)

NUM_READERS = 32  # threads that read files; an object store serves many reads at once


class Records(Protocol):
    """The interface that `load_files` needs: `Ledger` on the driver, `Known` on a worker."""

    def size(self, name: str) -> int | None: ...
    def has_record(self, name: str) -> bool: ...
    def get(self, name: str) -> dict[str, Any] | None: ...
    def add(self, name: str, body: Mapping[str, Any]) -> None: ...
    def set_aside(self, name: str) -> None: ...
    def url(self, name: str) -> str: ...


class Known:
    """The part of a dataset's ledger for one unit of videos. Changes are collected in `changes`, for the driver.

    Args:
        output: the dataset folder.
        bodies: {name: JSON of the record}; may be changed.
        sizes: {name: bytes} of the artifacts that are files of their own, and of samples in shards.
    """

    def __init__(self, output: str, bodies: dict[str, str], sizes: Mapping[str, int]):
        self.output, self.bodies, self.sizes = output, bodies, dict(sizes)
        self.changes: dict[str, list[Any]] = {"added": [], "damaged": [], "removed": []}

    def __contains__(self, name: str) -> bool:
        return name in self.sizes or (not name.endswith(".tar") and name in self.bodies)

    def __iter__(self) -> Iterator[str]:
        """Yield the names of all finished artifacts."""
        yield from self.sizes
        yield from (name for name in self.bodies if name not in self.sizes and not name.endswith(".tar"))

    def url(self, name: str) -> str:
        """Return the path or URL of an artifact that is a file of its own."""
        return storage.join(self.output, "staging", name)

    def size(self, name: str) -> int | None:
        """Return the bytes of an artifact that is a file of its own or a sample in a shard, else None."""
        return self.sizes.get(name)

    def has_record(self, name: str) -> bool:
        """Return True if there is a record of this name."""
        return name in self.bodies

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a record, or None if there is none."""
        found = self.bodies.get(name)
        return None if found is None else json.loads(found)

    def add(self, name: str, body: Mapping[str, Any]) -> None:
        """Add a record that was read from a file of its own."""
        self.bodies[name] = json.dumps(body)
        self.changes["added"].append([name, body])

    def set_aside(self, name: str) -> None:
        """Forget a damaged artifact; the driver keeps a copy of it."""
        self._forget("damaged", name)

    def remove(self, name: str) -> None:
        """Forget an artifact; the driver deletes it."""
        self._forget("removed", name)

    def _forget(self, change: str, name: str) -> None:
        self.changes[change].append(name)
        self.bodies.pop(name, None)
        self.sizes.pop(name, None)


def load_files(known: Records, keys: Mapping[str, str]) -> set[str]:
    """Load artifacts that exist as files but have no record yet, in parallel; return the names of damaged ones.

    A damaged artifact is set aside: its row is redone, and no data is lost.

    Args:
        keys: {name of an artifact: key of its row}.
    """
    unknown = [name for name in keys if not known.has_record(name)]
    sizes = {name: body["size"] for name in keys if name.endswith(".tar") and (body := known.get(name)) is not None}
    damaged = {name for name, size in sizes.items() if size != known.size(name)}

    def read(name: str) -> dict[str, Any] | None:
        try:
            return _read(known.url(name), name, keys[name])
        except (ContractError, KeyError, ValueError, FileNotFoundError) as error:
            logger.warning("%s: %s", name, error)
            return None

    if unknown:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for name, body in zip(unknown, pool.map(read, unknown), strict=True):
                if body is None:
                    damaged.add(name)
                else:
                    known.add(name, body)
    for name in sorted(damaged):
        known.set_aside(name)
    return damaged


def _read(url: str, name: str, key: str) -> dict[str, Any]:
    """Read an artifact's record from its own file. Raises ContractError, KeyError, ValueError, FileNotFoundError."""
    from ex4d.data.tar import read_sample

    data = storage.read_bytes(url)
    if name.endswith(".tar"):
        scores = json.loads(read_sample(data, key)["json"])["scores"]
        return {"scores": scores, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = json.loads(data)
    if not isinstance(body, dict) or not _is_record(name, body):
        raise ContractError("is not a record of its kind")
    return body


def _is_record(name: str, body: Mapping[str, Any]) -> bool:
    """Return True if a record has the keys that its kind requires."""
    kind = name.partition("/")[0]
    if kind == "scores" and "reason" not in body:
        return all(isinstance(value, int | float) for value in body.values())
    refusal = body.get("refusal") if kind == "videos" else body
    if refusal is None:
        return {"refusal", "info", "pts_runs", "cuts", "shots", "hashes"} <= body.keys()
    names = ("fate", "stage", "reason", "message")
    return isinstance(refusal, dict) and all(isinstance(refusal.get(name), str) for name in names)
