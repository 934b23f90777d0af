"""Score a clip's depth: its jitter, the drift of its scale, and its share of sky."""

from __future__ import annotations

import numpy as np

from ex4d.geometry.tracks import consistency, pair_flows, sample
from ex4d.quality.pictures import shrink, spread

SIDE = 128
TRIPLES = 6
AGREE_PX = 0.5  # forward and backward flow must agree to within this, else a pixel is not tracked
MIN_SHARE = 0.05  # least tracked share of the picture
MEDIAN_OF_SECOND = 1.652  # median of |a − 2 b + c| of three normal numbers, 0.6745 · √6, in their standard deviations
SKY_RATIO = 20.0


def measure(frames: np.ndarray, z_depth: np.ndarray) -> dict[str, float]:
    """Measure {"depth_flicker", "depth_drift", "sky"} of a clip.

    depth_flicker: about the standard deviation of the frame-to-frame noise in log depth: the median over pixels of
    the second difference of log depth along the flow, to which steady motion of bodies and cameras does not
    contribute. depth_drift: the log change of the depth's scale over the clip, relative to the picture: if a surface
    comes nearer by some fraction, the flow around it expands by the same. sky: share of pixels farther than
    SKY_RATIO × the near depth (1st percentile of the clip).

    Args:
        frames: uint8 [T,H,W,3] RGB.
        z_depth: float32 [T,H,W], > 0.
    """
    import cv2

    near = float(np.percentile(z_depth[:, ::4, ::4], 1))
    sky = float((z_depth > SKY_RATIO * near).mean())
    small, log_depth = shrink(frames, SIDE), np.log(z_depth.astype(np.float32))
    flickers, drifts = [], []
    for first in spread(max(0, len(frames) - 2), TRIPLES):
        triple = slice(first, first + 3)
        logs = [cv2.resize(log, small.shape[2:0:-1], interpolation=cv2.INTER_AREA) for log in log_depth[triple]]
        change = _triple(small[triple], np.stack(logs))
        if change is not None:
            flickers.append(change[0])
            drifts.append(change[1])
    flicker = float(np.mean(flickers)) if flickers else 0.0
    drift = abs(float(np.mean(drifts))) * (len(frames) - 1) if drifts else 0.0
    return {"depth_flicker": flicker, "depth_drift": drift, "sky": sky}


def _triple(frames: np.ndarray, logs: np.ndarray) -> tuple[float, float] | None:
    """Return (flicker, drift per frame) of three frames, in pixels of the middle one; None if too little is tracked."""
    flows = pair_flows(frames)
    back, forth = flows[1, 0], flows[1, 2]
    followed = (consistency(back, flows[0, 1]) < AGREE_PX) & (consistency(forth, flows[2, 1]) < AGREE_PX)
    if followed.mean() < MIN_SHARE:
        return None
    before, after = sample(logs[0], back), sample(logs[2], forth)
    second = np.abs(before + after - 2 * logs[1])[followed]
    # From the middle to the last and from the middle to the first frame: two measurements of the same motion.
    grown = after - logs[1] + _spreading(forth)
    shrunk = before - logs[1] + _spreading(back)
    drift = (np.median(grown[followed]) - np.median(shrunk[followed])) / 2
    return float(np.median(second)) / MEDIAN_OF_SECOND, float(drift)


def _spreading(flow: np.ndarray) -> np.ndarray:
    """Return half the divergence of flow [h,w,2], float32 [h,w]: the local relative growth of the picture."""
    import cv2

    smooth = cv2.GaussianBlur(flow, (0, 0), 2.0)
    along_x = cv2.Sobel(smooth[..., 0], cv2.CV_32F, 1, 0, scale=1 / 8)
    along_y = cv2.Sobel(smooth[..., 1], cv2.CV_32F, 0, 1, scale=1 / 8)
    return (along_x + along_y) / 2
