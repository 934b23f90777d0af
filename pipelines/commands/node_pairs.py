"""The checks of `ex4d doctor --cluster` between nodes: shared storage, and the network, by an all-reduce."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

ROUNDS = 20
RENAMES, MIN_RENAMES = 200, 10  # by all participants together; by each at least
TOLD_BYTES = 64 << 10
PEERS_S = 30.0  # how long nodes wait for each other's files; a busy node needs 10 to 20 s to start a worker
CONNECT_S = 12.0
REDUCED_BYTES = 32 << 20
TIMES = 3


@dataclass
class Race:
    """What one participant observed in a shared folder.

    Args:
        sees_driver: it could read the driver's file. peers: number of participants whose files it saw in time.
        won: rounds in which it created the file that only one participant may create.
        locked: it got the lock that only one participant may hold.
        torn: reads during renames that returned neither the old nor the new file.
    """

    sees_driver: bool = False
    peers: int = 0
    won: list[int] = field(default_factory=list)
    locked: bool = False
    torn: int = 0
    problem: str = ""


def race(folder: str, word: str, index: int, count: int) -> Race:
    """Use a folder of the shared storage together with the other participants; return what this one observed.

    Args:
        word: the expected content of the driver's file `driver`.
        index: number of this participant, of `count`. They take turns at renaming, while the others read.
    """
    result, place = Race(), Path(folder)
    try:
        result.sees_driver = (place / "driver").read_text() == word
        result.peers = _meet(place, "ready", index, count)
        if result.peers < count:
            return result
        result.won = [number for number in range(ROUNDS) if _creates(place / f"round-{number}", number, index, count)]
        with open(place / "lock", "ab") as file:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                result.locked = True
            _meet(place, "locked", index, count)  # held until everyone has tried
        for writer in range(count):
            if index == writer:
                _rename(place, writer, max(MIN_RENAMES, RENAMES // count))
            else:
                result.torn += _count_torn(place, writer)
    except OSError as error:
        result.problem = f"{error.strerror or error}"
    return result


def _meet(place: Path, name: str, index: int, count: int) -> int:
    """Wait until all participants reached this point, or for PEERS_S; return how many did."""
    (place / f"{name}-{index}").write_text("")
    deadline = time.monotonic() + PEERS_S
    while (there := len(list(place.glob(f"{name}-*")))) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    return there


def _creates(path: Path, number: int, index: int, count: int) -> bool:
    """Return True if this participant created the file of a round.

    In even rounds all try at once. In odd rounds one goes first and the others follow, so that no order hides a fault.
    """
    deadline = time.monotonic() + PEERS_S
    while number % 2 and index != number // 2 % count and not path.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _rename(place: Path, writer: int, times: int) -> None:
    """Repeatedly rename a new file over one that the others read."""
    for number in range(times):
        temporary = place / f"new-{writer}-{number}"
        temporary.write_bytes(bytes([number % 256]) * TOLD_BYTES)
        os.replace(temporary, place / f"renamed-{writer}")
    (place / f"all-{writer}").write_text("")


def _count_torn(place: Path, writer: int) -> int:
    """Return how many reads of the replaced file found it missing, short or mixed."""
    torn, deadline = 0, time.monotonic() + PEERS_S
    file, last = place / f"renamed-{writer}", place / f"all-{writer}"
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    while not last.exists() and time.monotonic() < deadline:
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            torn += 1
            continue
        torn += len(content) != TOLD_BYTES or len(set(content)) != 1
    return torn


def all_reduce(address: str, port: int, rank: int, count: int, on_gpu: bool) -> tuple[float, str]:
    """Run one rank of an all-reduce; return (Gbit/s, "") or (0, reason of the failure)."""
    import torch
    from torch import distributed

    from ex4d.train import interface

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    name = interface.towards_master()
    if name is not None:
        os.environ.update(GLOO_SOCKET_IFNAME=name, NCCL_SOCKET_IFNAME=name)
    backend, device = ("nccl", "cuda") if on_gpu else ("gloo", "cpu")
    limit = datetime.timedelta(seconds=CONNECT_S)
    try:
        distributed.init_process_group(
            backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=count, timeout=limit
        )
        tensor = torch.ones(REDUCED_BYTES // 4, device=device)
        distributed.all_reduce(tensor)
        started = time.monotonic()
        for _ in range(TIMES):
            distributed.all_reduce(tensor)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = (time.monotonic() - started) / TIMES
        distributed.destroy_process_group()
    except (RuntimeError, OSError, ValueError) as error:
        return 0.0, str(error).strip().split("\n")[0][:200]
    return 2 * (count - 1) / count * REDUCED_BYTES * 8 / seconds / 1e9, ""
