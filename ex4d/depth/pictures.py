"""Read depth from a folder of pictures, one per frame.

They are 16-bit PNG in millimetres, as depth cameras and datasets write them, or OpenEXR of one channel.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import IO

import numpy as np

from ex4d import isolation, storage, text
from ex4d.errors import BadSample
from ex4d.video import exr

SUFFIXES = (".png", ".exr")
MAX_SIDE_PX = 16384
MAX_PIXELS = 2**30  # of a clip's maps together: 129 of 4K; 4 GiB as float32
MAX_EXTRA_BYTES = 2**20  # of a PNG's text and colour profile
HEADER_BYTES = 26  # signature, and IHDR up to its colour type


def read(folder: str, index: np.ndarray, source_frames: int = 0) -> tuple[np.ndarray, str]:
    """Read (values [T, H, W], kind) from a folder's pictures, in the order of the numbers in their names.

    16-bit PNG are uint16, z_depth; OpenEXR are float16 or float32, disparity in a folder `*.disparity`, else z_depth.

    Args:
        index: int [T], which of the source's frames.
        source_frames: frames of the whole source, each of which needs its picture; 0 is unknown.

    Raises:
        BadSample: depth_missing, depth_frames, depth_shape.
    """
    files, place = files_in(folder), Path(folder).name
    kinds = {file.suffix for file in files}
    if len(kinds) != 1:
        has = " and ".join(sorted(kinds)) or "neither"
        raise BadSample("depth_missing", f"{place} needs 16-bit PNG or OpenEXR, one a frame; it has {has}")
    if source_frames not in (0, len(files)):
        raise BadSample(
            "depth_frames", f"{len(files)} pictures for a video of {source_frames} frames: one per frame is needed"
        )
    if index.max(initial=0) >= len(files):
        raise BadSample("depth_frames", f"{len(files)} pictures, but the clip needs frame {index.max()}")
    is_disparity = place.endswith(".disparity")
    if is_disparity and kinds == {".png"}:
        raise BadSample("depth_shape", f"{place} holds PNG, which are in millimetres; disparity must be OpenEXR")
    chosen = [files[int(number)] for number in index]
    sizes = {_size(file) for file in dict.fromkeys(chosen)}
    if len(sizes) > 1:
        raise BadSample("depth_shape", f"the pictures of {place} have several sizes")
    height, width = sizes.pop()
    try:
        check_pixels(len(chosen) * height * width)
    except ValueError as error:
        raise BadSample("depth_shape", f"{place}: {error}") from None
    values = np.empty((len(chosen), height, width), np.uint16 if kinds == {".png"} else np.float32)
    for number, file in enumerate(chosen):
        values[number] = isolation.run("depth_picture", (isolation.File(str(file)), (height, width), file.name))
    return values, "disparity" if is_disparity else "z_depth"


def files_in(folder: str | Path) -> list[Path]:
    """Return the pictures of a local folder of depth, in the order of the numbers in their names."""
    found = [file for file in storage.local_path(folder).iterdir() if file.suffix in SUFFIXES]
    return [found[place] for place in text.in_natural_order([file.name for file in found])]


def check_pixels(count: int) -> None:
    """Raise ValueError if the maps of a clip have more than MAX_PIXELS together; called before they are read."""
    if count > MAX_PIXELS:
        raise ValueError(f"the maps of the clip have {count} pixels together, more than {MAX_PIXELS}")


def _size(file: Path) -> tuple[int, int]:
    """Read (height, width) from a picture's header, and check that the file is not too large for that size."""
    try:
        with storage.open_read(file) as opened:
            data, num_bytes = opened.read(exr.HEADER_BYTES), opened.seek(0, os.SEEK_END)
    except OSError as error:
        raise BadSample("unreadable", f"{file.name}: {error.strerror}") from error
    height, width = _png_size(data, file.name) if file.suffix == ".png" else _exr_size(data, file.name)
    if not 0 < width <= MAX_SIDE_PX or not 0 < height <= MAX_SIDE_PX:
        raise BadSample("depth_shape", f"{file.name} has {width} × {height} px")
    if num_bytes > 8 * height * width + MAX_EXTRA_BYTES:
        raise BadSample("depth_shape", f"{file.name} has {num_bytes} bytes for {width} × {height} px")
    return height, width


def _png_size(data: bytes, name: str) -> tuple[int, int]:
    if len(data) < HEADER_BYTES or data[:8] != b"\x89PNG\r\n\x1a\n":
        raise BadSample("depth_shape", f"{name} is not a PNG")
    width, height, bits, colour = struct.unpack(">IIBB", data[16:HEADER_BYTES])
    if bits != 16 or colour != 0:
        raise BadSample(
            "depth_shape", f"{name} is not a 16-bit grey PNG in millimetres: it has {bits} bits per channel"
        )
    return height, width


def _exr_size(data: bytes, name: str) -> tuple[int, int]:
    try:
        return exr.header(data).size
    except ValueError as error:
        raise BadSample("depth_shape", f"{name} {error}") from None


def picture(file: IO[bytes], size: tuple[int, int], name: str) -> np.ndarray:
    """Decode one picture of a known size to uint16, float16 or float32 [H, W]; runs in the sandboxed child.

    Raises:
        BadSample: depth_shape, decode_error.
    """
    data = file.read()
    if name.endswith(".exr"):
        return exr_values(data, size, name)
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.shape != size:
        raise BadSample("depth_shape", f"{name} cannot be decoded")
    return image


def exr_values(data: bytes, size: tuple[int, int] | None, name: str) -> np.ndarray:
    """Decode an OpenEXR, of a known size unless that is None, to float16 or float32 [H, W]; runs in the child.

    Raises:
        BadSample: depth_shape, decode_error.
    """
    try:
        if max(exr.header(data[: exr.HEADER_BYTES]).size) > MAX_SIDE_PX:
            raise ValueError("is too large")
        values = exr.picture(data)
    except ValueError as error:
        raise BadSample("depth_shape", f"{name} {error}") from None
    if size is not None and values.shape != size:
        raise BadSample("depth_shape", f"{name} is {list(values.shape)}, not {list(size)}")
    return values
