"""Compute the Fréchet distance between two sets of pictures or videos from a network's features, as in FID and FVD."""

from __future__ import annotations

import numpy as np


class Gaussian:
    """Exact running mean and covariance of feature rows, stored in at most 2 D rows.

    Attributes:
        count: rows so far.
        mean: float64 [D].
        factor: float64 [at most 2 D, D]; factorᵀ factor is the scatter, (count - 1) × the covariance. This
            stays exact with fewer rows than features, where a D × D matrix would be singular.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.factor = 0, np.zeros(0), np.zeros((0, 0))

    def add(self, rows: np.ndarray) -> None:
        """Add rows [N, D] of finite numbers, N at least 1."""
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(axis=0)
        if not self.count:
            self.count, self.mean, self.factor = len(rows), mean, rows - mean
            return
        total = self.count + len(rows)
        between = np.sqrt(self.count * len(rows) / total) * (self.mean - mean)  # Chan et al. 1983
        factor = np.vstack([self.factor, rows - mean, between])
        self.mean = (self.count * self.mean + len(rows) * mean) / total
        self.count = total
        # R of factor = Q R has the same scatter in only D rows.
        self.factor = np.asarray(np.linalg.qr(factor, mode="r")) if len(factor) > 2 * len(mean) else factor


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the squared Fréchet distance between two Gaussians, each of at least two rows.

    |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) (Dowson and Landau 1982; Heusel et al. 2017, eq. 6). It decreases
    with the number of samples, so compare only sets of equal size, and state that size.
    """
    if a.mean.shape != b.mean.shape or min(a.count, b.count) < 2:
        raise ValueError(
            f"needs two rows of equal width, not {a.count} of {a.mean.shape} and {b.count} of {b.mean.shape}"
        )
    mean = a.mean - b.mean
    # tr (C_a C_b)^½ is the sum of the singular values of A Bᵀ where C = Aᵀ A.
    rows_a, rows_b = (one.factor / np.sqrt(one.count - 1) for one in (a, b))
    cross = np.linalg.svd(rows_a @ rows_b.T, compute_uv=False).sum()
    return float(max(0.0, mean @ mean + (rows_a**2).sum() + (rows_b**2).sum() - 2 * cross))
