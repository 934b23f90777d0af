"""Lock an output in an object store for one run, by a small object that its holder rewrites every few seconds.

No clocks are compared: a run that finds a lease watches whether it changes. Every write is conditional on the version
that it replaces (`If-Match`, `If-None-Match`), so if two runs want the same lease, one is refused. Only S3 is locked
in this way, no other store.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ex4d import remote, storage
from ex4d.errors import ConfigError, ContractError

logger = logging.getLogger(__name__)

NAME = "lease.json"
RENEW_S = 10.0  # interval at which the holder renews the lease
LOST_S = 35.0  # a holder that has not renewed it for this long is presumed dead
LOOK_S = 1.0  # interval at which a waiting run polls the lease
STOP = signal.SIGUSR2  # interrupts a run that lost its lease; SIGINT may be ignored, and Ray handles SIGTERM
_REFUSED = ("status 409", "status 412")  # another writer was first


class Lease:
    """The lease of one output.

    Args:
        output: the URL of a folder in S3.
    """

    def __init__(self, output: str):
        self.output, self.url = output, storage.join(output, NAME)
        self.holder, self.tag, self.number = uuid.uuid4().hex, "", 0
        self.is_lost = False
        self._ended = threading.Event()

    def take(self) -> None:
        """Take the lease, if it is free or its holder is dead. Raises ConfigError if the holder is alive."""
        first = seen = self._read()
        deadline = time.monotonic() + LOST_S
        if seen:
            logger.warning(
                "%s: held by %s; waiting %.0f s to see whether it is still running", self.url, seen[1], LOST_S
            )
        while seen and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            seen = self._read()
            if seen and first and seen[0] != first[0]:
                raise ConfigError("output", self.output, f"another run is writing there: {seen[1]}")
        self.tag = seen[0] if seen else ""
        if not self.write():
            raise ConfigError("output", self.output, "another run began to write there at the same time")

    def write(self) -> bool:
        """Write the lease over the version that this run knows; return False if another run holds it."""
        self.number += 1
        who = {"run": self.holder, "node": platform.node(), "pid": os.getpid(), "number": self.number}
        filesystem, path = storage.filesystem_of(self.url)
        condition = {"IfMatch": self.tag} if self.tag else {"IfNoneMatch": "*"}
        try:
            remote.call(lambda: filesystem.pipe_file(path, json.dumps(who).encode(), **condition), self.url)
        except OSError as error:
            if not str(error.strerror).endswith(_REFUSED):
                raise
        now = self._read()  # a write may have succeeded although its response was lost
        if now is None or now[2] != self.holder:
            return False
        self.tag = now[0]
        return True

    def renew(self) -> None:
        """Renew the lease every RENEW_S until the run ends; if the lease is lost, interrupt the run."""
        while not self._ended.wait(RENEW_S):
            try:
                self.is_lost = not self.write()
            except OSError as error:  # if another run could write meanwhile, the next renewal finds out
                logger.warning("%s is not renewed: %s", self.url, error.strerror)
            if self.is_lost:
                logger.error("%s: another run took the lease; this one stops", self.url)
                signal.pthread_kill(threading.main_thread().ident or 0, STOP)  # also wakes it from a sleep
                return

    def release(self) -> None:
        """Stop renewing, and delete the lease unless it was lost."""
        self._ended.set()
        try:
            now = self._read()
            if now and now[2] == self.holder:
                storage.remove(self.url)
        except OSError as error:  # others will presume it dead later
            logger.warning("%s is not deleted: %s", self.url, error.strerror)

    def _read(self) -> tuple[str, str, str] | None:
        """Return (ETag, description of the holder, its id) of the current lease, None if there is none."""
        filesystem, path = storage.filesystem_of(self.url)
        try:
            tag = str(remote.call(lambda: filesystem.info(path), self.url)["ETag"])
            who: Any = json.loads(storage.read_bytes(self.url))
            return tag, f"process {int(who['pid'])} on {str(who['node'])[:100]}", str(who["run"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError("output", self.output, f"{NAME} is not a lease: delete it if no run is there") from error


@contextmanager
def held(output: str) -> Iterator[None]:
    """Hold the lease of an output in S3 for one run; do nothing for other outputs.

    Raises:
        ConfigError: another run holds it.
        ContractError: another run took it over, because this one could not renew it for too long.
    """
    if not output.startswith("s3://"):
        yield
        return
    lease = Lease(output)
    lease.take()
    before = signal.signal(STOP, signal.default_int_handler)
    thread = threading.Thread(target=lease.renew, daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if lease.is_lost:
            raise ContractError(f"{output}: another run took it over, since {NAME} was not renewed in time") from None
        raise
    finally:
        lease.release()
        thread.join()
        signal.signal(STOP, before)
