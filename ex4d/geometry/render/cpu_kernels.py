"""Compiled kernels of the CPU renderer, straight from the depth grid: one thread, without the GIL."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

SUBPIXELS = 256.0
HALF = 128.0


def _kernel(function):
    """Return `function` compiled; kept on disk beside the module or in numba's user folder if it can be."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba: no place for a cache
        return njit(nogil=True, error_model="numpy")(function)


@_kernel
def _is_sliver(ax, ay, az, bx, by, bz, cx, cy, cz, sine_squared):
    """Return True where the triangle's smallest angle is below asin(√sine_squared)."""
    ux, uy, uz = bx - ax, by - ay, bz - az
    vx, vy, vz = cx - ax, cy - ay, cz - az
    wx, wy, wz = cx - bx, cy - by, cz - bz
    nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
    u, v, w = ux * ux + uy * uy + uz * uz, vx * vx + vy * vy + vz * vz, wx * wx + wy * wy + wz * wz
    return nx * nx + ny * ny + nz * nz < sine_squared * max(u * v, v * w, w * u)


@_kernel
def occlusion_flags(z, inverse_fx, inverse_fy, cx, cy, sine_squared):
    """Return bool [2, H−1, W−1] of z float32 [H, W]; vertex (i, j) is at ((j − cx) / fx, (i − cy) / fy, 1) · z."""
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


@_kernel
def transform(z, rays_x, rays_y, rotation, shift):
    """Return points float64 [H·W, 3] in the target camera's axes of the grid z float32 [H, W]."""
    height, width = z.shape
    points = np.empty((height * width, 3))
    for i in range(height):
        for j in range(width):
            depth = np.float64(z[i, j])
            x, y = rays_x[j] * depth, rays_y[i] * depth
            for k in range(3):
                points[i * width + j, k] = rotation[k, 0] * x + rotation[k, 1] * y + rotation[k, 2] * depth + shift[k]
    return points


@_kernel
def _fill(ax, ay, ia, bx, by, ib, cx, cy, ic, face, cull, inverse_depth, face_id):
    """Enter one triangle, corners in 1/256 px and 1/z, into the pictures; without back faces (area > 0) if cull."""
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    if area == 0 or (cull and area > 0):
        return
    if area < 0:
        bx, by, ib, cx, cy, ic, area = cx, cy, ic, bx, by, ib, -area
    height, width = face_id.shape
    j0 = max(math.ceil((min(ax, bx, cx) - HALF) / SUBPIXELS), 0.0)
    j1 = min(math.floor((max(ax, bx, cx) - HALF) / SUBPIXELS), width - 1.0)
    i0 = max(math.ceil((min(ay, by, cy) - HALF) / SUBPIXELS), 0.0)
    i1 = min(math.floor((max(ay, by, cy) - HALF) / SUBPIXELS), height - 1.0)
    if j1 < j0 or i1 < i0:
        return
    dxa, dya, dxb, dyb, dxc, dyc = cx - bx, cy - by, ax - cx, ay - cy, bx - ax, by - ay
    # The top-left rule on whole numbers: an edge that does not own its points must be exceeded by one unit or more.
    ta = dya < 0 or (dya == 0 and dxa > 0)
    tb = dyb < 0 or (dyb == 0 and dxb > 0)
    tc = dyc < 0 or (dyc == 0 and dxc > 0)
    for i in range(int(i0), int(i1) + 1):
        y = i * SUBPIXELS + HALF
        for j in range(int(j0), int(j1) + 1):
            x = j * SUBPIXELS + HALF
            wa = dxa * (y - by) - dya * (x - bx)
            wb = dxb * (y - cy) - dyb * (x - cx)
            wc = dxc * (y - ay) - dyc * (x - ax)
            if wa < 0 or wb < 0 or wc < 0 or (wa == 0 and not ta) or (wb == 0 and not tb) or (wc == 0 and not tc):
                continue
            value = np.float32((wa * ia + wb * ib + wc * ic) / area)
            if value > inverse_depth[i, j] or (value == inverse_depth[i, j] and face < face_id[i, j]):
                inverse_depth[i, j] = value
                face_id[i, j] = face


@_kernel
def _snap(p, camera, near):
    """Return (x, y in 1/256 px, 1/z) of a point at or beyond the near plane; zeros before it."""
    if p[2] < near:
        return 0.0, 0.0, 0.0
    inverse = 1 / p[2]
    x = math.floor((camera[0] * p[0] * inverse + camera[2]) * SUBPIXELS + 0.5)
    y = math.floor((camera[1] * p[1] * inverse + camera[3]) * SUBPIXELS + 0.5)
    return x, y, inverse


@_kernel
def _clip_and_fill(a, b, c, camera, near, face, cull, inverse_depth, face_id):
    """Cut a triangle (points [3] in camera axes) at the near plane and enter what is left."""
    polygon = np.empty((4, 3))
    corners = (a, b, c)
    count = 0
    for k in range(3):
        p, q = corners[k], corners[(k + 1) % 3]
        p_inside, q_inside = p[2] >= near, q[2] >= near
        if p_inside:
            polygon[count] = p
            count += 1
        if p_inside != q_inside:
            inner, outer = (p, q) if p_inside else (q, p)
            share = (near - inner[2]) / (outer[2] - inner[2])
            polygon[count] = inner + share * (outer - inner)
            polygon[count, 2] = near
            count += 1
    for k in range(1, count - 1):
        ax, ay, ia = _snap(polygon[0], camera, near)
        bx, by, ib = _snap(polygon[k], camera, near)
        cx, cy, ic = _snap(polygon[k + 1], camera, near)
        _fill(ax, ay, ia, bx, by, ib, cx, cy, ic, face, cull, inverse_depth, face_id)


@_kernel
def rasterise(points, occluded, cap, camera, near, cull, draw_occluded, inverse_depth, face_id):
    """Enter all faces of a grid and its cap into the pictures inverse_depth float32 [H, W] and face_id int32 [H, W].

    Args:
        points: float64 [N, 3] in camera axes, grid first.
        occluded: bool [2, rows, columns] flags of the grid's faces.
        cap: int32 [C, 3] faces of the cap.
        camera: float64 [4]: fx, fy, cx, cy of the target.
        near: near plane.
        cull: leave out back faces.
        draw_occluded: else leave out occluded faces and the cap.
    """
    _, rows, columns = occluded.shape
    width = columns + 1
    snapped = np.empty((len(points), 3))
    for n in range(len(points)):
        snapped[n, 0], snapped[n, 1], snapped[n, 2] = _snap(points[n], camera, near)
    for i in range(rows):
        for j in range(columns):
            tl = i * width + j
            for half in range(2):
                if occluded[half, i, j] and not draw_occluded:
                    continue
                a, b, c = (tl, tl + width, tl + 1) if half == 0 else (tl + 1, tl + width, tl + width + 1)
                face = (half * rows + i) * columns + j
                _face(a, b, c, points, snapped, camera, near, face, cull, inverse_depth, face_id)
    if draw_occluded:
        for k in range(len(cap)):
            face = 2 * rows * columns + k
            _face(cap[k, 0], cap[k, 1], cap[k, 2], points, snapped, camera, near, face, cull, inverse_depth, face_id)


@_kernel
def _face(a, b, c, points, snapped, camera, near, face, cull, inverse_depth, face_id):
    ia, ib, ic = snapped[a, 2], snapped[b, 2], snapped[c, 2]
    if ia > 0 and ib > 0 and ic > 0:
        ax, ay, bx, by = snapped[a, 0], snapped[a, 1], snapped[b, 0], snapped[b, 1]
        _fill(ax, ay, ia, bx, by, ib, snapped[c, 0], snapped[c, 1], ic, face, cull, inverse_depth, face_id)
    elif ia > 0 or ib > 0 or ic > 0:
        _clip_and_fill(points[a], points[b], points[c], camera, near, face, cull, inverse_depth, face_id)


@_kernel
def shade(  # noqa: C901
    points, colours, alpha, occluded, cap, camera, two_sided, vertex_alpha, face_id
):
    """Return (colour uint8 [H, W, 3], visible bool [H, W]) of the nearest faces; arguments as in `rasterise`.

    Args:
        colours: uint8 [N, 3], alpha: bool [N]: of the grid's vertices (used when vertex_alpha).
    """
    _, rows, columns = occluded.shape
    width = columns + 1
    height_out, width_out = face_id.shape
    colour = np.zeros((height_out, width_out, 3), np.uint8)
    visible = np.zeros((height_out, width_out), np.bool_)
    num_grid = 2 * rows * columns
    for i in range(height_out):
        ry = (i + 0.5 - camera[3]) / camera[1]
        for j in range(width_out):
            face = face_id[i, j]
            if face < 0:
                continue
            if face < num_grid:
                half, cell = divmod(face, rows * columns)
                row, column = divmod(cell, columns)
                if not vertex_alpha and occluded[half, row, column]:
                    continue
                tl = row * width + column
                a, b, c = (tl, tl + width, tl + 1) if half == 0 else (tl + 1, tl + width, tl + width + 1)
            else:
                if not vertex_alpha:
                    continue
                a, b, c = cap[face - num_grid, 0], cap[face - num_grid, 1], cap[face - num_grid, 2]
            rx = (j + 0.5 - camera[2]) / camera[0]
            p, q, r = points[a], points[b], points[c]
            wa = rx * (q[1] * r[2] - q[2] * r[1]) + ry * (q[2] * r[0] - q[0] * r[2]) + (q[0] * r[1] - q[1] * r[0])
            wb = rx * (r[1] * p[2] - r[2] * p[1]) + ry * (r[2] * p[0] - r[0] * p[2]) + (r[0] * p[1] - r[1] * p[0])
            wc = rx * (p[1] * q[2] - p[2] * q[1]) + ry * (p[2] * q[0] - p[0] * q[2]) + (p[0] * q[1] - p[1] * q[0])
            total = wa + wb + wc
            if total >= 0 and not two_sided:
                continue
            if total < 0:
                wa, wb, wc = -wa, -wb, -wc
            wa, wb, wc = max(wa, 0.0), max(wb, 0.0), max(wc, 0.0)
            total = wa + wb + wc
            if total > 0:
                wa, wb, wc = wa / total, wb / total, wc / total
            else:
                wa = wb = wc = 1 / 3
            if vertex_alpha:
                wa, wb, wc = wa * alpha[a], wb * alpha[b], wc * alpha[c]
                if (wa + wb + wc) * 255 <= 125:
                    continue
            visible[i, j] = True
            for k in range(3):
                colour[i, j, k] = np.uint8(wa * colours[a, k] + wb * colours[b, k] + wc * colours[c, k] + 0.5)
    return colour, visible
