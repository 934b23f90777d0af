"""Read depth from a folder of 16-bit PNG, one per frame, in millimetres, as depth cameras and datasets write it."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO

import numpy as np

from ex4d import isolation, storage, text
from ex4d.errors import BadSample

MAX_SIDE_PX = 16384
MAX_PIXELS = 2**30  # of a clip's maps together: 129 of 4K; 4 GiB as float32
MAX_EXTRA_BYTES = 2**20  # of a PNG's text and colour profile
HEADER_BYTES = 26  # signature, and IHDR up to its colour type


def read(folder: str, index: np.ndarray, source_frames: int = 0) -> tuple[np.ndarray, str]:
    """Return (values uint16 [T, H, W], "z_depth") of pictures of a folder, in the order of the numbers in their names.

    Args:
        index: int [T], which of the source's frames.
        source_frames: frames of the whole source, each of which needs its picture; 0 is unknown.

    Raises:
        BadSample: depth_missing, depth_frames, depth_shape.
    """
    found = list(storage.local_path(folder).glob("*.png"))
    files = [found[place] for place in text.in_natural_order([file.name for file in found])]
    if not files:
        raise BadSample("depth_missing", f"{Path(folder).name} holds no PNG (one 16-bit PNG a frame is read)")
    if source_frames not in (0, len(files)):
        raise BadSample(
            "depth_frames", f"{len(files)} PNG for a video of {source_frames} frames: one a frame is needed"
        )
    if index.max(initial=0) >= len(files):
        raise BadSample("depth_frames", f"{len(files)} PNG, the clip needs that of frame {index.max()}")
    chosen = [files[int(number)] for number in index]
    sizes = {_size(file) for file in dict.fromkeys(chosen)}
    if len(sizes) > 1:
        raise BadSample("depth_shape", f"the PNG of {Path(folder).name} have several sizes")
    height, width = sizes.pop()
    try:
        check_pixels(len(chosen) * height * width)
    except ValueError as error:
        raise BadSample("depth_shape", f"{Path(folder).name}: {error}") from None
    values = np.empty((len(chosen), height, width), np.uint16)
    for number, file in enumerate(chosen):
        values[number] = isolation.run("depth_picture", (isolation.File(str(file)), (height, width), file.name))
    return values, "z_depth"


def check_pixels(count: int) -> None:
    """Raise ValueError where the maps of a clip have more than MAX_PIXELS together; before they are read."""
    if count > MAX_PIXELS:
        raise ValueError(f"the maps of the clip have {count} pixels together, more than {MAX_PIXELS}")


def _size(file: Path) -> tuple[int, int]:
    """Return (height, width) of a 16-bit PNG by its header alone, and check that its bytes can be no more than it."""
    try:
        with storage.open_read(file) as opened:
            data, num_bytes = opened.read(HEADER_BYTES), opened.seek(0, os.SEEK_END)
    except OSError as error:
        raise BadSample("unreadable", f"{file.name}: {error.strerror}") from error
    if len(data) < HEADER_BYTES or data[:8] != b"\x89PNG\r\n\x1a\n":
        raise BadSample("depth_shape", f"{file.name} is no PNG")
    width, height, bits, colour = struct.unpack(">IIBB", data[16:HEADER_BYTES])
    if not 0 < width <= MAX_SIDE_PX or not 0 < height <= MAX_SIDE_PX:
        raise BadSample("depth_shape", f"{file.name} has {width} × {height} px")
    if bits != 16 or colour != 0:
        raise BadSample(
            "depth_shape", f"{file.name} is no 16-bit grey PNG of millimetres, but of {bits} bits a channel"
        )
    if num_bytes > 4 * height * width + MAX_EXTRA_BYTES:
        raise BadSample("depth_shape", f"{file.name} has {num_bytes} bytes for {width} × {height} px")
    return height, width


def picture(file: IO[bytes], size: tuple[int, int], name: str) -> np.ndarray:
    """Return uint16 [H, W] of one PNG of a known size; runs in the sandboxed child. Raises BadSample: depth_shape."""
    import cv2

    image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.shape != size:
        raise BadSample("depth_shape", f"{name} cannot be decoded")
    return image
