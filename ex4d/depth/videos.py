"""Read depth from an 8-bit grey video as DepthCrafter writes it: relative disparity, 255 nearest. Walls show steps.

Nothing in such a file says whether near is bright. This is assumed, so a video is read only if `depth_path` names it or
its folder, never because it lies beside the source.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

import numpy as np

from ex4d import isolation, storage
from ex4d.depth import pictures
from ex4d.errors import BadSample

SUFFIXES = (".depth.mp4", "_depth.mp4", ".depth.mkv", "_depth.mkv")
MAX_COLOUR = 4.0  # mean difference of a pixel's channels, of 255: coding noise is below, a colour map far above


def read(path: str, choose: Callable[[int, float | None], np.ndarray]) -> np.ndarray:
    """Read disparity float32 [T, H, W], 0 to 255, decoded in the isolated child.

    Args:
        choose: (number of maps, their rate, None if it is not constant) → indices of the maps to read.

    Raises:
        BadSample: depth_missing (not local), depth_shape (too large, or coloured), depth_frames, the decoder's.
    """
    if not storage.is_local(path):
        raise BadSample("depth_missing", f"{PurePosixPath(path).name}: depth videos are read only from a local folder")
    name, file = PurePosixPath(path).name, isolation.File(str(storage.local_path(path)))
    height, width = isolation.run("probe", (file,)).size
    pts, time_base = isolation.run("frame_pts", (file,))
    steps = np.diff(pts)
    even = len(steps) > 0 and int(steps.max()) - int(steps.min()) <= max(1, 0.1 * float(np.median(steps)))
    rate = float((len(pts) - 1) / ((int(pts[-1]) - int(pts[0])) * time_base)) if even else None
    index = choose(len(pts), rate)
    try:
        pictures.check_pixels(3 * len(index) * height * width)
    except ValueError as error:
        raise BadSample("depth_shape", f"{name}: {error}") from None
    images = isolation.run("decode", (file, pts[index]))
    if float(np.ptp(images[:, ::2, ::2], axis=-1).mean()) > MAX_COLOUR:
        raise BadSample("depth_shape", f"{name} is colour-mapped depth; only grey disparity is read")
    return images.mean(axis=-1, dtype=np.float32)
