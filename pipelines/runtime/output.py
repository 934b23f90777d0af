"""Guard outputs: only one command writes to an output at a time, and none writes into a finished dataset."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ex4d import storage
from ex4d.data.manifest import DATASET
from ex4d.errors import ConfigError
from pipelines.runtime import lease

LOCK = ".lock"


@contextmanager
def exclusive(output: str, name: str = LOCK) -> Iterator[None]:
    """Lock an output for one run: a local folder by a lock that ends with the process, a prefix in S3 by a lease.

    Args:
        output: the folder; created if it does not exist.
        name: name of the lock file, which is left behind.

    Raises:
        ConfigError: another run holds it.
    """
    if not storage.is_local(output):
        with lease.held(output):
            yield
        return
    folder = storage.local_path(output)
    folder.mkdir(parents=True, exist_ok=True)
    # The file is not truncated, nor opened through a link that another user may have planted.
    try:
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError("output", output, f"{name} cannot be opened: {error.strerror}") from error
    with os.fdopen(fd, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            now = os.stat(folder / name)  # `writing` deletes its lock file; a lock on a deleted file protects nothing
            if now.st_ino != os.fstat(file.fileno()).st_ino:
                raise BlockingIOError
        except OSError as error:
            raise ConfigError("output", output, "another run is writing there") from error
        yield


@contextmanager
def writing(output: str | Path, is_file: bool = False) -> Iterator[None]:
    """Lock what a command writes: its folder, or the files whose names begin with that of `output`.

    If the command fails before it writes anything, neither lock nor new folders are left behind.

    Raises:
        ConfigError: another command holds it, it is not writable, or it lies in a dataset.
    """
    place = str(output)
    if not storage.is_local(place):
        yield
        return
    outside_datasets("output", place)
    path = storage.local_path(place)
    folder, name = (path.parent, f".{path.name}.lock") if is_file else (path, LOCK)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError("output", str(folder), f"{there} is not a writable folder")
    missing = [parent for parent in (folder, *folder.absolute().parents) if not parent.exists()]
    try:
        with exclusive(str(folder), name):
            try:
                yield
            finally:
                (folder / name).unlink(missing_ok=True)
    finally:
        for parent in missing:  # innermost first
            with suppress(OSError):  # not empty: it contains output
                parent.rmdir()


def outside_datasets(key: str, output: str, own: str = "") -> None:
    """Raise ConfigError if an output is a finished dataset, or lies in one.

    Args:
        key: name of the setting, for the message.
        own: "clips" or "latents": a dataset of this kind is allowed as the output, to be updated.
    """
    if not storage.is_local(output):
        return
    path = storage.local_path(output).resolve()
    for folder in (path, *path.parents):
        if not (folder / DATASET).is_file():
            continue
        if folder == path and own and own == _kind(folder / DATASET):
            return
        raise ConfigError(key, output, f"a folder outside of the dataset {folder}")


def _kind(record: Path) -> str:
    try:
        return "latents" if "latents" in json.loads(record.read_bytes()) else "clips"
    except (ValueError, TypeError):
        return "clips"  # damage is reported later
