"""Write and read one sample as tar blocks, strictly: only bytes that this module would write are accepted.

A sample is a run of USTAR entries `KEY.member`, sorted by member, with mtime 0, uid and gid 0, mode 0644, without the
end marker, so that a shard is the concatenation of its samples and END. Every WebDataset reader opens it.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from ex4d.data.sample import KEY
from ex4d.errors import ContractError

BLOCK = 512
END = bytes(2 * BLOCK)
MEMBER = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


@dataclass(frozen=True)
class Entry:
    """Location of a member: `offset` and `length` of its content in bytes, from the start of the sample."""

    name: str
    offset: int
    length: int


def sample_tar(key: str, members: Mapping[str, bytes]) -> bytes:
    """Return the sample's tar blocks; equal members give equal bytes.

    Raises:
        ContractError: a key or member name is not allowed.
    """
    parts = []
    for name in sorted(members):
        data = members[name]
        parts += [header(key, name, len(data)), data, bytes(-len(data) % BLOCK)]
    return b"".join(parts)


@lru_cache(maxsize=4096)  # every epoch compares with the same headers
def header(key: str, name: str, length: int) -> bytes:
    """Return the 512 bytes before the content of one member."""
    if not KEY.fullmatch(key):
        raise ContractError(f"sample key {key!r} must match {KEY.pattern}")
    if not MEMBER.fullmatch(name) or len(f"{key}.{name}") > 99:
        raise ContractError(f"sample {key}: member name {name!r} is not allowed")
    info = tarfile.TarInfo(f"{key}.{name}")  # mtime, uid, gid are 0, mode is 0644, owner names are empty
    info.size = length
    return info.tobuf(format=tarfile.USTAR_FORMAT)


def entries(blob: bytes, key: str) -> list[Entry]:
    """Return the sample's members in order, after checking every header and all padding.

    Args:
        blob: exactly one sample, as `sample_tar` writes it.
        key: the sample's key.

    Raises:
        ContractError: a header, length or padding is not what `sample_tar` writes; the message names the member.
    """
    members: list[Entry] = []
    position = 0
    while position < len(blob):
        block = blob[position : position + BLOCK]
        name = block[:100].rstrip(b"\0").decode("ascii", "replace").removeprefix(f"{key}.")
        digits = block[124:135]
        length = int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else -1
        # No field of a header is trusted: it must equal the header that we would write.
        if length < 0 or not MEMBER.fullmatch(name) or block != header(key, name, length):
            where = f"after member {members[-1].name}" if members else "at the sample's start"
            raise ContractError(f"sample {key}: the tar header {where} is damaged")
        start, stop = position + BLOCK, position + BLOCK + length
        position = stop + -length % BLOCK
        if position > len(blob) or any(blob[stop:position]):
            raise ContractError(f"sample {key}: member {name} is cut short or its padding is damaged")
        if members and name <= members[-1].name:
            raise ContractError(f"sample {key}: member {name} is out of order")
        members.append(Entry(name, start, length))
    return members


def read_sample(blob: bytes, key: str) -> dict[str, bytes]:
    """Return {member: bytes} of one sample's tar blocks; ContractError as in `entries`."""
    return {entry.name: blob[entry.offset : entry.offset + entry.length] for entry in entries(blob, key)}
