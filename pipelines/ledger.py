"""The ledger of a preprocess run is a folder: what lies in `staging/` is done, what does not is to do.

| file | what |
|---|---|
| `videos/SHA.FP.json` | info, frame times and cuts of a video, or its refusal |
| `clips/KEY.FP.tar` | a finished sample, exactly as it will stand in a shard |
| `clips/KEY.FP.json` | why a clip was refused |

FP is the fingerprint of all that the file depends on, so a changed setting makes other names and redoes only those.
A refusal also depends on the limits and thresholds that refused it. Each file is written once, whole.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ex4d import storage
from ex4d.errors import ConfigError, ContractError

VIDEOS, CLIPS = "staging/videos", "staging/clips"


class Ledger:
    """The staging folder of the dataset folder `output`, local or in an object store."""

    def __init__(self, output: str):
        self.output = output

    def names(self) -> set[str]:
        """Return the names of everything that is done, e.g. `clips/KEY.FP.tar`."""
        found = set()
        for folder in (VIDEOS, CLIPS):
            kind = folder.rpartition("/")[2]
            found |= {f"{kind}/{name}" for name in storage.list_files(storage.join(self.output, folder))}
        return found

    def url(self, name: str) -> str:
        """Return where an artifact of `names` lies."""
        return storage.join(self.output, "staging", name)

    def write_video(self, name: str, record: Mapping[str, Any]) -> None:
        """Write down what is known of a video."""
        self._write_json(name, record)

    def write_refusal(self, name: str, refusal: Mapping[str, Any]) -> None:
        """Write down why a clip was refused."""
        self._write_json(name, refusal)

    def write_sample(self, name: str, blob: bytes) -> None:
        """Write a finished sample's tar blocks."""
        storage.write_bytes(self.url(name), blob)

    def read(self, name: str) -> dict[str, Any]:
        """Return a video's record or a clip's refusal.

        Raises:
            ContractError: it is no JSON mapping, so somebody else wrote it.
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

    def forget(self, reasons: Iterable[str]) -> int:
        """Return how many refusals with one of these reasons were deleted; the next run tries those again."""
        wanted, count = set(reasons), 0
        for name in sorted(self.names()):
            if not name.endswith(".json"):
                continue
            body = self.read(name)
            refusal = body["refusal"] if name.startswith("videos/") else body
            if refusal is not None and refusal["reason"] in wanted:
                storage.remove(self.url(name))
                count += 1
        return count

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        storage.write_bytes(self.url(name), json.dumps(value, sort_keys=True).encode())


@contextmanager
def exclusive(output: str) -> Iterator[None]:
    """Hold the dataset folder for one run; the lock ends with the process, however it ends. Local folders only.

    Raises:
        ConfigError: another run has it.
    """
    if not storage.is_local(output):
        yield
        return
    folder = storage.local_path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError("preprocess.output", output, "another run is writing there") from error
        yield
