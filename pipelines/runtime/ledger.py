"""The ledger of a job is its folder `staging/`: work whose file is there is done.

| file | what |
|---|---|
| `videos/SHA.FP.json` | info, frame times and cuts of a video, or its refusal |
| `clips/KEY.FP.tar` | a finished sample, with the bytes that the shard will hold |
| `clips/KEY.FP.json` | why a clip was refused |
| `packed.json` | what the dataset was packed from, so that a run with nothing to do reads no sample |
| `attempts.json` | rows in work, and how often work on them ended with the process |

FP is the fingerprint of everything that the file depends on, so a changed setting gives other names and only affected
work is redone. A reject also depends on the limits and thresholds. Each file is written once, atomically.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ex4d import storage
from ex4d.config import to_dict
from ex4d.errors import ConfigError, ContractError
from ex4d.redact import SECRET, without_secrets
from pipelines.runtime.output import exclusive as exclusive

logger = logging.getLogger(__name__)

VIDEOS, CLIPS, SCORES = "staging/videos", "staging/clips", "staging/scores"
ATTEMPTS = "staging/attempts.json"
CONFIG = "staging/config.json"
DAMAGED = "staging/damaged"
PACKED = "packed.json"  # in staging: what the dataset was packed from
NUM_READERS = 32  # threads that read records: an object store answers many at once


class Ledger:
    """The staging folder of the dataset folder `output`, local or in an object store."""

    def __init__(self, output: str):
        self.output = output

    def names(self) -> set[str]:
        """Return the names of everything that is done, e.g. `clips/KEY.FP.tar`."""
        folders = (VIDEOS, CLIPS, SCORES)
        with ThreadPoolExecutor(len(folders)) as pool:
            listed = pool.map(lambda folder: storage.list_files(storage.join(self.output, folder)), folders)
            return {
                f"{folder.rpartition('/')[2]}/{name}"
                for folder, names in zip(folders, listed, strict=True)
                for name in names
            }

    def url(self, name: str) -> str:
        """Return the URL of an artifact of `names`."""
        return storage.join(self.output, "staging", name)

    def write_video(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a video's record."""
        self._write_json(name, record)

    def write_refusal(self, name: str, refusal: Mapping[str, Any]) -> None:
        """Write why a clip was rejected."""
        self._write_json(name, refusal)

    def write_sample(self, name: str, blob: bytes) -> None:
        """Write a finished sample's tar blocks."""
        storage.write_bytes(self.url(name), blob)

    def write_scores(self, name: str, scores: Mapping[str, float]) -> None:
        """Write the scores of a clip without a sample."""
        self._write_json(name, scores)

    def read(self, name: str) -> dict[str, Any]:
        """Return a video's record or a clip's refusal.

        Raises:
            ContractError: it is not a JSON mapping.
        """
        try:
            value = json.loads(storage.read_bytes(self.url(name)))
        except ValueError as error:
            raise ContractError(f"{self.url(name)}: is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise ContractError(f"{self.url(name)}: is not a mapping")
        return value

    def read_scores(self, name: str, key: str) -> dict[str, float]:
        """Return the scores of a finished sample."""
        from ex4d.data.tar import read_sample

        return json.loads(read_sample(storage.read_bytes(self.url(name)), key)["json"])["scores"]

    def read_all(self, keys: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], set[str]]:
        """Return ({name: record, or the scores of a sample}, names that were damaged), read in parallel.

        A damaged artifact is moved to `staging/damaged`, so that its row is redone and no data is lost.

        Args:
            keys: {name of an artifact: key of its row}.
        """

        def read(name: str) -> dict[str, Any] | None:
            try:
                body = self.read_scores(name, keys[name]) if name.endswith(".tar") else self.read(name)
            except (ContractError, KeyError, ValueError, FileNotFoundError) as error:
                logger.warning("%s: %s", name, error)
                return None
            return body if name.endswith(".tar") or _is_record(name, body) else None

        with ThreadPoolExecutor(NUM_READERS) as pool:
            bodies = dict(zip(keys, pool.map(read, keys), strict=True))
        damaged = {name for name, body in bodies.items() if body is None}
        for name in sorted(damaged):
            self._set_aside(name)
        return {name: body for name, body in bodies.items() if body is not None}, damaged

    def _set_aside(self, name: str) -> None:
        place = storage.join(self.output, DAMAGED, name.replace("/", "-"))
        if storage.exists(self.url(name)):
            storage.write_bytes(place, storage.read_bytes(self.url(name)))
            storage.remove(self.url(name))
        logger.warning("%s is damaged and will be made again; what was there is kept as %s", self.url(name), place)

    def remove(self, name: str) -> None:
        """Delete an artifact; the next run redoes it."""
        storage.remove(self.url(name))

    def write_config(self, sections: Mapping[str, Any]) -> None:
        """Write a run's settings and working folder for `ex4d retry`, without secrets in URLs."""
        plain = {name: to_dict(section) for name, section in sections.items() if section is not None}
        text = json.dumps(without_secrets({"folder": os.getcwd(), "sections": plain}), sort_keys=True)
        storage.write_bytes(storage.join(self.output, CONFIG), text.encode())

    def read_config(self) -> tuple[str, dict[str, Any]]:
        """Return (folder, {section: mapping}) of the last run.

        Raises:
            ConfigError: no run was there, or its settings held a secret.
        """
        url = storage.join(self.output, CONFIG)
        if not storage.exists(url):
            raise ConfigError("OUT", self.output, "a folder that `ex4d preprocess` has written to")
        if storage.is_local(url) and storage.local_path(url).lstat().st_uid != os.getuid():
            what = "belongs to another user, whose choices may name any folder; give your own --config"
            raise ConfigError("OUT", self.output, what)
        text = storage.read_bytes(url).decode()
        if SECRET in text:
            raise ConfigError("OUT", self.output, "the run read URLs with a password or signature; give its --config")
        kept = json.loads(text)
        return kept["folder"], kept["sections"]

    def sweep(self) -> None:
        """Delete what killed processes left: temporary files, and the record of attempts.

        Only for a run that holds the folder and has nothing left to do. Object stores have no temporary files.
        """
        storage.remove(storage.join(self.output, ATTEMPTS))
        if storage.is_local(self.output):
            for path in (storage.local_path(self.output) / "staging").rglob(".tmp-*"):
                path.unlink(missing_ok=True)

    def prune(self, used: Iterable[str]) -> int:
        """Delete superseded artifacts, those of sources with other artifacts in `used`; return their number."""
        used = set(used)
        sources = {_source(name) for name in used}
        superseded = [name for name in sorted(self.names() - used) if _source(name) in sources]
        for name in superseded:
            storage.remove(self.url(name))
        return len(superseded)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        storage.write_bytes(self.url(name), json.dumps(value, sort_keys=True).encode())


def _is_record(name: str, body: Mapping[str, Any]) -> bool:
    """Return True where a record has the keys of its kind."""
    kind = name.partition("/")[0]
    if kind == "scores" and "reason" not in body:
        return all(isinstance(value, int | float) for value in body.values())
    refusal = body.get("refusal") if kind == "videos" else body
    if refusal is None:
        return {"refusal", "info", "pts_runs", "cuts", "shots", "hashes"} <= body.keys()
    names = ("fate", "stage", "reason", "message")
    return isinstance(refusal, dict) and all(isinstance(refusal.get(name), str) for name in names)


def _source(name: str) -> str:
    """Return the first 16 digits of the content hash that an artifact's name begins with."""
    return name.partition("/")[2][:16]


class Attempts:
    """Counts how often work on each row killed its process, so that no row is retried for ever.

    A row is rejected after `limit` deaths in one run. When the run itself dies, every row in work counts as one more,
    since a row may bring down the whole machine; as most are innocent, `RUNS_LIMIT` times as many such deaths are
    allowed. Only the driver keeps the count, in one file of the ledger.

    Args:
        output: the dataset folder.
        limit: deaths in one run.
    """

    RUNS_LIMIT = 3
    EVERY_S = 10.0  # between two writes to an object store

    def __init__(self, output: str, limit: int):
        self.limit, self.url = limit, storage.join(output, ATTEMPTS)
        self.deaths: Counter[str] = Counter()
        self.working: set[str] = set()
        self.earlier = self._read()
        self._written = -self.EVERY_S

    def may(self, work: str, key: str) -> bool:
        """Return True where `work` on the row `key` may be tried once more."""
        name = f"{work} {key}"
        return self.deaths[name] < self.limit and self.deaths[name] + self.earlier[name] < self.limit * self.RUNS_LIMIT

    def begin(self, work: str, keys: Iterable[str]) -> None:
        """Note that work on these rows begins: if the driver dies before their `end`, it counts as a death of each."""
        self.working |= {f"{work} {key}" for key in keys}
        self._write()

    def end(self, work: str, keys: Iterable[str]) -> None:
        """Note that the work ended and its process lives."""
        for name in (f"{work} {key}" for key in keys):
            self.working.discard(name)
            self.deaths.pop(name, None)
            self.earlier.pop(name, None)

    def died(self, work: str, keys: Iterable[str]) -> None:
        """Note that the process died that worked on these rows."""
        self.deaths.update(f"{work} {key}" for key in keys)
        self._write()

    def _read(self) -> Counter[str]:
        if not storage.exists(self.url):
            return Counter()
        try:
            kept = json.loads(storage.read_bytes(self.url))
            return Counter({str(name): int(count) for name, count in kept.items()})
        except (ValueError, AttributeError, TypeError) as error:
            logger.warning("%s is damaged and starts anew: %s", self.url, error)
            return Counter()

    def _write(self) -> None:
        is_local = storage.is_local(self.url)
        if not is_local and time.monotonic() - self._written < self.EVERY_S:
            return
        self._written = time.monotonic()
        counts = self.earlier + self.deaths + Counter(dict.fromkeys(self.working - self.deaths.keys(), 1))
        data = json.dumps(counts, sort_keys=True).encode()
        try:
            if is_local:  # not flushed: it must survive a process, not the machine, and is written for every task
                path = storage.local_path(self.url)
                path.parent.mkdir(parents=True, exist_ok=True)
                half = path.with_name(".tmp-attempts")
                half.unlink(missing_ok=True)  # not through a link, which somebody else may have put there
                with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW), "wb") as file:
                    file.write(data)
                half.replace(path)
            else:
                storage.write_bytes(self.url, data)
        except OSError as error:  # a passing failure of a store must not end a run
            logger.warning("attempts are not written down: %s", error)
