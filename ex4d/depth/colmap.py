"""Estimate the cameras of a clip by COLMAP, from points tracked by optical flow.

COLMAP (pycolmap) verifies the matches, registers the frames one by one and bundle-adjusts them, with the focal length.
It runs in a worker process of this Python (`depth.foreign`): a crash or a hang costs one clip. Its own features (SIFT)
are not used: smooth texture yields too few (docs/decisions/source_cameras.md).
"""

from __future__ import annotations

import importlib.util
import sys

import numpy as np

from ex4d.depth import bundle, foreign
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import invert, nearest_rigid
from ex4d.geometry.pose_file import check_poses

PACKAGE = "pycolmap"
SEED = 0
# A focal length that COLMAP moves by more than this factor is a wrong local minimum: the start value is then kept.
MAX_FOCAL_CHANGE = 1.05


def check() -> None:
    """Raise ConfigError unless the package is installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError("cameras", "colmap", f"needs {PACKAGE}: pip install 'ex4d-platform[colmap]'")


def cameras(matches: bundle.Matches, size: tuple[int, int], focal: float, seek_focal: bool) -> tuple[np.ndarray, float]:
    """Estimate (w2c float64 [T, 4, 4] of arbitrary scale, the first the identity; focal length in px).

    Args:
        matches: of static surfaces.
        size: (H, W) px.
        focal: px, start of the search; kept unless `seek_focal`, and if the search ends far away.

    Raises:
        BadSample: cameras_missing: COLMAP does not register every frame, or gives an invalid pose; the reasons of
            `foreign.ask`.
    """
    w2c, found_focal = _answer(matches, (size[1], size[0], focal, seek_focal, SEED))
    if seek_focal and not 1 / MAX_FOCAL_CHANGE < found_focal / focal < MAX_FOCAL_CHANGE:
        return _answer(matches, (size[1], size[0], focal, False, SEED))
    return w2c, found_focal


def _answer(matches: bundle.Matches, lens: tuple[float, ...]) -> tuple[np.ndarray, float]:
    """Call `adapters/colmap.py` with its argument `lens`, and return the checked answer."""
    arrays = {"places": matches.places, "pairs": matches.pairs, "targets": matches.targets, "weights": matches.weights}
    arrays["lens"] = np.array(lens, np.float64)
    adapter = str(foreign.ADAPTERS / "colmap.py")
    message, found = foreign.ask(sys.executable, adapter, {}, arrays, foreign.SMALL_BYTES)
    if "error" in message:
        raise BadSample("cameras_missing", str(message["error"]).removeprefix("RuntimeError: ")[:300])
    w2c, K = found.get("w2c", np.empty(0)), found.get("K", np.empty(0))
    if w2c.shape != (matches.num_frames, 4, 4) or K.shape != (3, 3):
        raise BadSample("depth_worker_answer", f"w2c is {list(w2c.shape)} and K {list(K.shape)}")
    try:
        check_poses(w2c.astype(np.float64))
    except ValueError as error:
        raise BadSample("cameras_missing", f"COLMAP: {error}") from None
    if not 0 < float(K[0, 0]) < np.inf:
        raise BadSample("depth_worker_answer", f"a focal length of {K[0, 0]:.3g}")
    w2c = nearest_rigid(w2c.astype(np.float64))
    return w2c @ invert(w2c[0]), float(K[0, 0])
