"""Compiled rasteriser of the CPU renderer, straight from the depth grid: one thread, without the GIL.

Columns of CHUNK cells are walked from top to bottom. The set-up of a chunk's triangles is written without branches, so
that LLVM vectorises it. It is exact in float32: coordinates are whole 1/256 px, and a triangle over at most 2 × 2 pixel
centres is smaller than 3 px. Larger ones go through `_fill`, row by row. What is nearest is kept as one 64-bit key a
pixel, the bits of float32 1/z above the complement of the face id, merged by max: the order does not matter.
"""

from __future__ import annotations

import math

import numpy as np

from ex4d.geometry.render.cpu_kernels import kernel

CHUNK = 64
STRIDE = 80  # of the streams in a chunk's buffer
X0, Y0, X1, Y1 = 0, STRIDE, 2 * STRIDE, 3 * STRIDE  # top and bottom vertices
LARGE = 16  # a triangle for `_fill`
LAST_ID = 2**31 - 1
LOWEST_BIT = np.array([0, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0], np.int64)
F0, F1, FHALF, FPIXEL, FINVERSE = (np.float32(x) for x in (0, 1, 128, 256, 1 / 256))
BEHIND = 16


@kernel
def _fill(ax, ay, ia, bx, by, ib, cx, cy, ic, face, cull, keys):
    """Enter one triangle, corners in 1/256 px and 1/z, by spans of rows; without back faces (area > 0) if cull."""
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    if area == 0 or (cull and area > 0):
        return
    if area < 0:
        bx, by, ib, cx, cy, ic, area = cx, cy, ic, bx, by, ib, -area
    height, width = keys.shape
    i0 = max(math.ceil((min(ay, by, cy) - 128.0) / 256.0), 0)
    i1 = min(math.floor((max(ay, by, cy) - 128.0) / 256.0), height - 1)
    j0 = max(math.ceil((min(ax, bx, cx) - 128.0) / 256.0), 0)
    j1 = min(math.floor((max(ax, bx, cx) - 128.0) / 256.0), width - 1)
    if j1 < j0:
        return
    dxa, dya, dxb, dyb, dxc, dyc = cx - bx, cy - by, ax - cx, ay - cy, bx - ax, by - ay
    low = np.int64(LAST_ID - face)
    for i in range(i0, i1 + 1):
        y = i * 256.0 + 128.0
        wa = dxa * (y - by) - dya * (128.0 - bx)
        wb = dxb * (y - cy) - dyb * (128.0 - cx)
        wc = dxc * (y - ay) - dyc * (128.0 - ax)
        first, last = _span(wa, dxa, dya, np.float64(j0), np.float64(j1))
        first, last = _span(wb, dxb, dyb, first, last)
        first, last = _span(wc, dxc, dyc, first, last)
        for j in range(int(first), int(last) + 1):
            x = j * 256.0
            value = np.float32(((wa - dya * x) * ia + (wb - dyb * x) * ib + (wc - dyc * x) * ic) / area)
            keys[i, j] = max(keys[i, j], np.int64(value.view(np.int32)) << 32 | low)


@kernel
def _span(at_zero, dx, dy, first, last):
    """Return the part of columns [first, last] inside an edge whose function is at_zero − 256 dy · column.

    By the top-left rule on whole numbers: an edge that does not own its points must be exceeded by one unit or more.
    """
    room = at_zero if dy < 0 or (dy == 0 and dx > 0) else at_zero - 1.0
    if dy < 0:
        return max(first, np.ceil(room / (256.0 * dy))), last
    if dy > 0:
        return first, min(last, np.floor(room / (256.0 * dy)))
    return (first, last) if room >= 0 else (first, first - 1.0)


@kernel
def _point(i, j, z, rays_x, rays_y, centre, rotation, shift):
    """Return vertex (i, j) in the target camera's axes; the cap's centre where i is one too many."""
    x, y, depth = centre[0], centre[1], centre[2]
    if i < len(rays_y):
        depth = np.float64(z[i, j])
        x, y = rays_x[j] * depth, rays_y[i] * depth
    return (
        rotation[0] * x + rotation[1] * y + rotation[2] * depth + shift[0],
        rotation[3] * x + rotation[4] * y + rotation[5] * depth + shift[1],
        rotation[6] * x + rotation[7] * y + rotation[8] * depth + shift[2],
    )


@kernel
def _snap(p, camera):
    """Return (x, y in 1/256 px, 1/z) of a point before the camera."""
    inverse = 1 / p[2]
    x = np.floor((camera[0] * p[0] * inverse + camera[2]) * 256.0 + 0.5)
    y = np.floor((camera[1] * p[1] * inverse + camera[3]) * 256.0 + 0.5)
    return x, y, inverse


@kernel
def _cut(inner, outer, near):
    """Return where an edge meets the near plane; from its inner end, so that both its faces get the same point."""
    share = (near - inner[2]) / (outer[2] - inner[2])
    return inner[0] + share * (outer[0] - inner[0]), inner[1] + share * (outer[1] - inner[1]), near


@kernel
def _draw(a, b, c, camera, near, face, cull, keys):
    """Enter a triangle of points in camera axes, cut at the near plane."""
    inside = (a[2] >= near) + (b[2] >= near) + (c[2] >= near)
    if inside == 0:
        return
    # Turned so that the odd one out comes first; the order round the triangle stays.
    if (inside == 1 and b[2] >= near) or (inside == 2 and b[2] < near):
        a, b, c = b, c, a
    elif (inside == 1 and c[2] >= near) or (inside == 2 and c[2] < near):
        a, b, c = c, a, b
    if inside == 1:
        b, c = _cut(a, b, near), _cut(a, c, near)
    elif inside == 2:
        cut_b, cut_c = _cut(b, a, near), _cut(c, a, near)
        (ax, ay, ia), (bx, by, ib), (cx, cy, ic) = _snap(cut_b, camera), _snap(c, camera), _snap(cut_c, camera)
        _fill(ax, ay, ia, bx, by, ib, cx, cy, ic, face, cull, keys)
        a = cut_b
    (ax, ay, ia), (bx, by, ib), (cx, cy, ic) = _snap(a, camera), _snap(b, camera), _snap(c, camera)
    _fill(ax, ay, ia, bx, by, ib, cx, cy, ic, face, cull, keys)


@kernel
def _vertices(z_row, rays_x, ray_y, rotation, shift, camera, near, last_j, last_i, xy, inverse):
    """Enter a chunk's bottom vertices; return (AND, OR) of their outcodes: left, right, above, below, before near."""
    common, some = 31, 0
    for n in range(len(z_row)):
        depth = np.float64(z_row[n])
        x, y = rays_x[n] * depth, ray_y * depth
        px = rotation[0] * x + rotation[1] * y + rotation[2] * depth + shift[0]
        py = rotation[3] * x + rotation[4] * y + rotation[5] * depth + shift[1]
        pz = rotation[6] * x + rotation[7] * y + rotation[8] * depth + shift[2]
        one = 1 / pz
        u = np.floor((camera[0] * px * one + camera[2]) * 256.0 + 0.5)
        v = np.floor((camera[1] * py * one + camera[3]) * 256.0 + 0.5)
        xy[X1 + n], xy[Y1 + n] = np.float32(u), np.float32(v)
        inverse[STRIDE + n] = one if pz >= near else 0.0
        side = (u < 128.0) * 1 + (u > last_j * 256.0 + 128.0) * 2 + (v < 128.0) * 4 + (v > last_i * 256.0 + 128.0) * 8
        code = BEHIND if pz < near else side
        common &= code
        some |= code
    return common, some


def _cover_source(ax, ay, bx, by, cx, cy, cull, last_j, last_i):
    """Return (bits, j0, i0): which of the pixels (i0, j0), (i0, j0 + 1), … a triangle covers, or LARGE."""
    j0 = np.ceil((min(ax, bx, cx) - FHALF) * FINVERSE)
    j1 = np.floor((max(ax, bx, cx) - FHALF) * FINVERSE)
    i0 = np.ceil((min(ay, by, cy) - FHALF) * FINVERSE)
    i1 = np.floor((max(ay, by, cy) - FHALF) * FINVERSE)
    large = (j1 - j0 > F1) | (i1 - i0 > F1)
    j0, j1, i0, i1 = max(j0, F0), min(j1, last_j), max(i0, F0), min(i1, last_i)
    ux, uy, vx, vy = bx - ax, by - ay, cx - ax, cy - ay
    area = ux * vy - uy * vx
    dead = (area == F0) | (cull & (area > F0))
    sign = F1 if area > F0 else -F1
    ux, uy, vx, vy, area = ux * sign, uy * sign, vx * sign, vy * sign, area * sign
    px, py = j0 * FPIXEL + FHALF - ax, i0 * FPIXEL + FHALF - ay
    wb, wc = vy * px - vx * py, ux * py - uy * px
    wa = area - wb - wc
    dx, dy = vx - ux, vy - uy
    wa = wa - (F0 if (dy < F0) | ((dy == F0) & (dx > F0)) else F1)
    wb = wb - (F0 if (vy > F0) | ((vy == F0) & (vx < F0)) else F1)
    wc = wc - (F0 if (uy < F0) | ((uy == F0) & (ux > F0)) else F1)
    right_b, right_c, down_b, down_c = vy * FPIXEL, -uy * FPIXEL, -vx * FPIXEL, ux * FPIXEL
    right_a, down_a = -right_b - right_c, -down_b - down_c
    two_j, two_i = j1 > j0, i1 > i0
    here = min(wa, wb, wc) >= F0
    right = (min(wa + right_a, wb + right_b, wc + right_c) >= F0) & two_j
    down = (min(wa + down_a, wb + down_b, wc + down_c) >= F0) & two_i
    both = (min(wa + right_a + down_a, wb + right_b + down_b, wc + right_c + down_c) >= F0) & two_j & two_i
    bits = np.int32(here) | np.int32(right) << 1 | np.int32(down) << 2 | np.int32(both) << 3
    away = (j1 < j0) | (i1 < i0) | (dead & ~large)
    return np.int32(0 if away else (LARGE if large else bits)), np.int32(j0), np.int32(i0)


_cover = kernel(_cover_source, inline="always")


@kernel
def _cover_upper(xy, cull, last_j, last_i, out):
    """Enter what the triangles (tl, bl, tr) of a chunk cover: out int32, streams of CHUNK: bits, j0, i0."""
    for n in range(CHUNK):
        out[n], out[n + CHUNK], out[n + 2 * CHUNK] = _cover(
            xy[X0 + n], xy[Y0 + n], xy[X1 + n], xy[Y1 + n], xy[X0 + n + 1], xy[Y0 + n + 1], cull, last_j, last_i
        )


@kernel
def _cover_lower(xy, cull, last_j, last_i, out):
    """Enter what the triangles (tr, bl, br) of a chunk cover."""
    for n in range(CHUNK):
        out[n], out[n + CHUNK], out[n + 2 * CHUNK] = _cover(
            xy[X0 + n + 1], xy[Y0 + n + 1], xy[X1 + n], xy[Y1 + n], xy[X1 + n + 1], xy[Y1 + n + 1], cull, last_j, last_i
        )


@kernel
def _cover_cut(inverse, half, cells, out):
    """Send triangles across the near plane to `_draw` and drop those before it."""
    for n in range(cells):
        inside = (inverse[n + half] > 0) + (inverse[STRIDE + n] > 0) + (inverse[half * STRIDE + n + 1] > 0)
        if inside < 3:
            out[n] = LARGE if inside else 0


@kernel
def _merge(covered, count, half, xy, inverse, out, first_face, keys):
    """Enter the small triangles `covered[:count]` of a chunk: depth as in the reference, one key a pixel."""
    for m in range(count):
        n = covered[m]
        a, b, c = n + half, n, n + 1
        bits, j0, i0 = np.int64(out[n]), np.int64(out[n + CHUNK]), np.int64(out[n + 2 * CHUNK])
        ax, ay = np.float64(xy[X0 + a]), np.float64(xy[Y0 + a])
        ux, uy = np.float64(xy[X1 + b]) - ax, np.float64(xy[Y1 + b]) - ay
        third = half * (X1 - X0)
        vx, vy = np.float64(xy[X0 + third + c]) - ax, np.float64(xy[Y0 + third + c]) - ay
        ia, ib, ic = inverse[a], inverse[STRIDE + b], inverse[half * STRIDE + c]
        area = ux * vy - uy * vx
        low = np.int64(LAST_ID - (first_face + n))
        while bits:
            k = LOWEST_BIT[bits]
            bits &= bits - 1
            j, i = j0 + (k & 1), i0 + (k >> 1)
            px, py = j * 256.0 + 128.0 - ax, i * 256.0 + 128.0 - ay
            wb, wc = vy * px - vx * py, ux * py - uy * px
            wa = area - wb - wc
            left, rest = (wc * ic, wb * ib) if area < 0 else (wb * ib, wc * ic)
            value = np.float32((wa * ia + left + rest) / area)
            keys[i, j] = max(keys[i, j], np.int64(value.view(np.int32)) << 32 | low)


@kernel
def rasterise(z, rays_x, rays_y, rotation, shift, camera, near, occluded, cap, centre, cull, draw_occluded, keys):
    """Enter all faces of a grid and its cap into keys int64 [H, W], zero where nothing is.

    Args:
        z: float32 [rows + 1, columns + 1]; rays_x, rays_y: float64, K⁻¹ (u, v, 1) of its columns and rows.
        rotation, shift: float64 [9], row by row, and [3], from the source's to the target's axes.
        camera: float64 [4]: fx, fy, cx, cy of the target.
        near: near plane.
        occluded: bool [2, rows, columns] flags of the grid's faces.
        cap: int32 [C, 3] faces of the cap; centre: float64 [3], its centre in the source's axes.
        cull: leave out back faces.
        draw_occluded: else leave out occluded faces and the cap.
    """
    rows, columns = z.shape[0] - 1, z.shape[1] - 1
    last_i, last_j = np.float32(keys.shape[0] - 1), np.float32(keys.shape[1] - 1)
    xy, inverse = np.zeros(4 * STRIDE, np.float32), np.zeros(2 * STRIDE)
    out, listed = np.zeros(3 * CHUNK, np.int32), np.zeros(CHUNK + 1, np.int64)
    for start in range(0, columns, CHUNK):
        cells = min(CHUNK, columns - start)
        common, some = 0, 0
        for i in range(rows + 1):
            xy[: 2 * STRIDE], inverse[:STRIDE] = xy[2 * STRIDE :], inverse[STRIDE:]
            top_common, top_some = common, some
            common, some = _vertices(
                z[i, start : start + cells + 1], rays_x[start:], rays_y[i], rotation, shift, camera, near,
                last_j, last_i, xy, inverse,
            )  # fmt: skip
            if i == 0 or common & top_common:
                continue
            for half in range(2):
                if half == 0:
                    _cover_upper(xy, cull, last_j, last_i, out)
                else:
                    _cover_lower(xy, cull, last_j, last_i, out)
                if (some | top_some) & BEHIND:
                    _cover_cut(inverse, half, cells, out)
                first_face = (half * rows + i - 1) * columns + start
                count = 0
                for n in range(cells):
                    listed[count] = n
                    count += (out[n] != 0) & (draw_occluded | ~occluded[half, i - 1, start + n])
                small = 0
                for m in range(count):
                    n = listed[m]
                    if out[n] != LARGE:
                        listed[small] = n
                        small += 1
                        continue
                    j = start + n
                    _draw(
                        _point(i - 1, j + half, z, rays_x, rays_y, centre, rotation, shift),
                        _point(i, j, z, rays_x, rays_y, centre, rotation, shift),
                        _point(i - 1 + half, j + 1, z, rays_x, rays_y, centre, rotation, shift),
                        camera, near, first_face + n, cull, keys,
                    )  # fmt: skip
                _merge(listed, small, half, xy, inverse, out, first_face, keys)
    if draw_occluded:
        for k in range(len(cap)):
            a, b, c = cap[k, 0], cap[k, 1], cap[k, 2]
            _draw(
                _point(a // (columns + 1), a % (columns + 1), z, rays_x, rays_y, centre, rotation, shift),
                _point(b // (columns + 1), b % (columns + 1), z, rays_x, rays_y, centre, rotation, shift),
                _point(c // (columns + 1), c % (columns + 1), z, rays_x, rays_y, centre, rotation, shift),
                camera, near, 2 * rows * columns + k, cull, keys,
            )  # fmt: skip
