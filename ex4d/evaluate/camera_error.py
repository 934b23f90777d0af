"""Measure how far the camera of a generated video deviates from the requested path.

The mesh gives the position of each visible point and where the requested camera would show it. Optical flow from that
picture to the generated one gives where the point is shown, and the pose that explains this (PnP with RANSAC) gives the
error. No network is used, so it works on any video at any size that suits optical flow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ex4d.evaluate.views import View
from ex4d.geometry import tracks
from ex4d.geometry.camera import Camera, unproject
from ex4d.geometry.masks import erode
from ex4d.geometry.mesh import build
from ex4d.geometry.render import render

NEAR_DEG = 2.0
MIN_POINTS = 30  # points that must agree on a pose
MIN_SHARE = 0.4  # of the visible points must agree as well: fewer do if flow confuses textures
MAX_POINTS = 2000
# Generated pictures are soft. In the demo (96 px, orbit 30°, six scenes) these thresholds find 65 % of the cameras with
# the adapter, 100 % with the codec, 6 % with the base, none under another clip's condition or in noise (38 % without
# the similarity check). Cameras that are off by 2, 5, 10° are measured as 1.7–1.9, 4.6–4.9, 9.7–9.9°.
TOLERANCE_PX = 1.5  # up to 384 px; beyond that in proportion to the size
MIN_LIKENESS, WINDOW_PX = 0.5, 21
MARGIN_PX = 9  # closer to a hole than this, flow follows the hole (measured at 512 px)


@dataclass(frozen=True)
class CameraError:
    """Camera error of each frame but the first; NaN where no pose was found.

    Attributes:
        rotation_deg: float64 [T-1], angle between the found and the requested camera.
        translation: float64 [T-1], distance of their centres as a share of the radius.
        flow_px: float64 [T-1], median distance of a visible point from where it should be shown.
    """

    rotation_deg: np.ndarray
    translation: np.ndarray
    flow_px: np.ndarray

    def summary(self) -> dict[str, float | None]:
        """Return `cameras_found` and `cameras_near`, shares of all frames, and medians over the found ones.

        A camera with a large error is seldom found, so read the medians with the shares. Near means found and within
        NEAR_DEG.
        """
        if not len(self.rotation_deg):
            return dict.fromkeys(("cameras_near", "cameras_found", "rotation_deg", "translation", "flow_px"))
        return {
            "cameras_near": float((self.rotation_deg <= NEAR_DEG).mean()),
            "cameras_found": float(np.isfinite(self.rotation_deg).mean()),
            "rotation_deg": _median(self.rotation_deg),
            "translation": _median(self.translation),
            "flow_px": _median(self.flow_px),
        }


def camera_error(view: View, frames: np.ndarray) -> CameraError:
    """Return the error of the camera of `frames` uint8 [T, H, W, 3] against the path of `view`."""
    rows = [_frame_error(view, index, frames[index]) for index in range(1, len(frames))]
    return CameraError(*np.array(rows, np.float64).reshape(-1, 3).T)


def _frame_error(view: View, index: int, frame: np.ndarray) -> tuple[float, float, float]:
    import cv2

    lost, clip = 3 * (float("nan"),), view.clip
    height, width = frame.shape[:2]
    K = view.view_K[index]
    valid = None if clip.valid_mask is None else clip.valid_mask[index]
    picture = render(
        build(clip.frames[index], clip.z_depth[index], clip.K, clip.profile, valid=valid),
        Camera(K, view.w2c[index], (height, width)),
        view.backend,
    )
    # Holes hold generated content, which has nothing to be compared with.
    shown = np.where(picture.visible_mask[..., None], picture.colour, frame)
    flows = tracks.pair_flows(np.stack([shown, frame]))
    tolerance_px = TOLERANCE_PX * max(1.0, min(height, width) / 384)
    agree = tracks.consistency(flows[0, 1], flows[1, 0]) <= tolerance_px
    agree &= _likeness(shown, tracks.sample(frame, flows[0, 1]), picture.visible_mask) >= MIN_LIKENESS
    rows, columns = np.nonzero(erode(picture.visible_mask[None], MARGIN_PX)[0])
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MAX_POINTS)).astype(int)
    needed = max(MIN_POINTS, MIN_SHARE * len(chosen))
    rows, columns = rows[chosen], columns[chosen]
    rows, columns = rows[agree[rows, columns]], columns[agree[rows, columns]]
    if len(rows) < MIN_POINTS:
        return lost
    moved = flows[0, 1][rows, columns].astype(np.float64)
    points = unproject(picture.z_depth, K)[rows, columns]  # in the axes of the requested camera
    places = np.stack([columns, rows], axis=-1) + 0.5 + moved
    cv2.setRNGSeed(0)
    is_solved, turn, shift, inliers = cv2.solvePnPRansac(
        points, places, K, None, reprojectionError=tolerance_px, iterationsCount=300
    )
    if not is_solved or inliers is None or len(inliers) < needed:
        return lost
    agreed = inliers[:, 0]
    turn, shift = cv2.solvePnPRefineLM(points[agreed], places[agreed], K, None, turn, shift)
    centre = cv2.Rodrigues(turn)[0].T @ shift
    flow_px = float(np.median(np.linalg.norm(moved, axis=-1)))
    return float(np.degrees(np.linalg.norm(turn))), float(np.linalg.norm(centre)) / clip.radius, flow_px


def _likeness(a: np.ndarray, b: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return float32 [H, W] in [-1, 1]: the correlation of two pictures uint8 [H, W, 3] around each pixel; 0 if flat.

    Flow between unrelated pictures is small, smooth and consistent; it must not be mistaken for camera motion.

    Args:
        counted: bool [H, W], pixels to compare.
    """
    import cv2

    grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32) for picture in (a, b)]
    weight = counted.astype(np.float32)
    total = np.maximum(cv2.blur(weight, (WINDOW_PX, WINDOW_PX)), 1e-6)

    def mean(values: np.ndarray) -> np.ndarray:
        return cv2.blur(values * weight, (WINDOW_PX, WINDOW_PX)) / total

    first, second = (values - mean(values) for values in grey)
    energy = np.sqrt(mean(first**2) * mean(second**2))
    return np.where(energy > 1, mean(first * second) / np.maximum(energy, 1), 0)


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None
