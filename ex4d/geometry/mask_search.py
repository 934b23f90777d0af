"""Find the extent of a camera path at which a mask has a given share of holes, by a search on small pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ex4d.geometry.mask_scene import Scene
from ex4d.geometry.visibility import erode_all, erode_by, erosion_side, kept_share

STEPS = 6  # steps of a bisection
CLOSE_ENOUGH = 0.03  # largest error of the share of holes at which the search stops
CORRECTIONS = 4  # number of searches on small pictures, each corrected by the error of the last at full size
PROBES = 3  # number of frames, those with the most holes, whose error is measured at full size


def missed(visible: np.ndarray, target: float) -> float:
    """Return the largest share of holes of any frame of bool [T, H, W], minus the target."""
    return float(1 - kept_share(visible).min()) - target


@dataclass(frozen=True)
class Aimed:
    """A path w2c [T, 4, 4], an erosion, and the absolute error of the share of holes that they give."""

    w2c: np.ndarray
    erosion_px: int
    error: float


def aim(
    scene: Scene, path: Callable[[float], np.ndarray], kind: str, target: float, erosion_px: int, tolerance: float
) -> Aimed:
    """Search the extent of a path at which the largest share of holes of any frame comes closest to the target.

    The search uses four frames of small pictures. Its target is corrected by the error that the frames with the most
    holes have at full size.
    """
    small, wanted, found = scene.small(), target, []
    for _ in range(CORRECTIONS):
        w2c, off = _search(small, path, kind, wanted, erosion_px, tolerance)
        fullest = _fullest(small, w2c, kind, erosion_px, tolerance)
        error = missed(erode_all(scene.views(fullest, w2c, kind, tolerance), erosion_px), target)
        found.append(Aimed(w2c, erosion_px, abs(error)))
        if abs(error) <= CLOSE_ENOUGH or off > CLOSE_ENOUGH:  # reached, or out of the path's range
            break
        wanted = min(max(wanted - error, 0.0), 1.0)
    return min(found, key=lambda aimed: aimed.error)


def _search(
    small: Scene, path: Callable[[float], np.ndarray], kind: str, wanted: float, erosion_px: int, tolerance: float
) -> tuple[np.ndarray, float]:
    """Bisect the extent; return (w2c [T, 4, 4], absolute error) of the share of holes closest to `wanted`."""
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
    """Return the PROBES frames with the largest share of holes, as measured on the small pictures."""
    left = _share_left(small, small.views(range(1, len(w2c)), w2c, kind, tolerance), erosion_px)
    return sorted(1 + int(index) for index in np.argsort(left, kind="stable")[:PROBES])


def _share_left(scene: Scene, visible: np.ndarray, erosion_px: int) -> np.ndarray:
    """Return float64 [T]: the share of each mask of a scene that erosion at full size keeps.

    On small pictures the eroding square is smaller than a pixel; its effect is a fraction of eroding a one-pixel rim.
    """
    if scene.step == 1:
        return kept_share(erode_all(visible, erosion_px))
    side = erosion_side(erosion_px, [scene.step * length for length in visible.shape[1:]])
    whole, rim = kept_share(visible), kept_share(erode_by(visible, 3))
    return whole - max(0, side - 1) / (2 * scene.step) * (whole - rim)
