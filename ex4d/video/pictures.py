"""Read pictures as a video: a folder of JPEG or of PNG, or an animated WebP.

The pictures' own bytes become the samples of a MOV, whose index lists the offset and duration of each. So a folder is
decoded like any video: from one open file, in the sandboxed child, within its limits. Nothing is decoded to make that
file, except animated WebP, which FFmpeg does not read: OpenCV decodes it, in the child.

A folder's pictures are its JPEG or PNG in the order of the numbers in their names, at a constant rate that the caller
chooses. Their names may differ only in numbers. The hash of a folder covers the rate and each name and sha256.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

from ex4d import storage, text
from ex4d.errors import BadSample

SUFFIXES = (".jpg", ".jpeg", ".png")
FPS = 24.0  # default
MAX_FPS = 1000.0
_MAGIC = {b"\xff\xd8\xff": b"jpeg", b"\x89PN": b"png "}  # first bytes of a picture: the MOV's name of its codec
_MAX_PICTURES = 1_000_000
_MAX_BYTES = 2**38  # of a folder that one command reads
_MAX_WEBP_BYTES, _MAX_DECODED_BYTES = 2**28, 2**30  # of an animation: its file, and all its decoded frames
_CHUNK_BYTES = 1 << 20
_UNITY = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)  # the identity matrix


def chosen(names: Iterable[str]) -> list[str]:
    """Return the pictures among the file names of a folder, in the order of the numbers in them."""
    found = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return [found[place] for place in text.in_natural_order(found)]


def names_in(folder: str) -> list[str]:
    """Return the pictures of a folder, in order.

    Raises:
        BadSample: no_pictures; pictures_mixed: their names differ in more than numbers; unreadable.
    """
    try:
        names = chosen(os.listdir(folder))
    except OSError as error:
        raise BadSample("unreadable", f"{Path(folder).name}: {error.strerror}") from error
    if not names:
        raise BadSample("no_pictures", f"{Path(folder).name} holds no JPEG or PNG; a folder of them is a video")
    if len(names) > _MAX_PICTURES:
        raise BadSample("pictures_limit", f"{Path(folder).name} holds more than {_MAX_PICTURES} pictures")
    first = _pattern(names[0])
    other = next((name for name in names if _pattern(name) != first), None)
    if other is not None:
        raise BadSample(
            "pictures_mixed", f"{names[0]} and {other} are not frames of one video: their names may differ in numbers"
        )
    return names


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name.lower())


def digest(folder: str, fps: float, out: IO[bytes] | None = None, max_bytes: int = _MAX_BYTES) -> tuple[str, int]:
    """Hash a folder's pictures; return (sha256 of the rate, names and contents; number of bytes).

    Args:
        out: a file to which a MOV of them is written; None: none.
        max_bytes: limit for all pictures together.

    Raises:
        BadSample: as `names_in`; file_too_large; not_a_file: a picture is a pipe, a device or a dangling link;
            pictures_mixed: JPEG and PNG; pictures_depth: 16-bit grey PNG, as depth is stored;
            container_not_allowed: a file's content is neither JPEG nor PNG.
    """
    names, rate = names_in(folder), Fraction(fps).limit_denominator(1001)
    total, codec, movie = hashlib.sha256(f"fps {rate}\n".encode()), b"", None
    num_bytes = 0
    for name in names:
        with _regular(Path(folder) / name) as file:
            head, size = file.read(64), os.fstat(file.fileno()).st_size
            file.seek(0)
            found, num_bytes = _codec(head, name), num_bytes + size
            if codec not in (b"", found):
                raise BadSample("pictures_mixed", f"{names[0]} and {name} are pictures of two kinds")
            if num_bytes > max_bytes:
                raise BadSample("file_too_large", f"the pictures have more than {max_bytes} bytes together")
            if movie is None and out is not None:
                movie = Movie(out, found)
            codec = found
            own = hashlib.sha256()
            if movie is not None:
                movie.add(_hashed(file, own, size), rate.denominator)
            else:
                for _ in _hashed(file, own, size):
                    pass
        total.update(name.encode("utf-8", "surrogateescape") + b" " + own.hexdigest().encode() + b"\n")
    if movie is not None:
        movie.close(rate.numerator)
    return total.hexdigest(), num_bytes


def size_of(folder: str) -> int:
    """Return the total size of a folder's pictures in bytes. Raises BadSample as `names_in`."""
    return sum(os.stat(place).st_size for name in names_in(folder) if os.path.isfile(place := Path(folder) / name))


@contextmanager
def _regular(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = storage.open_read(path)
    except OSError as error:
        raise BadSample("not_a_file", f"{path.name}: {error.strerror}") from error
    with file:
        yield file


def _codec(head: bytes, name: str) -> bytes:
    codec = _MAGIC.get(head[:3])
    if codec is None:
        what = "is empty" if not head else f"begins with {head[:8].hex()}, not as a JPEG or PNG"
        raise BadSample("container_not_allowed", f"{name} {what}")
    if codec == b"png " and head[24:26] == b"\x10\x00":
        raise BadSample("pictures_depth", f"{name} is a 16-bit grey PNG, as depth is stored: NAME.depth/ is read so")
    return codec


def _hashed(file: IO[bytes], own: Any, size: int) -> Iterator[bytes]:
    """Yield a file in parts and update the hash `own`; at most `size` bytes, because the file may be growing."""
    while part := file.read(min(_CHUNK_BYTES, size)):
        size -= len(part)
        own.update(part)
        yield part


@contextmanager
def as_video(path: str | Path, fps: float = FPS) -> Iterator[str]:
    """Yield the path of a video: `path` itself, or a temporary MOV of a folder's pictures.

    Raises:
        BadSample: as `digest`, for a folder.
    """
    if not os.path.isdir(path):
        yield str(path)
        return
    with tempfile.NamedTemporaryFile(prefix="ex4d-pictures-", suffix=".mov") as file:
        digest(str(path), fps, file)
        file.flush()
        yield file.name


class Movie:
    """Write a MOV whose samples are whole pictures of one codec (QuickTime File Format; ISO/IEC 14496-12).

    Args:
        out: an empty, seekable binary file.
        codec: four characters.
    """

    def __init__(self, out: IO[bytes], codec: bytes):
        self.out, self.codec = out, codec
        self.sizes: list[int] = []
        self.offsets: list[int] = []
        self.ticks: list[int] = []
        out.write(_box(b"ftyp", b"qt  " + bytes(4) + b"qt  "))
        self.start = out.tell()
        out.write(struct.pack(">I4sQ", 1, b"mdat", 0))  # `close` writes its 64-bit length

    def add(self, parts: Iterable[bytes], ticks: int) -> None:
        """Add a picture that is shown for this many ticks."""
        self.offsets.append(self.out.tell())
        for part in parts:
            self.out.write(part)
        self.sizes.append(self.out.tell() - self.offsets[-1])
        self.ticks.append(ticks)

    def close(self, ticks_per_s: int) -> None:
        """Write the index."""
        end = self.out.tell()
        self.out.seek(self.start + 8)
        self.out.write(struct.pack(">Q", end - self.start))
        self.out.seek(end)
        length = min(sum(self.ticks), 2**32 - 1)
        clock = bytes(12) + struct.pack(">II", ticks_per_s, length)
        header = clock + struct.pack(">IH10x", 1 << 16, 0) + _UNITY + bytes(24) + struct.pack(">I", 2)
        track = struct.pack(">IIIIII8xHHHH", 7, 0, 0, 1, 0, length, 0, 0, 0, 0) + _UNITY + bytes(8)
        handler = bytes(4) + b"mhlrvide" + bytes(13)
        reference = _box(b"dinf", _box(b"dref", struct.pack(">II", 0, 1) + _box(b"url ", struct.pack(">I", 1))))
        look = _box(b"vmhd", struct.pack(">I8x", 1))
        media = _box(b"mdhd", clock + bytes(4)) + _box(b"hdlr", handler)
        media += _box(b"minf", look + reference + _box(b"stbl", self._tables()))
        movie = _box(b"mvhd", header) + _box(b"trak", _box(b"tkhd", track) + _box(b"mdia", media))
        self.out.write(_box(b"moov", movie))

    def _tables(self) -> bytes:
        # The decoder determines the size of the pictures; 72 dpi, one frame per sample, 24 bits, no palette.
        look = struct.pack(">16xHHIIIH32xHh", 0, 0, 72 << 16, 72 << 16, 0, 1, 24, -1)
        entry = _box(self.codec, struct.pack(">6xH", 1) + look)
        runs = [(sum(1 for _ in group), ticks) for ticks, group in itertools.groupby(self.ticks)]
        count = len(self.sizes)
        return b"".join(
            (
                _box(b"stsd", struct.pack(">II", 0, 1) + entry),
                _box(b"stts", struct.pack(">II", 0, len(runs)) + b"".join(struct.pack(">II", *run) for run in runs)),
                _box(b"stsc", struct.pack(">IIIII", 0, 1, 1, 1, 1)),
                _box(b"stsz", struct.pack(f">III{count}I", 0, 0, count, *self.sizes)),
                _box(b"co64", struct.pack(f">II{count}Q", 0, count, *self.offsets)),
            )
        )


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def of_webp(file: IO[bytes]) -> io.BytesIO:
    """Convert an animated WebP to a MOV of PNG with the same durations; runs in the sandboxed child.

    Raises:
        BadSample: size_limit, decode_error.
    """
    import cv2
    import numpy as np

    file.seek(0)
    data = file.read(_MAX_WEBP_BYTES + 1)
    (height, width), times = _webp_frames(data)
    if len(data) > _MAX_WEBP_BYTES or 4 * height * width * len(times) > _MAX_DECODED_BYTES:
        raise BadSample("size_limit", f"an animated WebP of {len(times)} frames of {width}x{height}")
    try:
        is_good, animation = cv2.imdecodeanimation(np.frombuffer(data, np.uint8))
    except cv2.error as error:
        raise BadSample("decode_error", f"the animated WebP does not decode: {error.err}") from error
    frames = list(animation.frames) if is_good else []
    if len(frames) != len(times):
        raise BadSample("decode_error", f"{len(frames)} of {len(times)} frames of the animated WebP decode")
    out = io.BytesIO()
    movie = Movie(out, b"png ")
    for frame, shown_ms in zip(frames, times, strict=True):
        encoded = cv2.imencode(".png", frame[..., :3], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
        movie.add([encoded.tobytes()], max(1, shown_ms))
    movie.close(1000)
    return out


def _webp_frames(data: bytes) -> tuple[tuple[int, int], list[int]]:
    """Return ((H, W) px, milliseconds of each frame) of an animated WebP from its chunks (RFC 9649)."""
    size = tuple(1 + int.from_bytes(data[place : place + 3], "little") for place in (27, 24))
    times, place = [], 12
    while place + 24 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        if kind == b"ANMF":
            times.append(int.from_bytes(data[place + 20 : place + 23], "little"))
        place += 8 + length + length % 2
    if not times:
        raise BadSample("no_frames", "the animated WebP has no frames")
    return (size[0], size[1]), times
