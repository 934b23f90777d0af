"""How far apart two sets of pictures or videos are, by a network's features: the distance behind FID and FVD."""

from __future__ import annotations

import numpy as np


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the squared Fréchet distance of the Gaussians fitted to two sets of features.

    |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) (Dowson and Landau 1982; Heusel et al. 2017, eq. 6). It falls
    with the number of samples, so only sets of equal size compare: the number belongs beside the figure.

    Args:
        a, b: float [N, D] and [M, D], a row a sample, at least two rows each.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"[N, D] and [M, D] with N, M >= 2, not {a.shape} and {b.shape}")
    mean = a.mean(axis=0) - b.mean(axis=0)
    # tr (C_a C_b)^½ is the sum of the singular values of A Bᵀ where C = Aᵀ A: exact also where there are fewer samples
    # than features, where a square root of the product is not. R of A = Q R does as well as A, and has D rows at most.
    rows_a, rows_b = _factor(a), _factor(b)
    cross = np.linalg.svd(rows_a @ rows_b.T, compute_uv=False).sum()
    return float(max(0.0, mean @ mean + (rows_a**2).sum() + (rows_b**2).sum() - 2 * cross))


def _factor(rows: np.ndarray) -> np.ndarray:
    """Return R [min(N, D), D] with RᵀR the covariance of rows [N, D]."""
    centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))
