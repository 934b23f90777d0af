"""Choose how large the holes of training masks should be: as large as those of generation on the same clip."""

from __future__ import annotations

import numpy as np

from ex4d.geometry import trajectory
from ex4d.geometry.mask_config import Paths
from ex4d.geometry.mask_scene import Scene
from ex4d.geometry.visibility import kept_share


def generation_holes(scene: Scene, paths: Paths) -> np.ndarray:
    """Return the share of holes of the clip's warp along each path, float32 [len(paths), T]; 0 in frame 0.

    Args:
        scene: a small one (`Scene.small`), for speed; its meshes are cached.
        paths: the paths of generation, as in `reconstruct --trajectory NAME --angle-deg ANGLE`.
    """
    num_frames = len(scene.frames)
    shares = np.zeros((len(paths), num_frames), np.float32)
    for row, (name, angle_deg) in zip(shares, paths, strict=True):
        w2c = scene.path(trajectory.build(name, num_frames, angle_deg, scene.radius))
        row[1:] = 1 - kept_share(scene.views(range(1, num_frames), w2c, "novel_view", 0.0))
    return shares


def spread_targets(place: np.ndarray, least: float, most: float, peaks: np.ndarray) -> np.ndarray:
    """Map each place in [0, 1] to a target share in [least, most]: a quantile of generation's `peaks` [G].

    Each peak stands for 1/G of the masks and lies in the middle of its interval. Between peaks, and from `least` to
    the first, the share rises linearly, so that all shares in between occur. No peaks: uniform.
    """
    if not len(peaks):
        return least + (most - least) * place
    middles = (np.arange(len(peaks)) + 0.5) / len(peaks)
    return np.clip(np.interp(place, [0.0, *middles], [least, *np.sort(peaks)]), least, most)
