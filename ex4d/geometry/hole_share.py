"""Measure shares of holes: those of generation on a clip, and how closely training masks match them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ex4d.geometry import trajectory
from ex4d.geometry.mask_scene import Scene
from ex4d.geometry.visibility import kept_share

Paths = tuple[tuple[str, float], ...]  # (name of a trajectory, its angle in degrees)


def generation(scene: Scene, paths: Paths) -> np.ndarray:
    """Return the share of holes of the clip's warp along each path, float32 [len(paths), T]; frame 0 is complete.

    Args:
        scene: a small one, for speed; its meshes are cached.
        paths: the paths of generation, as in `reconstruct --trajectory NAME --angle-deg ANGLE`.
    """
    num_frames = len(scene.frames)
    shares = np.zeros((len(paths), num_frames), np.float32)
    for row, (name, angle_deg) in zip(shares, paths, strict=True):
        w2c = scene.path(trajectory.build(name, num_frames, angle_deg, scene.radius))
        row[1:] = 1 - kept_share(scene.views(range(1, num_frames), w2c, "novel_view", 0.0))
    return shares


def spread(place: np.ndarray, least: float, most: float, peaks: np.ndarray) -> np.ndarray:
    """Return a share in [least, most] for each place in [0, 1]: quantiles of the mixture of `peaks` [G] of generation.

    Each peak stands for 1/G of the masks and is reached in the middle of its part. Between peaks, and from `least` to
    the first, the share rises linearly, so that all shares in between occur. No peaks: uniform.
    """
    if not len(peaks):
        return least + (most - least) * place
    middles = (np.arange(len(peaks)) + 0.5) / len(peaks)
    return np.clip(np.interp(place, [0.0, *middles], [least, *np.sort(peaks)]), least, most)


@dataclass(frozen=True)
class Comparison:
    """Two histograms of the share of holes, and how far apart they are.

    Attributes:
        edges: float64 [B + 1], shares from 0 to 1.
        training, generation: float64 [B], each of sum 1.
        distance: the Wasserstein distance of the two samples: the mean distance by which a share must move.
        percentiles: of training and of generation, float64 [2, 3]: 10, 50 and 90.
    """

    edges: np.ndarray
    training: np.ndarray
    generation: np.ndarray
    distance: float
    percentiles: np.ndarray


def compare(training: np.ndarray, generated: np.ndarray, num_bins: int = 20) -> Comparison:
    """Return how the shares of holes in training masks compare with those of generation.

    Args:
        training: real [..., T], `hole_share` of the masks; generated: real [..., T], of `generation`. Frame 0, which
            is complete in both, is left out.
    """
    from scipy.stats import wasserstein_distance

    first, second = (np.asarray(values, np.float64)[..., 1:].ravel() for values in (training, generated))
    edges = np.linspace(0, 1, num_bins + 1)
    counts = [np.histogram(values, edges)[0] / max(1, values.size) for values in (first, second)]
    percentiles = np.stack([np.percentile(values, [10, 50, 90]) for values in (first, second)])
    return Comparison(edges, counts[0], counts[1], float(wasserstein_distance(first, second)), percentiles)
