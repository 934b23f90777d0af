"""Convert an estimator's z-depth or disparity to one bounded, positive z_depth for a clip; align frames."""

from __future__ import annotations

import numpy as np

from ex4d.errors import BadSample, ConfigError

KINDS = ("z_depth", "disparity")
RELEASED_NEAR = 10000 / 3900  # the released code's nearest depth of every clip, 2.564
NEAREST = 4.0  # relative disparity beyond this × its near percentile is an outlier and is clipped
# The released code's mapping of DepthCrafter's output, as keyword arguments of to_z_depth: min-max, z up to 10,000.
RELEASED_MAPPING = {"percentiles": (0.0, 100.0), "far_ratio": 3900.0}


def to_z_depth(
    values: np.ndarray,
    kind: str,
    *,
    metric: bool = False,
    percentiles: tuple[float, float] = (1.0, 99.0),
    far_ratio: float = 100.0,
) -> np.ndarray:
    """Convert depth to z_depth float32 [T, H, W]: finite, positive, at most `far_ratio` × the near depth.

    Disparity has a lower bound, which gives sky a finite depth that fits into the mesh. Percentiles, unlike the clip's
    minimum and maximum, keep one outlier pixel from rescaling the whole clip. Metric values are not clipped at the
    near end; relative ones are clipped at a quarter of the near depth.

    Args:
        values: real [T, H, W]; z_depth > 0 (+inf: sky), or disparity (metric: 1/z ≥ 0; else up to scale and shift).
        kind: "z_depth" or "disparity".
        metric: disparity is exactly 1/z. Else its percentiles are mapped to [0, 1] and z = 2.564 / that value, the
            scale of the released code.
        percentiles: (far, near) percentiles over the clip of a relative disparity; `near` also sets the near depth of
            metric values, to which `far_ratio` refers.
        far_ratio: largest depth / near depth.

    Raises:
        ConfigError: unknown kind.
        BadSample: depth_shape, depth_nan (NaN, or infinite disparity), depth_nonpositive, depth_constant.
    """
    if kind not in KINDS:
        raise ConfigError("depth.kind", kind, f"one of {', '.join(KINDS)}")
    low, high = percentiles
    values = _checked(values, kind, metric)
    if kind == "z_depth" or metric:
        disparity = 1.0 / values if kind == "z_depth" else values
        near = np.percentile(disparity, high)
        if near <= 0:
            raise BadSample("depth_constant", f"{high:g} % of the disparity is zero")
        return (1.0 / np.maximum(disparity, near / far_ratio)).astype(np.float32)
    far, near = np.percentile(values, [low, high])
    if near <= far:
        raise BadSample("depth_constant", f"percentiles {low:g} and {high:g} are both {far:.6g}")
    normalised = np.clip((values - far) / (near - far), 1.0 / far_ratio, NEAREST)
    return (RELEASED_NEAR / normalised).astype(np.float32)


def _checked(values: np.ndarray, kind: str, metric: bool) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 3 or min(values.shape, default=0) < 1 or min(values.shape[1:]) < 2:
        raise BadSample("depth_shape", f"{list(values.shape)}, expected [T, H, W] with H, W at least 2")
    if values.dtype.kind not in "fiu":
        raise BadSample("depth_shape", f"dtype {values.dtype}, expected real numbers")
    values = values.astype(np.float64)
    bad = np.isnan(values) if kind == "z_depth" else ~np.isfinite(values)
    if bad.any():
        raise BadSample("depth_nan", f"{bad.sum()} of {bad.size} values are not numbers")
    nonpositive = values <= 0 if kind == "z_depth" else values < 0
    if (kind == "z_depth" or metric) and nonpositive.any():
        raise BadSample("depth_nonpositive", f"{nonpositive.sum()} of {values.size} values, least {values.min():.6g}")
    varying = 1 / values if kind == "z_depth" else values  # the inverse, because sky may be at infinity
    largest, least = varying.max(), varying.min()
    if largest - least <= 1e-6 * max(abs(largest), abs(least)):
        raise BadSample("depth_constant", f"all values are {values.flat[0]:.6g}")
    return values


def align_scale_shift(source: np.ndarray, target: np.ndarray, positive_scale: bool = True) -> tuple[float, float]:
    """Return (scale, shift) that minimise Σ (scale · source + shift − target)² (Ranftl et al. 2020, MiDaS, eq. 4).

    Args:
        source, target: real arrays of one shape, in the same quantity (disparity for relative estimators); values that
            are not finite are ignored.
        positive_scale: reject a scale that is not positive: a negative one would swap near and far.

    Raises:
        BadSample: depth_shape; depth_constant if fewer than two values are finite, the source does not vary over them,
            or the scale is rejected.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape:
        raise BadSample("depth_shape", f"{list(source.shape)} against {list(target.shape)}")
    keep = np.isfinite(source) & np.isfinite(target)
    x, y = source[keep], target[keep]
    spread = x - x.mean() if x.size else x
    variance = float(spread @ spread)
    if x.size < 2 or variance <= 1e-12 * float(x @ x):
        raise BadSample("depth_constant", "nothing varies, so no scale can be estimated")
    scale = float(spread @ (y - y.mean())) / variance
    if positive_scale and scale <= 0:
        raise BadSample("depth_constant", f"the best scale is {scale:.3g}: the two are not related")
    return scale, float(y.mean() - scale * x.mean())


def align_clip(disparity: np.ndarray, num_rounds: int = 5) -> np.ndarray:
    """Align the frames of disparity [T, H, W] to the scale and shift of frame 0; float32.

    For networks that process one frame at a time. Each frame is fitted to its aligned predecessor on the pixels that
    agree (within 3 median residuals, selected again `num_rounds` times), so that moving objects do not bias the fit.
    The scale is the ratio of the spreads (reduced major axis): noise biases the scale of a least-squares fit towards
    zero, and the bias would compound from frame to frame.

    Args:
        disparity: real [T, H, W], each frame up to its own scale and shift.

    Raises:
        BadSample: depth_shape, depth_nan, depth_constant.
    """
    values = _checked(disparity, "disparity", False)
    aligned = values.copy()
    for t in range(1, len(values)):
        source, target = values[t], aligned[t - 1]
        scale, shift = align_scale_shift(source, target)
        for _ in range(num_rounds):
            residual = np.abs(scale * source + shift - target)
            keep = residual <= max(3 * float(np.median(residual)), 1e-12 * float(np.abs(target).max()))
            spread = float(source[keep].std())
            if spread <= 1e-9 * float(np.abs(source).max()):
                raise BadSample("depth_constant", f"frame {t} does not vary where it agrees with frame {t - 1}")
            scale = float(target[keep].std()) / spread
            shift = float(target[keep].mean() - scale * source[keep].mean())
        aligned[t] = scale * source + shift
    return aligned.astype(np.float32)


def as_grey(z_depth: np.ndarray) -> np.ndarray:
    """Return pictures uint8 [T, H, W] of z_depth [T, H, W] > 0: disparity, near bright, one scale for the clip."""
    disparity = 1.0 / np.maximum(z_depth, 1e-6)
    low, high = np.percentile(disparity, [1, 99])
    return (np.clip((disparity - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
