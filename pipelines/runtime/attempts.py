"""Count how often each row killed the process that worked on it; the counts are stored in a file of the ledger."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable

from ex4d import storage

logger = logging.getLogger(__name__)

FILE = "staging/attempts.json"


class Attempts:
    """Counts how often work on each row killed its process, so that no row is retried forever.

    A row is rejected after `limit` deaths in one run. When the whole run dies, every row in progress is charged with
    one more death, because a row may bring down the whole machine. Most of these rows are innocent, so `RUNS_LIMIT`
    times as many such deaths are allowed. Only the driver keeps the count, in one file of the ledger.

    Args:
        output: the dataset folder.
        limit: deaths of a row that are allowed in one run.
    """

    RUNS_LIMIT = 3
    EVERY_S = 10.0  # minimum interval between two writes to an object store

    def __init__(self, output: str, limit: int):
        self.limit, self.url = limit, storage.join(output, FILE)
        self.deaths: Counter[str] = Counter()
        self.working: set[str] = set()
        self.earlier = self._read()
        self._written = -self.EVERY_S

    def may(self, work: str, key: str) -> bool:
        """Return True if `work` on the row `key` may be tried once more."""
        name = f"{work} {key}"
        return self.deaths[name] < self.limit and self.deaths[name] + self.earlier[name] < self.limit * self.RUNS_LIMIT

    def begin(self, work: str, keys: Iterable[str]) -> None:
        """Record that work on these rows begins: if the driver dies before `end`, each row is charged with a death."""
        self.working |= {f"{work} {key}" for key in keys}
        self._write()

    def end(self, work: str, keys: Iterable[str]) -> None:
        """Record that the work ended and its process survived."""
        for name in (f"{work} {key}" for key in keys):
            self.working.discard(name)
            self.deaths.pop(name, None)
            self.earlier.pop(name, None)

    def died(self, work: str, keys: Iterable[str]) -> None:
        """Record that the process that worked on these rows died."""
        self.deaths.update(f"{work} {key}" for key in keys)
        self._write()

    def _read(self) -> Counter[str]:
        if not storage.exists(self.url):
            return Counter()
        try:
            kept = json.loads(storage.read_bytes(self.url))
            return Counter({str(name): int(count) for name, count in kept.items()})
        except (ValueError, AttributeError, TypeError) as error:
            logger.warning("%s is damaged and is replaced by an empty one: %s", self.url, error)
            return Counter()

    def _write(self) -> None:
        is_local = storage.is_local(self.url)
        if not is_local and time.monotonic() - self._written < self.EVERY_S:
            return
        self._written = time.monotonic()
        counts = self.earlier + self.deaths + Counter(dict.fromkeys(self.working - self.deaths.keys(), 1))
        data = json.dumps(counts, sort_keys=True).encode()
        try:
            if is_local:  # no fsync: it must survive a process, not the machine, and is written for every task
                path = storage.local_path(self.url)
                path.parent.mkdir(parents=True, exist_ok=True)
                half = path.with_name(".tmp-attempts")
                half.unlink(missing_ok=True)  # never write through a link that another user may have planted
                with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW), "wb") as file:
                    file.write(data)
                half.replace(path)
            else:
                storage.write_bytes(self.url, data)
        except OSError as error:  # a transient failure of a store must not end the run
            logger.warning("attempts cannot be recorded: %s", error)
