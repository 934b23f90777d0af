"""Compiled kernels of the visibility mask: where source pixels land in a novel picture, and which of them are seen.

The rule is written out in `visibility.visibility`; tests/geometry/test_visibility_kernels.py has it in numpy.
"""

from __future__ import annotations

import numpy as np

from ex4d.geometry.render.cpu_kernels import kernel

AHEAD = 1e-9  # of the camera's centre, in units of depth


@kernel
def land(z_depth, intrinsics, w2c, u, v, z):
    """Write into u, v, z float64 [H, W] where the novel camera sees each source pixel; u, v = −1 if it is behind it.

    Args:
        z_depth: float32 [H, W]; intrinsics: float64 (fx, fy, cx, cy) of source and target; w2c: float64 [4, 4].
    """
    fx, fy, cx, cy = intrinsics
    for i in range(z_depth.shape[0]):
        ray_y = (i + 0.5 - cy) / fy
        for j in range(z_depth.shape[1]):
            depth = np.float64(z_depth[i, j])
            x, y = (j + 0.5 - cx) / fx * depth, ray_y * depth
            ahead = w2c[2, 0] * x + w2c[2, 1] * y + w2c[2, 2] * depth + w2c[2, 3]
            u[i, j] = v[i, j] = -1.0
            z[i, j] = ahead
            if ahead > AHEAD:
                u[i, j] = (w2c[0, 0] * x + w2c[0, 1] * y + w2c[0, 2] * depth + w2c[0, 3]) / ahead * fx + cx
                v[i, j] = (w2c[1, 0] * x + w2c[1, 1] * y + w2c[1, 2] * depth + w2c[1, 3]) / ahead * fy + cy


@kernel
def mark_good(torn, u, v, z, good):
    """Set good bool [H, W] for pixels with a face that is not torn, lies in front of the camera and keeps its winding.

    Args:
        torn: bool [2, H−1, W−1] by the real depth; good: all False.
    """
    for i in range(torn.shape[1]):
        for j in range(torn.shape[2]):
            # The diagonal's two pixels belong to both faces: b right of a, c below it, d across.
            bu, bv, cu, cv = u[i, j + 1], v[i, j + 1], u[i + 1, j], v[i + 1, j]
            if z[i, j + 1] <= AHEAD or z[i + 1, j] <= AHEAD:
                continue
            au, av, du, dv = u[i, j], v[i, j], u[i + 1, j + 1], v[i + 1, j + 1]
            first = (bu - au) * (cv - av) - (cu - au) * (bv - av) > 0
            second = (cu - du) * (bv - dv) - (bu - du) * (cv - dv) > 0
            first &= z[i, j] > AHEAD and not torn[0, i, j]
            second &= z[i + 1, j + 1] > AHEAD and not torn[1, i, j]
            good[i, j] |= first
            good[i, j + 1] |= first | second
            good[i + 1, j] |= first | second
            good[i + 1, j + 1] |= second


@kernel
def keep_seen(u, v, z, drawn, tolerance, good):
    """Clear good bool [H, W] for pixels that fall outside the novel picture, or lie behind what is drawn there.

    Args:
        drawn: float32 [H, W], z-depth of the novel view; the farthest of the four pixels around a point counts.
    """
    height, width = drawn.shape
    for i in range(height):
        for j in range(width):
            if not good[i, j]:
                continue
            x, y = u[i, j], v[i, j]
            if z[i, j] <= AHEAD or x < 0 or x >= width or y < 0 or y >= height:
                good[i, j] = False
                continue
            row, column = int(np.rint(y)), int(np.rint(x))  # of the corner between the four pixels
            top, bottom = max(row - 1, 0), min(row, height - 1)
            left, right = max(column - 1, 0), min(column, width - 1)
            farthest = max(max(drawn[top, left], drawn[top, right]), max(drawn[bottom, left], drawn[bottom, right]))
            good[i, j] = z[i, j] <= farthest * (1 + tolerance)
