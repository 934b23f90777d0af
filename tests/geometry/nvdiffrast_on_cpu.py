"""What `nvdiffrast.torch` 0.4.0 computes, plainly and on a CPU: for tests of the backend where there is no GPU.

By its sources (csrc/common/cudaraster, rasterize.cu): positions are clipped to the view, snapped to 1/16 px around the
picture's centre, depth is a 32-bit integer from a float32 z/w at the snapped corners, linear in the picture; the least
wins; barycentrics come from the unsnapped corners; row 0 is at y = −1; the id is the face's number plus one.
"""

from __future__ import annotations

import numpy as np

SUBPIXELS = 16
LEAST, MOST = 2200 << 3, 2**32 - 1 - (2200 << 3)  # CR_DEPTH_MIN, CR_DEPTH_MAX


def clipped(polygon: np.ndarray) -> np.ndarray:
    """Return the part [N, 4] of a polygon in clip space with −w ≤ z ≤ w, and w > 0."""
    for sign in (1.0, -1.0):
        distance = polygon[:, 3] + sign * polygon[:, 2]
        kept = []
        for k in range(len(polygon)):
            a, b = polygon[k], polygon[(k + 1) % len(polygon)]
            da, db = distance[k], distance[(k + 1) % len(polygon)]
            if da >= 0:
                kept.append(a)
            if (da >= 0) != (db >= 0):
                kept.append(a + da / (da - db) * (b - a))
        polygon = np.array(kept).reshape(-1, 4)
        if len(polygon) < 3:
            return polygon[:0]
    return polygon


def covered(snapped: np.ndarray, depth: np.ndarray, size: tuple[int, int]):
    """Return (row, column, depth as integers) of the pixel centres inside a triangle: corners [3, 2] in 1/16 px."""
    height, width = size
    (dx, dy), (ex, ey) = snapped[1] - snapped[0], snapped[2] - snapped[0]
    area = dx * ey - dy * ex
    if area == 0:
        return None
    if area < 0:
        snapped, depth, area = snapped[[0, 2, 1]], depth[[0, 2, 1]], -area
    half = SUBPIXELS // 2
    j0, i0 = np.maximum(np.ceil((snapped.min(0) - half) / SUBPIXELS), 0).astype(int)
    j1, i1 = np.minimum(np.floor((snapped.max(0) - half) / SUBPIXELS), (width - 1, height - 1)).astype(int)
    if j1 < j0 or i1 < i0:
        return None
    i, j = np.mgrid[i0 : i1 + 1, j0 : j1 + 1]
    x, y = j * SUBPIXELS + half, i * SUBPIXELS + half
    inside, weights = np.ones(i.shape, bool), []
    for a, b in ((1, 2), (2, 0), (0, 1)):
        step = snapped[b] - snapped[a]
        edge = step[0] * (y - snapped[a, 1]) - step[1] * (x - snapped[a, 0])
        inside &= edge >= 0 if step[1] < 0 or (step[1] == 0 and step[0] > 0) else edge > 0
        weights.append(edge)
    value = sum(w * float(d) for w, d in zip(weights, depth, strict=True)) / area
    return i[inside], j[inside], value[inside].astype(np.int64)


def fragments(position: np.ndarray, faces: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return int64 [F, 3]: pixel, depth, face of every pixel of every face, nearest first within a pixel."""
    height, width = size
    scale, middle = np.float32((MOST - LEAST) * 0.5), np.float32((MOST + LEAST) * 0.5)
    found = []
    for face, corners in enumerate(faces):
        triangle = position[corners]
        inside = (np.abs(triangle[:, 2]) <= triangle[:, 3]).all()
        polygon = triangle if inside else clipped(triangle.astype(np.float64)).astype(np.float32)
        if len(polygon) < 3:
            continue
        inverse = np.float32(1) / polygon[:, 3]
        half = np.array([width, height]) * SUBPIXELS / 2
        snapped = np.rint(polygon[:, :2] * inverse[:, None] * half.astype(np.float32)).astype(np.int64) + half
        depth = (polygon[:, 2] * scale * inverse + middle).astype(np.float32)
        for k in range(1, len(polygon) - 1):
            pick = [0, k, k + 1]
            hit = covered(snapped[pick], depth[pick], size)
            if hit is not None:
                found.append(np.stack([hit[0] * width + hit[1], hit[2], np.full(len(hit[0]), face)], 1))
    rows = np.concatenate(found) if found else np.zeros((0, 3), np.int64)
    return rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]


def raster(position: np.ndarray, faces: np.ndarray, rows: np.ndarray, layer: int, size: tuple[int, int]) -> np.ndarray:
    """Return float32 [H, W, 4]: two barycentrics, z/w, face + 1, of the `layer`-th depth in each pixel."""
    height, width = size
    out = np.zeros((height * width, 4), np.float32)
    starts = np.flatnonzero(np.diff(rows[:, 0], prepend=-1))
    fresh = np.ones(len(rows), bool)
    fresh[1:] = (np.diff(rows[:, 0]) != 0) | (np.diff(rows[:, 1]) != 0)
    rank = np.cumsum(fresh) - 1
    rank = rank - np.repeat(rank[starts], np.diff(np.append(starts, len(rows))))
    chosen = rows[fresh & (rank == layer)]
    pixel, face = chosen[:, 0], chosen[:, 2]
    fx = (2 * (pixel % width) + 1) / width - 1
    fy = (2 * (pixel // width) + 1) / height - 1
    p = position[faces[face]].astype(np.float64)
    x, y = p[..., 0] - fx[:, None] * p[..., 3], p[..., 1] - fy[:, None] * p[..., 3]
    a = np.stack([x[:, (k + 1) % 3] * y[:, (k + 2) % 3] - y[:, (k + 1) % 3] * x[:, (k + 2) % 3] for k in range(3)], 1)
    b = np.clip(a / a.sum(1, keepdims=True), 0, 1)[:, :2]
    b /= np.maximum(b.sum(1, keepdims=True), 1)
    zw = (p[..., 2] * a).sum(1) / (p[..., 3] * a).sum(1)
    out[pixel] = np.column_stack([b, np.clip(zw, -1, 1), face + 1])
    return out.reshape(height, width, 4)


def rasterize(context, position, faces, resolution, ranges=None, grad_db=True):
    """As `nvdiffrast.torch.rasterize` in its instanced mode: ([B, H, W, 4], derivatives, left out)."""
    with DepthPeeler(context, position, faces, resolution, ranges, grad_db) as peeler:
        return peeler.rasterize_next_layer()


def interpolate(attributes, rast, faces, rast_db=None, diff_attrs=None):
    """As `nvdiffrast.torch.interpolate`: ([B, H, W, C], nothing)."""
    import torch

    _check(attributes.dtype == torch.float32 and attributes.is_contiguous() and rast.is_contiguous())
    index = rast[..., 3].long() - 1
    weights = torch.stack([rast[..., 0], rast[..., 1], 1 - rast[..., 0] - rast[..., 1]], -1)
    corners = faces.long()[index.clamp(min=0)]
    batch = torch.arange(len(rast))[:, None, None, None]
    mixed = (attributes[batch, corners] * weights[..., None]).sum(-2)
    return torch.where(index[..., None] >= 0, mixed, 0.0), attributes.new_zeros((*rast.shape[:3], 0))


class DepthPeeler:
    """As `nvdiffrast.torch.DepthPeeler`."""

    def __init__(self, context, position, faces, resolution, ranges=None, grad_db=True):
        import torch

        _check(position.dtype == torch.float32 and position.ndim == 3 and position.shape[2] == 4)
        _check(faces.dtype == torch.int32 and faces.ndim == 2 and len(faces) > 0 and ranges is None)
        _check(position.is_contiguous() and faces.is_contiguous() and len(resolution) == 2)
        self.position, self.faces, self.size = position.numpy(), faces.numpy(), tuple(resolution)

    def __enter__(self):
        self.rows = [fragments(points, self.faces, self.size) for points in self.position]
        self.layer = 0
        return self

    def __exit__(self, *args):
        self.rows = None

    def rasterize_next_layer(self):
        import torch

        layers = [
            raster(p, self.faces, rows, self.layer, self.size) for p, rows in zip(self.position, self.rows, strict=True)
        ]
        self.layer += 1
        return torch.from_numpy(np.stack(layers)), None


def _check(good: bool) -> None:
    """Reject the input that the extension would reject."""
    if not good:
        raise RuntimeError("nvdiffrast takes contiguous float32 [B, N, 4], int32 [M, 3]")
