"""Holes in measured depth: pixels for which a Kinect, LiDAR or stereo camera has no value (0, NaN or inf)."""

from __future__ import annotations

import numpy as np

from ex4d.errors import BadSample


def valid_mask(values: np.ndarray, kind: str) -> np.ndarray:
    """Return bool [T, H, W], True where there is a value. A disparity of 0 is a value: the farthest.

    Args:
        values: float32 [T, H, W] as stored in a file.
        kind: "z_depth" or "disparity".
    """
    valid = np.isfinite(values)
    return valid & (values != 0) if kind == "z_depth" else valid


def close(values: np.ndarray, kind: str, valid: np.ndarray, fill_px: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fill holes; return (values, finite everywhere; valid bool [T, H, W], to which holes up to `fill_px` are added).

    A hole takes the farther of the values to its left and right: what a sensor cannot see beside an edge belongs to
    the background. The mesh stays watertight there, but invalid pixels are neither shown nor used as texture.

    Args:
        fill_px: largest width of a hole that becomes valid, as a whole or not at all; 0: none.

    Raises:
        BadSample: depth_holes: a frame has no value at all.
    """
    empty = np.flatnonzero(~valid.any(axis=(1, 2)))
    if len(empty):
        raise BadSample("depth_holes", f"frame {empty[0]} of the clip has no depth at all, only 0, NaN or inf")
    values = values.copy()
    for t in np.flatnonzero(~valid.all(axis=(1, 2))):
        values[t] = _filled(values[t], valid[t], np.maximum if kind == "z_depth" else np.minimum)
    if fill_px:
        valid = np.stack([one | _narrow(~one, fill_px) for one in valid])
    return values, valid


def _filled(image: np.ndarray, valid: np.ndarray, farther: np.ufunc) -> np.ndarray:
    """Fill holes of [H, W] with the farther neighbour in their row; rows without values take the nearest value."""
    from scipy.ndimage import distance_transform_edt

    columns = np.arange(image.shape[1])
    left = np.maximum.accumulate(np.where(valid, columns, -1), axis=1)
    right = np.minimum.accumulate(np.where(valid, columns, image.shape[1])[:, ::-1], axis=1)[:, ::-1]
    rows = np.asarray(valid.any(axis=1))
    left, right = np.where(left < 0, right, left)[rows], np.where(right >= image.shape[1], left, right)[rows]
    beside = (np.take_along_axis(image[rows], side, axis=1) for side in (left, right))
    out = image.copy()
    out[rows] = np.where(valid[rows], image[rows], farther(*beside))
    if not rows.all():
        known = np.broadcast_to(rows[:, None], image.shape)
        out = out[tuple(distance_transform_edt(~known, return_distances=False, return_indices=True))]
    return out


def _narrow(hole: np.ndarray, width_px: int) -> np.ndarray:
    """Return bool [H, W]: the holes in which no square of more than `width_px` fits."""
    import cv2

    count, labels = cv2.connectedComponents(hole.astype(np.uint8), connectivity=8)
    side = width_px + 1
    core = np.asarray(cv2.erode(hole.astype(np.uint8), np.ones((side, side), np.uint8), borderValue=0), bool)
    narrow = np.ones(count, bool)
    narrow[np.asarray(labels)[core]] = False
    return np.logical_and(hole, narrow[np.asarray(labels)])
