"""The ledger of a job, in the folder `staging/` of its output: an artifact that is in it is finished work.

| file | contents |
|---|---|
| `clips/KEY.FP.tar` | a finished sample, byte for byte as it will be in a shard |
| `records/NUMBER.records` | everything else that is known, many records per file: see `records.py` |
| `packed/` | what each shard was built from, so that only changed shards are rebuilt |
| `attempts.json` | rows in progress, and how often each killed its process |
| `config.json` | the settings of the last run, for `ex4d retry` |
| `damaged/` | unreadable files, kept for the user |
| `texts/` | encoded captions, written by `ex4d encode` |

A record's name determines its content, so a record is never changed, only removed. `sources` is the exception.

| record | contents |
|---|---|
| `videos/SHA.FP.json` | info, frame times and cuts of a video, or why it was refused |
| `clips/KEY.FP.json` | why a clip was refused |
| `clips/KEY.FP.tar` | scores, size and hash of the finished sample |
| `scores/KEY.FP.json` | scores of a clip that was scored but not made |
| `sources/FP` | of a video file and its depth file: hash, size, and its store's tag or modification times |

FP is the fingerprint of everything that the artifact depends on. A changed setting yields other names, and only those
artifacts are redone. For `sources`, FP is the fingerprint of the file's URL. A refusal also depends on the limits and
thresholds that caused it. Workers write samples; only the driver writes records. Before 2026-11-26 each record other
than `sources` was a file of its own; such files are still read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import string
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from ex4d import storage
from ex4d.config import to_dict
from ex4d.data.foreign import is_foreign
from ex4d.errors import ConfigError
from ex4d.redact import SECRET, without_secrets
from ex4d.threads import in_order
from pipelines.runtime import attempts
from pipelines.runtime.blocks import LAST
from pipelines.runtime.known import Known, load_files
from pipelines.runtime.packed import MARK, NUM_THREADS, Packed, sizes_in
from pipelines.runtime.parts import FOLDERS, Reader, merged
from pipelines.runtime.records import SUFFIX, Records
from pipelines.runtime.scratch import scratch

logger = logging.getLogger(__name__)

CONFIG = "staging/config.json"
DAMAGED = "staging/damaged"
RECORDS = "staging/records"
MANY = (5000, 200_000)  # numbers of records beyond which listing is split by the first letter, and by the first two
LETTERS = string.ascii_lowercase + string.digits  # the first characters of sample keys
PACKED = "packed"  # subfolder of staging: what the shards were built from


class Ledger:
    """The staging folder of the dataset folder `output`, local or in an object store.

    On first use it is listed and its records are read, once, into a scratch database on this machine.

    Args:
        digits, read: see Records.
    """

    def __init__(self, output: str, digits: int = 0, read: Reader | None = None):
        self.output, self.digits, self.read = output, digits, read

    @cached_property
    def database(self) -> sqlite3.Connection:
        """The scratch database, with the table `file` of the artifacts that are files of their own."""
        connection = scratch()
        connection.execute("CREATE TABLE file (name TEXT PRIMARY KEY, size INTEGER) WITHOUT ROWID")
        return connection

    @cached_property
    def parts(self) -> dict[str, int]:
        """{name: bytes} of the parts that earlier runs have written, in order."""
        sizes = storage.list_sizes(storage.join(self.output, RECORDS))
        return dict(sorted((name, size) for name, size in sizes if name.endswith(SUFFIX)))

    @cached_property
    def records(self) -> Records:
        """All records in parts, and those in files of their own that `load_files` has read."""
        database, folder, damaged = self.database, *(storage.join(self.output, name) for name in (RECORDS, DAMAGED))
        records = Records(database, folder, damaged, list(self.parts), self.digits, self.read)
        digits = sum(records.num_earlier > many for many in MANY)
        prefixes = ["".join(letters) for letters in product(LETTERS, repeat=digits)]
        for folder in FOLDERS:
            sizes = storage.list_sizes(storage.join(self.output, "staging", folder), prefixes)
            rows = ((f"{folder}/{name}", size) for name, size in sizes)
            database.executemany("INSERT INTO file VALUES (?, ?)", rows)
        self.packed = Packed(self.output, database, MARK in records)
        return records

    def flush(self) -> None:
        """Write all pending records; do nothing if the records were never read."""
        if "records" in vars(self):
            self.records.flush()

    def names(self) -> set[str]:
        """Return the names of all finished artifacts, e.g. `clips/KEY.FP.tar`, except for samples only in shards."""
        records = {name for name in self.records if name.partition("/")[0] in FOLDERS and not name.endswith(".tar")}
        return records | {name for (name,) in self.database.execute("SELECT name FROM file")}

    def __contains__(self, name: str) -> bool:
        """Return True if an artifact is finished; a sample is finished if its file exists."""
        return (not name.endswith(".tar") and name in self.records) or self.size(name) is not None

    def may_have(self, name: str) -> bool:
        """Return whether an artifact is finished, fast, but possibly wrong: a shard may have lost a sample."""
        in_parts = not name.endswith(".tar") or self.packed.is_only_copy
        return (in_parts and self.records.may_have(name)) or self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Return the bytes of an artifact that is a file of its own, or None if it is not one."""
        self.records  # noqa: B018 (reading the records also lists the files)
        found = self.database.execute("SELECT size FROM file WHERE name = ?", (name,)).fetchone()
        return None if found is None else int(found[0])

    def url(self, name: str) -> str:
        """Return the path or URL of an artifact that is a file of its own."""
        return storage.join(self.output, "staging", name)

    def write_sample(self, name: str, blob: bytes) -> dict[str, Any]:
        """Write the tar blocks of a finished sample; return their size and sha256."""
        storage.write_bytes(self.url(name), blob)
        return {"size": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}

    def finished(self, name: str, record: Mapping[str, Any]) -> None:
        """Record, on the driver, that a worker has written a sample."""
        self.records.add(name, record)
        self.database.execute("INSERT OR REPLACE INTO file VALUES (?, ?)", (name, record["size"]))

    def has_record(self, name: str) -> bool:
        """Return True if there is a record of this name."""
        return name in self.records

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a record, or None if there is none."""
        return self.records.get(name)

    def add(self, name: str, body: Mapping[str, Any]) -> None:
        """Write a record."""
        self.records.add(name, body)

    def load_files(self, keys: Mapping[str, str]) -> set[str]:
        """Load the records of artifacts that lack one; return the names of damaged ones. See `known.load_files`."""
        return load_files(self, keys)

    def unit(self, prefix: str) -> dict[str, Any]:
        """Return columns for `known_of`: what the ledger has of the videos whose content hash begins with `prefix`."""
        records, sizes = np.frombuffer(self.records.unit(prefix), np.uint8), dict[str, int]()
        for folder in FOLDERS:
            first = f"{folder}/{prefix}"
            found = self.database.execute(
                "SELECT name, size FROM file WHERE name BETWEEN ? AND ?", (first, first + LAST)
            )
            sizes.update(found.fetchall())
        return {"records": records, "sizes": sizes, "shards": self.packed.shards_of(prefix)}

    def apply(self, changes: Mapping[str, Iterable[Any]]) -> None:
        """Apply the `changes` of a `Known`."""
        for name, body in changes["added"]:
            self.records.add(name, body)
        for name in changes["damaged"]:
            self.set_aside(name)
        for name in changes["removed"]:
            self.remove(name)

    def set_aside(self, name: str) -> None:
        """Move a damaged artifact to `staging/damaged`; the next run redoes it."""
        place = storage.join(self.output, DAMAGED, name.replace("/", "-"))
        if storage.exists(self.url(name)):
            storage.write_bytes(place, storage.read_bytes(self.url(name)))
        self.remove(name)
        logger.warning("%s is damaged and will be made again; what was there is kept as %s", self.url(name), place)

    def remove(self, name: str) -> None:
        """Delete an artifact; the next run redoes it."""
        self._forget(self._delete((name, self.size(name) is not None)))

    def _forget(self, name: str) -> None:
        self.database.execute("DELETE FROM file WHERE name = ?", (name,))
        if self.records.may_have(name):
            self.records.forget(name)

    def write_config(self, sections: Mapping[str, Any]) -> None:
        """Save a run's settings and working directory for `ex4d retry`, without secrets in URLs."""
        plain = {name: to_dict(section) for name, section in sections.items() if section is not None}
        text = json.dumps(without_secrets({"folder": os.getcwd(), "sections": plain}), sort_keys=True)
        storage.write_bytes(storage.join(self.output, CONFIG), text.encode())

    def read_config(self) -> tuple[str, dict[str, Any]]:
        """Return (working directory, {section: mapping}) of the last run.

        Raises:
            ConfigError: no run has written there, its settings contained a secret, or they belong to another user.
        """
        url = storage.join(self.output, CONFIG)
        if not storage.is_local(url) and is_foreign(self.output):
            raise ConfigError("OUT", self.output, "is on the web, where anybody may have written it")
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
        """Delete what killed processes left behind: temporary files, and the record of attempts.

        Only for a run that holds the folder and has nothing left to do. Object stores have no temporary files.
        """
        storage.remove(storage.join(self.output, attempts.FILE))
        if storage.is_local(self.output):
            for path in (storage.local_path(self.output) / "staging").rglob(".tmp-*"):
                path.unlink(missing_ok=True)

    def prune(self, names: Iterable[str]) -> None:
        """Delete superseded artifacts, and if there were any, rewrite the remaining records as new parts."""
        count, with_size = 0, ((name, self.size(name) is not None) for name in names)
        for name in in_order(self._delete, with_size, NUM_THREADS):
            self._forget(name)
            count += 1
        if count:
            self.records.rewrite()

    def _delete(self, artifact: tuple[str, bool]) -> str:
        name, is_file = artifact
        if is_file:
            storage.remove(self.url(name))
        return name


def known_of(row: Mapping[str, Any], output: str) -> Known:
    """Return what the ledger knows of a unit, on a worker. Args: row: has the columns of `Ledger.unit`."""
    bodies = merged(row["records"].tobytes())
    return Known(output, bodies, sizes_in(output, row["shards"], bodies) | row["sizes"])


def superseded(names: Iterable[str], used: set[str]) -> list[str]:
    """Return, sorted, the artifacts that are not used while others of the same source video are."""
    sources = {_source(name) for name in used}
    return sorted(name for name in names if name not in used and _source(name) in sources)


def _source(name: str) -> str:
    """Return the first 16 hex digits of the content hash, with which an artifact's name begins."""
    return name.partition("/")[2][:16]
