"""Compiled kernels of the visibility mask: where source pixels land in a novel picture, and which of them are seen.

The rule is described in `visibility.seen`; tests/geometry/test_visibility_kernels.py implements it in NumPy.
"""

from __future__ import annotations

import numpy as np

from ex4d.compiled import kernel

AHEAD = 1e-9  # least distance in front of the camera's centre, in units of depth


# Loops are branch-free and use few arrays, so that the compiler vectorises them: four times faster.


@kernel
def _land_row(i, z_depth, intrinsics, w2c, lane):
    """Project the pixels of row i to the novel camera: u, v, z into lane float64 [3, W]; u, v = −1 behind it."""
    fx, fy, cx, cy = intrinsics
    ray_y, inverse_fx = (i + 0.5 - cy) / fy, 1 / fx
    for j in range(z_depth.shape[1]):
        depth = np.float64(z_depth[i, j])
        x, y = (j + 0.5 - cx) * inverse_fx * depth, ray_y * depth
        ahead = w2c[2, 0] * x + w2c[2, 1] * y + w2c[2, 2] * depth + w2c[2, 3]
        inverse = 1 / max(ahead, AHEAD)
        u = (w2c[0, 0] * x + w2c[0, 1] * y + w2c[0, 2] * depth + w2c[0, 3]) * inverse * fx + cx
        v = (w2c[1, 0] * x + w2c[1, 1] * y + w2c[1, 2] * depth + w2c[1, 3]) * inverse * fy + cy
        lane[0, j] = u if ahead > AHEAD else -1.0
        lane[1, j] = v if ahead > AHEAD else -1.0
        lane[2, j] = ahead


@kernel
def land(z_depth, intrinsics, w2c, landed):
    """Project all pixels to the novel camera: u, v, z of each row into landed float64 [H, 3, W].

    Args:
        z_depth: float32 [H, W]; intrinsics: float64 (fx, fy, cx, cy) of source and target; w2c: float64 [4, 4].
    """
    for i in range(z_depth.shape[0]):
        _land_row(i, z_depth, intrinsics, w2c, landed[i])


@kernel
def _mark_faces(lanes, above, below, torn, faces):
    """Set faces float64 [2, W + 1] to 1 for a face that is not torn, lies ahead and keeps its winding, else to 0.

    Face j + 1 lies between the pixels j and j + 1 of the rows `above` and `below` of lanes [2, 3, W]; the outer ones
    stay 0. torn: bool [2, W−1].
    """
    for j in range(torn.shape[1]):
        # The diagonal's two pixels, b and c, belong to both faces: b is right of a, c below it, d diagonally across.
        au, av, bu, bv = lanes[above, 0, j], lanes[above, 1, j], lanes[above, 0, j + 1], lanes[above, 1, j + 1]
        cu, cv, du, dv = lanes[below, 0, j], lanes[below, 1, j], lanes[below, 0, j + 1], lanes[below, 1, j + 1]
        first, second = (bu - au) * (cv - av) - (cu - au) * (bv - av), (cu - du) * (bv - dv) - (bu - du) * (cv - dv)
        diagonal = min(lanes[above, 2, j + 1], lanes[below, 2, j])
        faces[0, j + 1] = 1.0 if (first > 0) & (min(diagonal, lanes[above, 2, j]) > AHEAD) else 0.0
        faces[1, j + 1] = 1.0 if (second > 0) & (min(diagonal, lanes[below, 2, j + 1]) > AHEAD) else 0.0
    for j in range(torn.shape[1]):
        faces[0, j + 1] *= 1.0 - torn[0, j]
        faces[1, j + 1] *= 1.0 - torn[1, j]


@kernel
def _see_row(lane, height, drawn, tolerance, corner, seen):
    """Clear seen float64 [W] for pixels of a row outside the novel picture, or behind what is drawn there.

    Args:
        height: H of the novel picture, in the same pixels as W = len(seen). corner: int32 [2, W], scratch.
    """
    width, rows, columns = len(seen), np.float64(drawn.shape[0]), np.float64(drawn.shape[1])
    scale_x, scale_y = columns / width, rows / height
    for j in range(width):
        u, v = lane[0, j], lane[1, j]
        inside = (lane[2, j] > AHEAD) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        seen[j] = seen[j] if inside else 0.0
        x, y = u * scale_x, v * scale_y
        # The corner between the four pixels around the point; any will do if the point is outside.
        corner[0, j] = np.int32(min(max(y, 0.0), rows) + 0.5)
        corner[1, j] = np.int32(min(max(x, 0.0), columns) + 0.5)
    one = np.uint32(1)
    for j in range(width):
        row, column = np.uint32(corner[0, j]), np.uint32(corner[1, j])
        top, bottom = row - min(row, one), min(row, np.uint32(drawn.shape[0] - 1))
        left, right = column - min(column, one), min(column, np.uint32(drawn.shape[1] - 1))
        farthest = max(max(drawn[top, left], drawn[top, right]), max(drawn[bottom, left], drawn[bottom, right]))
        seen[j] = seen[j] if lane[2, j] <= farthest * (1 + tolerance) else 0.0


@kernel
def see(z_depth, intrinsics, w2c, torn, drawn, tolerance, seen):
    """Set seen bool [H, W] for pixels with a good face whose surface the novel camera sees, row by row.

    Args:
        z_depth, intrinsics, w2c: as in `land`. torn: bool [2, H−1, W−1] by the real depth.
        drawn: float32 [h, w], z-depth of the novel view; the farthest of the four pixels around a point counts.
    """
    height, width = z_depth.shape
    lanes, faces = np.empty((2, 3, width)), np.zeros((2, width + 1))
    good, corner = np.zeros((2, width)), np.empty((2, width), np.int32)  # good: of a row, and of the row below
    for i in range(height):
        here, above = i % 2, 1 - i % 2
        _land_row(i, z_depth, intrinsics, w2c, lanes[here])
        if i:
            _mark_faces(lanes, above, here, torn[:, i - 1], faces)
            for j in range(width):
                good[0, j] = max(good[1, j], faces[0, j + 1], faces[0, j], faces[1, j])
                good[1, j] = max(faces[0, j + 1], faces[1, j + 1], faces[1, j])
            _see_row(lanes[above], height, drawn, tolerance, corner, good[0])
            for j in range(width):
                seen[i - 1, j] = good[0, j] > 0
    _see_row(lanes[(height - 1) % 2], height, drawn, tolerance, corner, good[1])
    for j in range(width):
        seen[height - 1, j] = good[1, j] > 0
