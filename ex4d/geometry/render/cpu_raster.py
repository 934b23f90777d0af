"""Compiled rasteriser of the CPU renderer, straight from the depth grid: one thread, without the GIL.

Strips of CHUNK columns of cells are processed from top to bottom. The set-up of a chunk's triangles is branch-free, so
that LLVM vectorises it. It is exact in float32: coordinates are whole 1/256 px, and a triangle over at most 2 × 2 pixel
centres is smaller than 3 px. Triangles that cover more than one go through `_fill`, row by row. Each pixel keeps its
nearest face as a 64-bit key: the bits of float32 1/z above the complement of the face id. Keys merge by max, in any
order.
"""

from __future__ import annotations

import math

import numpy as np

from ex4d.compiled import kernel

CHUNK = 64
STRIDE = 80  # of the arrays in a chunk's buffer
X0, Y0, X1, Y1 = 0, STRIDE, 2 * STRIDE, 3 * STRIDE  # top and bottom vertices, 1/256 px
WB, WC, AREA, VALUE = 4 * STRIDE, 5 * STRIDE, 6 * STRIDE, 7 * STRIDE  # edge functions at the pixel, area, 1/z
NONE, ONE, MORE = 0, 1, 2  # number of pixels that a triangle covers, as far as the set-up can tell
EXACT = 2.0**24  # integers below this are exact in float32
LAST_ID = 2**31 - 1
F0, F1, FHALF, FPIXEL, FINVERSE = (np.float32(x) for x in (0, 1, 128, 256, 1 / 256))
BEHIND = 16


@kernel
def _fill(ax, ay, ia, ha, bx, by, ib, hb, cx, cy, ic, hc, face, cull, keys):
    """Draw one triangle into keys, row by row; corners in 1/256 px and 1/z. With cull, skip back faces (area > 0).

    ha, hb, hc: distance of each corner beyond the depth where a curtain ends, in source z; all 0: it does not end.
    """
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    if area == 0 or (cull and area > 0):
        return
    if area < 0:
        bx, by, ib, hb, cx, cy, ic, hc, area = cx, cy, ic, hc, bx, by, ib, hb, -area
    height, width = keys.shape
    i0 = max(math.ceil((min(ay, by, cy) - 128.0) / 256.0), 0)
    i1 = min(math.floor((max(ay, by, cy) - 128.0) / 256.0), height - 1)
    j0 = max(math.ceil((min(ax, bx, cx) - 128.0) / 256.0), 0)
    j1 = min(math.floor((max(ax, bx, cx) - 128.0) / 256.0), width - 1)
    if j1 < j0:
        return
    dxa, dya, dxb, dyb, dxc, dyc = cx - bx, cy - by, ax - cx, ay - cy, bx - ax, by - ay
    ends = max(ha, hb, hc) > 0
    ha, hb, hc = ha * ia, hb * ib, hc * ic
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
            a, b, c = wa - dya * x, wb - dyb * x, wc - dyc * x
            if ends and a * ha + b * hb + c * hc > 0:
                continue
            value = np.float32((a * ia + b * ib + c * ic) / area)
            keys[i, j] = max(keys[i, j], np.int64(value.view(np.int32)) << 32 | (LAST_ID - face))


@kernel
def _span(at_zero, dx, dy, first, last):
    """Return the part of columns [first, last] inside an edge whose function is at_zero − 256 dy · column.

    Top-left rule in integers: on an edge that does not own its points, the function must be at least 1.
    """
    room = at_zero if dy < 0 or (dy == 0 and dx > 0) else at_zero - 1.0
    if dy < 0:
        return max(first, np.ceil(room / (256.0 * dy))), last
    if dy > 0:
        return first, min(last, np.floor(room / (256.0 * dy)))
    return (first, last) if room >= 0 else (first, first - 1.0)


@kernel
def _point(i, j, z, rays_x, rays_y, centre, rotation, shift):
    """Return vertex (i, j) in the target camera's axes and its source z; i one past the last row: the cap's centre."""
    x, y, depth = centre[0], centre[1], centre[2]
    if i < len(rays_y):
        depth = np.float64(z[i, j])
        x, y = rays_x[j] * depth, rays_y[i] * depth
    return (
        rotation[0] * x + rotation[1] * y + rotation[2] * depth + shift[0],
        rotation[3] * x + rotation[4] * y + rotation[5] * depth + shift[1],
        rotation[6] * x + rotation[7] * y + rotation[8] * depth + shift[2],
        depth,
    )


@kernel
def _snap(p, camera):
    """Return (x, y in 1/256 px, 1/z) of a point in front of the camera."""
    one = 1 / p[2]
    u, v = camera[0] * p[0] * one + camera[2], camera[1] * p[1] * one + camera[3]
    return np.floor(u * 256.0 + 0.5), np.floor(v * 256.0 + 0.5), one


@kernel
def _cut(inner, outer, near):
    """Cut an edge at the near plane, always computed from its inner end, so that both its faces get the same point."""
    share = (near - inner[2]) / (outer[2] - inner[2])
    return (
        inner[0] + share * (outer[0] - inner[0]),
        inner[1] + share * (outer[1] - inner[1]),
        near,
        inner[3] + share * (outer[3] - inner[3]),
    )


@kernel
def _draw(corners, z, rays_x, rays_y, centre, rotation, shift, camera, near, reach, face, cull, keys):
    """Draw a triangle of vertices ((i, j), (i, j), (i, j)), clipped at the near plane and where it ends (`_beyond`)."""
    (ai, aj), (bi, bj), (ci, cj) = corners
    a = _point(ai, aj, z, rays_x, rays_y, centre, rotation, shift)
    b = _point(bi, bj, z, rays_x, rays_y, centre, rotation, shift)
    c = _point(ci, cj, z, rays_x, rays_y, centre, rotation, shift)
    least = min(a[3], b[3], c[3])
    inside = (a[2] >= near) + (b[2] >= near) + (c[2] >= near)
    # Rotate the corners so that the one alone on its side comes first; the winding is kept.
    if (inside == 1 and b[2] >= near) or (inside == 2 and b[2] < near):
        a, b, c = b, c, a
    elif (inside == 1 and c[2] >= near) or (inside == 2 and c[2] < near):
        a, b, c = c, a, b
    if inside == 0:
        return
    if inside == 1:
        b, c = _cut(a, b, near), _cut(a, c, near)
    elif inside == 2:
        a, cut = _cut(b, a, near), _cut(c, a, near)
        hd = _beyond(cut[3], least, reach)
        (ax, ay, ia), (bx, by, ib), (cx, cy, ic) = _snap(a, camera), _snap(c, camera), _snap(cut, camera)
        ha, hb = _beyond(a[3], least, reach), _beyond(c[3], least, reach)
        _fill(ax, ay, ia, ha, bx, by, ib, hb, cx, cy, ic, hd, face, cull, keys)
    (ax, ay, ia), (bx, by, ib), (cx, cy, ic) = _snap(a, camera), _snap(b, camera), _snap(c, camera)
    ha, hb, hc = _beyond(a[3], least, reach), _beyond(b[3], least, reach), _beyond(c[3], least, reach)
    _fill(ax, ay, ia, ha, bx, by, ib, hb, cx, cy, ic, hc, face, cull, keys)


@kernel
def _beyond(depth, least, reach):
    """Return how far a corner lies beyond (1 + reach) × the triangle's least depth; 0 if reach < 0: no end."""
    return depth - (1 + reach) * least if reach >= 0 else 0.0


@kernel
def _vertices(z_row, rays_x, ray_y, rotation, shift, camera, near, last_j, last_i, lane, inverse):
    """Compute a chunk's bottom vertices; return (AND, OR) of their outcodes: left, right, above, below, too near."""
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
        lane[X1 + n], lane[Y1 + n] = np.float32(u), np.float32(v)
        inverse[STRIDE + n] = one if pz >= near else 0.0
        side = (u < 128.0) * 1 + (u > last_j * 256.0 + 128.0) * 2 + (v < 128.0) * 4 + (v > last_i * 256.0 + 128.0) * 8
        code = BEHIND if pz < near else side
        common, some = common & code, some | code
    return common, some


def _cover_source(ax, ay, bx, by, cx, cy, cull, last_j, last_i):
    """Return (NONE, ONE or MORE pixels, column and row of the one, edge functions b and c there ≥ 0, signed area)."""
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
    ux, uy, vx, vy = ux * sign, uy * sign, vx * sign, vy * sign
    px, py = j0 * FPIXEL + FHALF - ax, i0 * FPIXEL + FHALF - ay
    wb, wc = vy * px - vx * py, ux * py - uy * px
    wa = area * sign - wb - wc
    # Top-left rule: on an edge that does not own its points, the edge function must be at least 1.
    dx, dy = vx - ux, vy - uy
    least_a = F0 if (dy < F0) | ((dy == F0) & (dx > F0)) else F1
    least_b = F0 if (vy > F0) | ((vy == F0) & (vx < F0)) else F1
    least_c = F0 if (uy < F0) | ((uy == F0) & (ux > F0)) else F1
    ra, rb, rc = wa - least_a, wb - least_b, wc - least_c
    right_b, right_c, down_b, down_c = vy * FPIXEL, -uy * FPIXEL, -vx * FPIXEL, ux * FPIXEL
    right_a, down_a = -right_b - right_c, -down_b - down_c
    here = min(ra, rb, rc) >= F0
    right = (min(ra + right_a, rb + right_b, rc + right_c) >= F0) & (j1 > j0)
    down = (min(ra + down_a, rb + down_b, rc + down_c) >= F0) & (i1 > i0)
    both = (min(ra + right_a + down_a, rb + right_b + down_b, rc + right_c + down_c) >= F0) & (j1 > j0) & (i1 > i0)
    count = np.int32(here) + np.int32(right) + np.int32(down) + np.int32(both)
    away = (j1 < j0) | (i1 < i0) | (dead & ~large)
    kind = np.int32(NONE if away else (MORE if large | (count > ONE) else count))
    step_j, step_i = F1 if right | both else F0, F1 if down | both else F0
    wb, wc = wb + step_j * right_b + step_i * down_b, wc + step_j * right_c + step_i * down_c
    return kind, np.int32(j0 + step_j), np.int32(i0 + step_i), wb, wc, area


_cover = kernel(_cover_source, inline="always")


@kernel
def _cover_chunk(half, lane, cull, last_j, last_i, out):
    """Compute what the triangles (tl, bl, tr), or (tr, bl, br), of a chunk cover: out int32 of kinds, columns, rows."""
    if half == 0:
        for n in range(CHUNK):
            out[n], out[n + CHUNK], out[n + 2 * CHUNK], lane[WB + n], lane[WC + n], lane[AREA + n] = _cover(
                lane[X0 + n], lane[Y0 + n], lane[X1 + n], lane[Y1 + n], lane[X0 + n + 1], lane[Y0 + n + 1],
                cull, last_j, last_i,
            )  # fmt: skip
    else:
        for n in range(CHUNK):
            out[n], out[n + CHUNK], out[n + 2 * CHUNK], lane[WB + n], lane[WC + n], lane[AREA + n] = _cover(
                lane[X0 + n + 1], lane[Y0 + n + 1], lane[X1 + n], lane[Y1 + n], lane[X1 + n + 1], lane[Y1 + n + 1],
                cull, last_j, last_i,
            )  # fmt: skip


@kernel
def _cover_cut(inverse, half, cells, out):
    """Mark triangles that cross the near plane for `_draw`, and drop those nearer than it."""
    for n in range(cells):
        inside = (inverse[n + half] > 0) + (inverse[STRIDE + n] > 0) + (inverse[half * STRIDE + n + 1] > 0)
        if inside < 3:
            out[n] = MORE if inside else NONE


@kernel
def _values(lane, inverse_a, inverse_b, inverse_c):
    """Compute 1/z at the pixel of each triangle of a chunk, summed in the order of the reference renderer."""
    for n in range(CHUNK):
        wb, wc, area = np.float64(lane[WB + n]), np.float64(lane[WC + n]), np.float64(lane[AREA + n])
        size = abs(area)
        b, c = wb * inverse_b[n], wc * inverse_c[n]
        total = (size - wb - wc) * inverse_a[n] + (b if area > 0 else c) + (c if area > 0 else b)
        lane[VALUE + n] = np.float32(total / size)


@kernel
def _sort(out, hidden, drawn_hidden, curtains_end, cells, ones, mores):
    """List the triangles of a chunk that cover one pixel, and those that cover more; return the length of each list.

    Branch-free. A curtain that ends counts as covering more: only the slower path checks where it ends.
    """
    one, more = 0, 0
    for n in range(cells):
        drawn = drawn_hidden | ~hidden[n]
        slow = curtains_end & hidden[n]
        ones[one] = n
        one += (out[n] == ONE) & drawn & ~slow
        mores[more] = n
        more += ((out[n] == MORE) | ((out[n] == ONE) & slow)) & drawn
    return one, more


@kernel
def _fill_exact(n, half, lane, inverse, depth_a, depth_b, depth_c, reach, face, cull, keys):
    """Draw triangle n of a chunk if its corners are in front of the camera and exact in float32; return whether so."""
    a, b, c = n + half, n, half * 2 * STRIDE + n + 1
    ia, ib, ic = inverse[a], inverse[STRIDE + n], inverse[half * STRIDE + n + 1]
    ax, ay = np.float64(lane[X0 + a]), np.float64(lane[Y0 + a])
    bx, by = np.float64(lane[X1 + b]), np.float64(lane[Y1 + b])
    cx, cy = np.float64(lane[X0 + c]), np.float64(lane[Y0 + c])
    exact = max(abs(ax), abs(ay), abs(bx), abs(by), abs(cx), abs(cy)) < EXACT and ia > 0 and ib > 0 and ic > 0
    if exact:
        least = np.float64(min(depth_a, depth_b, depth_c))
        ha = _beyond(np.float64(depth_a), least, reach)
        hb = _beyond(np.float64(depth_b), least, reach)
        hc = _beyond(np.float64(depth_c), least, reach)
        _fill(ax, ay, ia, ha, bx, by, ib, hb, cx, cy, ic, hc, face, cull, keys)
    return exact


@kernel
def _draw_cap(cap, z, rays_x, rays_y, centre, rotation, shift, camera, near, reach, cull, keys):
    """Draw the faces of the cap, whose ids follow those of the grid."""
    first, width = 2 * (z.shape[0] - 1) * (z.shape[1] - 1), z.shape[1]
    for k in range(len(cap)):
        a, b, c = np.int64(cap[k, 0]), np.int64(cap[k, 1]), np.int64(cap[k, 2])
        corners = (divmod(a, width), divmod(b, width), divmod(c, width))
        _draw(corners, z, rays_x, rays_y, centre, rotation, shift, camera, near, reach, first + k, cull, keys)


@kernel
def rasterise(
    z, rays_x, rays_y, rotation, shift, camera, near, occluded, cap, centre, cull, draw_occluded, reach, keys
):  # fmt: skip
    """Draw all faces of a grid and its cap into keys int64 [H, W], which stay 0 where there is no face.

    Args:
        z: float32 [rows + 1, columns + 1]; rays_x, rays_y: float64, K⁻¹ (u, v, 1) of its columns and rows.
        rotation, shift: float64 [9], row by row, and [3], from the source's to the target's axes.
        camera: float64 [4]: fx, fy, cx, cy of the target; near: its near plane. occluded: bool [2, rows, columns].
        cap: int32 [C, 3] faces of the cap; centre: float64 [3], its centre in the source's axes.
        cull: skip back faces. draw_occluded: also draw occluded faces and the cap.
        reach: an occluded face ends at (1 + reach) × its least depth; negative: it does not end.
    """
    rows, columns = z.shape[0] - 1, z.shape[1] - 1
    last_i, last_j = np.float32(keys.shape[0] - 1), np.float32(keys.shape[1] - 1)
    lane, inverse = np.zeros(8 * STRIDE, np.float32), np.zeros(2 * STRIDE)
    out, ones, mores = np.zeros(3 * CHUNK, np.int32), np.zeros(CHUNK + 1, np.int64), np.zeros(CHUNK + 1, np.int64)
    for start in range(0, columns, CHUNK):
        cells = min(CHUNK, columns - start)
        common, some = 0, 0
        for i in range(rows + 1):
            lane[: 2 * STRIDE], inverse[:STRIDE] = lane[2 * STRIDE : 4 * STRIDE], inverse[STRIDE:]
            top_common, top_some = common, some
            common, some = _vertices(
                z[i, start : start + cells + 1], rays_x[start:], rays_y[i], rotation, shift, camera, near,
                last_j, last_i, lane, inverse,
            )  # fmt: skip
            if i == 0 or common & top_common:
                continue
            for half in range(2):
                _cover_chunk(half, lane, cull, last_j, last_i, out)
                if (some | top_some) & BEHIND:
                    _cover_cut(inverse, half, cells, out)
                hidden = occluded[half, i - 1, start : start + cells]
                one, more = _sort(out, hidden, draw_occluded, reach >= 0, cells, ones, mores)
                first_face = (half * rows + i - 1) * columns + start
                if one:
                    _values(lane, inverse[half:], inverse[STRIDE:], inverse[half * STRIDE + 1 :])
                for n in ones[:one]:
                    pixel = out[n + 2 * CHUNK], out[n + CHUNK]
                    key = np.int64(np.float32(lane[VALUE + n]).view(np.int32)) << 32 | (LAST_ID - first_face - n)
                    keys[pixel] = max(keys[pixel], key)
                for n in mores[:more]:
                    face, j, end = first_face + n, start + n, reach if hidden[n] else -1.0
                    za, zb, zc = z[i - 1, j + half], z[i, j], z[i - 1 + half, j + 1]
                    if not _fill_exact(n, half, lane, inverse, za, zb, zc, end, face, cull, keys):
                        corners = ((i - 1, j + half), (i, j), (i - 1 + half, j + 1))
                        _draw(corners, z, rays_x, rays_y, centre, rotation, shift, camera, near, end, face, cull, keys)
    if draw_occluded:
        _draw_cap(cap, z, rays_x, rays_y, centre, rotation, shift, camera, near, reach, cull, keys)
