"""The render contract in plain float64 NumPy, one triangle at a time. Slow: for tests and small pictures."""

from __future__ import annotations

import numpy as np

from ex4d.geometry.camera import Camera
from ex4d.geometry.mesh import DWMesh
from ex4d.geometry.render.rendered import NEAR_RATIO, SUBPIXELS, Rendered


def render(mesh: DWMesh, camera: Camera, snap: bool = True) -> Rendered:
    """Render `mesh` from `camera`. `snap=False`: do not round vertices to 1/256 px."""
    points = mesh.vertices @ camera.w2c[:3, :3].T + camera.w2c[:3, 3]
    source_z, reach = mesh.vertices[:, 2], mesh.profile.curtain_reach
    near = NEAR_RATIO * float(mesh.z_depth.min())
    inverse_depth = np.zeros(camera.size, np.float32)
    face_id = np.full(camera.size, -1, np.int32)
    for face, corners in enumerate(mesh.faces):
        if mesh.occluded[face] and not mesh.profile.keep_occluded:
            continue
        beyond = np.zeros(3)
        if mesh.occluded[face] and reach is not None:
            beyond = source_z[corners] - (1 + reach) * source_z[corners].min()
        polygon = clip_near(np.column_stack([points[corners], beyond]), near)
        if len(polygon) < 3:
            continue
        uv, inverse = to_picture(polygon, camera, snap)
        for k in range(1, len(polygon) - 1):
            pick = [0, k, k + 1]
            if reach is None or signed_area(uv[pick]) < 0:
                draw_triangle(uv[pick], inverse[pick], polygon[pick, 3], face, inverse_depth, face_id)
    return shade(mesh, camera, points, inverse_depth, face_id)


def clip_near(polygon: np.ndarray, near: float) -> np.ndarray:
    """Clip a triangle float64 [3, C] to z ≥ near; return [0, 3 or 4, C] with the same winding.

    The result starts at the corner that is alone on its side, or at the cut next to it: this fixes how a quad is split.
    """
    inside = polygon[:, 2] >= near
    if inside.all():
        return polygon
    first = int(np.argmin(inside) if inside.sum() == 2 else np.argmax(inside))
    polygon, inside = np.roll(polygon, -first, 0), np.roll(inside, -first)
    kept = []
    for k in range(3):
        a, b = k, (k + 1) % 3
        if inside[a]:
            kept.append(polygon[a])
        if inside[a] != inside[b]:
            # Always from the inner end, so that both faces of the edge compute the same point.
            p, q = (polygon[a], polygon[b]) if inside[a] else (polygon[b], polygon[a])
            cut = p + (near - p[2]) / (q[2] - p[2]) * (q - p)
            cut[2] = near
            kept.append(cut)
    return np.array(kept).reshape(-1, polygon.shape[1])


def to_picture(points: np.ndarray, camera: Camera, snap: bool) -> tuple[np.ndarray, np.ndarray]:
    """Project points in camera axes to (uv [N, 2] in 1/256 px, 1/z [N])."""
    K = camera.K
    inverse = 1 / points[:, 2]
    u = (K[0, 0] * points[:, 0] * inverse + K[0, 2]) * SUBPIXELS
    v = (K[1, 1] * points[:, 1] * inverse + K[1, 2]) * SUBPIXELS
    uv = np.stack([u, v], 1)
    return (np.floor(uv + 0.5) if snap else uv), inverse


def signed_area(uv: np.ndarray) -> float:
    """Return twice the area of a triangle uv [3, 2] in the picture: negative where it shows its front."""
    return (uv[1, 0] - uv[0, 0]) * (uv[2, 1] - uv[0, 1]) - (uv[1, 1] - uv[0, 1]) * (uv[2, 0] - uv[0, 0])


def draw_triangle(
    uv: np.ndarray, inverse: np.ndarray, beyond: np.ndarray, face: int, inverse_depth: np.ndarray, face_id: np.ndarray
) -> None:
    """Draw one triangle (uv [3, 2] in 1/256 px, 1/z [3]) into inverse_depth and face_id, in place.

    beyond [3]: how far its corners lie beyond the source depth where it ends; drawn where this is not positive.
    """
    height, width = face_id.shape
    area = signed_area(uv)
    if area == 0:
        return
    if area < 0:
        uv, inverse, beyond, area = uv[[0, 2, 1]], inverse[[0, 2, 1]], beyond[[0, 2, 1]], -area
    half = SUBPIXELS // 2
    first = np.ceil((uv.min(0) - half) / SUBPIXELS)
    last = np.floor((uv.max(0) - half) / SUBPIXELS)
    j0, i0 = (int(x) for x in np.maximum(first, 0))
    j1, i1 = (int(x) for x in np.minimum(last, (width - 1, height - 1)))
    if j1 < j0 or i1 < i0:
        return
    x = np.arange(j0, j1 + 1)[None, :] * float(SUBPIXELS) + half
    y = np.arange(i0, i1 + 1)[:, None] * float(SUBPIXELS) + half
    inside = np.ones((i1 - i0 + 1, j1 - j0 + 1), bool)
    weights = []
    for a, b in ((1, 2), (2, 0), (0, 1)):
        dx, dy = uv[b] - uv[a]
        edge = dx * (y - uv[a, 1]) - dy * (x - uv[a, 0])
        top_left = dy < 0 or (dy == 0 and dx > 0)
        inside &= edge >= 0 if top_left else edge > 0
        weights.append(edge)
    ends = beyond * inverse
    inside &= weights[0] * ends[0] + weights[1] * ends[1] + weights[2] * ends[2] <= 0
    value = (weights[0] * inverse[0] + weights[1] * inverse[1] + weights[2] * inverse[2]) / area
    value = value.astype(np.float32)
    block = np.s_[i0 : i1 + 1, j0 : j1 + 1]
    wins = inside & (value > inverse_depth[block])  # faces come in order of id: of equal depths the lowest stays
    inverse_depth[block][wins] = value[wins]
    face_id[block][wins] = face


def shade(mesh: DWMesh, camera: Camera, points: np.ndarray, inverse_depth: np.ndarray, face_id: np.ndarray) -> Rendered:
    """Shade the nearest faces: colours, depth, visibility."""
    colour = np.zeros((*camera.size, 3), np.uint8)
    visible = np.zeros(camera.size, bool)
    row, column = np.nonzero(face_id >= 0)
    corners = mesh.faces[face_id[row, column]]
    K = camera.K
    ray = np.stack([(column + 0.5 - K[0, 2]) / K[0, 0], (row + 0.5 - K[1, 2]) / K[1, 1], np.ones(len(row))], 1)
    a, b, c = (points[corners[:, k]] for k in range(3))
    weights = np.stack([(ray * np.cross(p, q)).sum(1) for p, q in ((b, c), (c, a), (a, b))], 1)
    facing = weights.sum(1) < 0  # ray · normal: the outer side faces the ray's origin
    weights = barycentrics(weights)
    shown = np.concatenate(
        [mesh.colours.reshape(-1, 3), np.zeros((len(mesh.vertices) - mesh.z_depth.size, 3), np.uint8)]
    )
    if mesh.profile.vertex_alpha:
        alpha = mesh.vertex_alpha.reshape(-1)
        shown = shown * alpha[:, None]
        seen = (weights * alpha[corners]).sum(1) * 255 > 125  # the released threshold
    else:
        seen = ~mesh.occluded[face_id[row, column]]
    if not mesh.profile.two_sided:
        seen &= facing
    mixed = (weights[:, :, None] * shown[corners]).sum(1)
    visible[row, column] = seen
    colour[row[seen], column[seen]] = np.floor(mixed[seen] + 0.5)
    with np.errstate(divide="ignore"):
        z_depth = (np.float32(1) / inverse_depth).astype(np.float32)
    return Rendered(colour, z_depth, visible, face_id)


def barycentrics(weights: np.ndarray) -> np.ndarray:
    """Return weights [N, 3] of either sign clamped to [0, 1] and scaled to sum 1; thirds where all are zero."""
    total = weights.sum(1, keepdims=True)
    clamped = np.maximum(weights * np.sign(total), 0)
    total = clamped.sum(1, keepdims=True)
    return np.where(total > 0, clamped / np.where(total > 0, total, 1), 1 / 3)
