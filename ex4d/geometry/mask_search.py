"""Search the extent of a camera path at which a mask has a given share of holes, on small pictures first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ex4d.geometry.mask_scene import Scene
from ex4d.geometry.visibility import erode_all, erode_by, erosion_side, kept_share

STEPS = 6  # of a bisection
CLOSE_ENOUGH = 0.03  # to the target share of holes; the search continues while it is farther off
CORRECTIONS = 4  # of the search on small pictures by what the clip gives at full size
PROBES = 3  # frames with the most holes; the search looks at these alone until it is close


def missed(visible: np.ndarray, target: float) -> float:
    """Return the share of holes in the fullest frame of bool [T, H, W], less the target."""
    return float(1 - kept_share(visible).min()) - target


@dataclass(frozen=True)
class Aimed:
    """A path w2c [T, 4, 4], and by how much its fullest frames miss the target with this erosion."""

    w2c: np.ndarray
    erosion_px: int
    error: float


def aim(
    scene: Scene, path: Callable[[float], np.ndarray], kind: str, target: float, erosion_px: int, tolerance: float
) -> Aimed:
    """Return the extent of a path whose fullest frames come closest to the target share of holes.

    It is searched on four frames of small pictures, and the aim is corrected by the frames with the most holes at full
    size.
    """
    small, wanted, found = scene.small(), target, []
    for _ in range(CORRECTIONS):
        w2c, off = _search(small, path, kind, wanted, erosion_px, tolerance)
        fullest = _fullest(small, w2c, kind, erosion_px, tolerance)
        error = missed(erode_all(scene.views(fullest, w2c, kind, tolerance), erosion_px), target)
        found.append(Aimed(w2c, erosion_px, abs(error)))
        if abs(error) <= CLOSE_ENOUGH or off > CLOSE_ENOUGH:  # there, or the path cannot go further
            break
        wanted = min(max(wanted - error, 0.0), 1.0)
    return min(found, key=lambda aimed: aimed.error)


def _search(
    small: Scene, path: Callable[[float], np.ndarray], kind: str, wanted: float, erosion_px: int, tolerance: float
) -> tuple[np.ndarray, float]:
    """Return (w2c [T, 4, 4], how far off its share of holes is) of the extent that comes closest to the wanted one."""
    last = len(small.frames) - 1
    moments = sorted({(last + 1) // 4, (last + 1) // 2, 3 * (last + 1) // 4, last})
    best, least = path(1.0), np.inf
    low, high, extent = 0.0, 1.0, 1.0
    for _ in range(STEPS):
        w2c = path(extent)
        error = float(1 - _share_left(small, small.views(moments, w2c, kind, tolerance), erosion_px).min()) - wanted
        if abs(error) < least:
            best, least = w2c, abs(error)
        if least < CLOSE_ENOUGH / 3 or (extent == 1.0 and error < 0):
            break
        low, high = (extent, high) if error < 0 else (low, extent)
        extent = (low + high) / 2
    return best, least


def _fullest(small: Scene, w2c: np.ndarray, kind: str, erosion_px: int, tolerance: float) -> list[int]:
    """Return the PROBES frames that have the largest share of holes on the small pictures."""
    left = _share_left(small, small.views(range(1, len(w2c)), w2c, kind, tolerance), erosion_px)
    return sorted(1 + int(index) for index in np.argsort(left, kind="stable")[:PROBES])


def _share_left(scene: Scene, visible: np.ndarray, erosion_px: int) -> np.ndarray:
    """Return float64 [T], the shares that the masks of a scene keep once they are eroded at full size.

    On small pictures the square is smaller than a pixel. What it takes is then a part of what one pixel's rim takes.
    """
    if scene.step == 1:
        return kept_share(erode_all(visible, erosion_px))
    side = erosion_side(erosion_px, [scene.step * length for length in visible.shape[1:]])
    whole, rim = kept_share(visible), kept_share(erode_by(visible, 3))
    return whole - max(0, side - 1) / (2 * scene.step) * (whole - rim)
