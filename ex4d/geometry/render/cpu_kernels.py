"""Compiled kernels of the CPU renderer: occlusion flags and deferred shading, straight from the depth grid."""

from __future__ import annotations

import numpy as np

from ex4d.compiled import kernel


@kernel
def _is_sliver(ax, ay, az, bx, by, bz, cx, cy, cz, sine_squared):
    """Return True where the triangle's smallest angle is below asin(√sine_squared)."""
    ux, uy, uz = bx - ax, by - ay, bz - az
    vx, vy, vz = cx - ax, cy - ay, cz - az
    wx, wy, wz = cx - bx, cy - by, cz - bz
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    u, v, w = ux * ux + uy * uy + uz * uz, vx * vx + vy * vy + vz * vz, wx * wx + wy * wy + wz * wz
    return nx * nx + ny * ny + nz * nz < sine_squared * max(u * v, v * w, w * u)


@kernel
def occlusion_flags(z, inverse_fx, inverse_fy, cx, cy, sine_squared):
    """Flag slivers, bool [2, H−1, W−1], of z float32 [H, W]; vertex (i, j) is ((j − cx) / fx, (i − cy) / fy, 1) · z."""
    height, width = z.shape
    flags = np.empty((2, height - 1, width - 1), np.bool_)
    for i in range(height - 1):
        y0, y1 = (i - cy) * inverse_fy, (i + 1 - cy) * inverse_fy
        for j in range(width - 1):
            x0, x1 = (j - cx) * inverse_fx, (j + 1 - cx) * inverse_fx
            tl, tr = np.float64(z[i, j]), np.float64(z[i, j + 1])
            bl, br = np.float64(z[i + 1, j]), np.float64(z[i + 1, j + 1])
            flags[0, i, j] = _is_sliver(x0 * tl, y0 * tl, tl, x0 * bl, y1 * bl, bl, x1 * tr, y0 * tr, tr, sine_squared)
            flags[1, i, j] = _is_sliver(x1 * tr, y0 * tr, tr, x0 * bl, y1 * bl, bl, x1 * br, y1 * br, br, sine_squared)
    return flags


@kernel
def _corner(i, j, z, rays_x, rays_y, eye):
    """Return vertex (i, j) relative to the target's eye, in the source's axes."""
    depth = np.float64(z[i, j])
    return rays_x[j] * depth - eye[0], rays_y[i] * depth - eye[1], depth - eye[2]


@kernel
def _weights(ray, p, q, r):
    """Return ray · (q × r), ray · (r × p), ray · (p × q): homogeneous barycentrics, all of one sign inside."""
    x, y, z = ray
    return (
        x * (q[1] * r[2] - q[2] * r[1]) + y * (q[2] * r[0] - q[0] * r[2]) + z * (q[0] * r[1] - q[1] * r[0]),
        x * (r[1] * p[2] - r[2] * p[1]) + y * (r[2] * p[0] - r[0] * p[2]) + z * (r[0] * p[1] - r[1] * p[0]),
        x * (p[1] * q[2] - p[2] * q[1]) + y * (p[2] * q[0] - p[0] * q[2]) + z * (p[0] * q[1] - p[1] * q[0]),
    )


@kernel
def _clamped(wa, wb, wc):
    """Return weights of either sign clamped to [0, 1] and scaled to sum 1; thirds where all are zero."""
    if wa + wb + wc < 0:
        wa, wb, wc = -wa, -wb, -wc
    wa, wb, wc = max(wa, 0.0), max(wb, 0.0), max(wc, 0.0)
    total = wa + wb + wc
    if total > 0:
        scale = 1 / total
        return wa * scale, wb * scale, wc * scale
    return 1 / 3, 1 / 3, 1 / 3


@kernel
def _cell_of(face, num_cells, columns, inverse_columns):
    """Return (half, row, column) of a grid face."""
    half = 1 if face >= num_cells else 0
    cell = face - half * num_cells
    row = int((cell + 0.5) * inverse_columns)  # exact: half a cell away from integers
    return half, row, cell - row * columns


@kernel
def filled(keys, occluded, visible):
    """Set visible bool [H, W] where the nearest face, by the keys of `rasterise`, is an unoccluded face of the grid."""
    _, rows, columns = occluded.shape
    num_cells, inverse_columns = rows * columns, 1 / columns
    for i in range(keys.shape[0]):
        for j in range(keys.shape[1]):
            visible[i, j] = False
            face = np.int64(2**31 - 1) - (keys[i, j] & np.int64(2**32 - 1))
            if keys[i, j] != 0 and face < 2 * num_cells:
                half, row, column = _cell_of(face, num_cells, columns, inverse_columns)
                visible[i, j] = not occluded[half, row, column]


@kernel
def _turned(x, y, rotation):
    """Return the ray (x, y, 1) of the target in the source's axes."""
    return (
        rotation[0, 0] * x + rotation[1, 0] * y + rotation[2, 0],
        rotation[0, 1] * x + rotation[1, 1] * y + rotation[2, 1],
        rotation[0, 2] * x + rotation[1, 2] * y + rotation[2, 2],
    )


@kernel
def _mix(wa, a, wb, b, wc, c, out):
    """Write the weighted mean of three colours, rounded."""
    for k in range(3):
        out[k] = np.uint8(wa * a[k] + wb * b[k] + wc * c[k] + 0.5)


@kernel
def shade(
    keys, z, rays_x, rays_y, rotation, eye, camera, colours, alpha, occluded, cap, two_sided, vertex_alpha,
    colour, z_depth, visible, face_id,
):  # fmt: skip
    """Shade the nearest faces into colour, z_depth, visible and face_id; arguments as in `rasterise`.

    Args:
        eye: float64 [3], the target's centre in the source's axes.
        colours: uint8 [rows + 1, columns + 1, 3]; alpha: bool on the same grid, used only with vertex_alpha, which is
            incompatible with a cap that has a vertex of its own.
    """
    _, rows, columns = occluded.shape
    num_cells, num_grid, inverse_columns = rows * columns, 2 * rows * columns, 1 / columns
    for i in range(keys.shape[0]):
        ry = (i + 0.5 - camera[3]) / camera[1]
        for j in range(keys.shape[1]):
            key = keys[i, j]
            colour[i, j, 0] = colour[i, j, 1] = colour[i, j, 2] = 0
            visible[i, j] = False
            if key == 0:
                face_id[i, j], z_depth[i, j] = -1, np.inf
                continue
            face = np.int64(2**31 - 1) - (key & np.int64(2**32 - 1))
            face_id[i, j], z_depth[i, j] = face, np.float32(1) / np.int32(key >> 32).view(np.float32)
            if face < num_grid:
                half, row, column = _cell_of(face, num_cells, columns, inverse_columns)
                if not vertex_alpha and occluded[half, row, column]:
                    continue
                ai, aj, bi, bj, ci, cj = row, column + half, row + 1, column, row + half, column + 1
            elif vertex_alpha:
                a, b, c = cap[face - num_grid, 0], cap[face - num_grid, 1], cap[face - num_grid, 2]
                ai, aj, bi, bj = a // (columns + 1), a % (columns + 1), b // (columns + 1), b % (columns + 1)
                ci, cj = c // (columns + 1), c % (columns + 1)
            else:
                continue
            wa, wb, wc = _weights(
                _turned((j + 0.5 - camera[2]) / camera[0], ry, rotation),
                _corner(ai, aj, z, rays_x, rays_y, eye),
                _corner(bi, bj, z, rays_x, rays_y, eye),
                _corner(ci, cj, z, rays_x, rays_y, eye),
            )
            if wa + wb + wc >= 0 and not two_sided:
                continue
            wa, wb, wc = _clamped(wa, wb, wc)
            if vertex_alpha:
                wa, wb, wc = wa * alpha[ai, aj], wb * alpha[bi, bj], wc * alpha[ci, cj]
                if (wa + wb + wc) * 255 <= 125:
                    continue
            visible[i, j] = True
            _mix(wa, colours[ai, aj], wb, colours[bi, bj], wc, colours[ci, cj], colour[i, j])
