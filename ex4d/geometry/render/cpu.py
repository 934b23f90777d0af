"""The render contract on one CPU core, compiled by numba: the default where there is no GPU."""

from __future__ import annotations

import numpy as np

from ex4d.geometry.camera import Camera
from ex4d.geometry.mesh import DWMesh, cap_faces, contains
from ex4d.geometry.render.cpu_kernels import filled, shade
from ex4d.geometry.render.cpu_raster import rasterise
from ex4d.geometry.render.rendered import NEAR_RATIO, Rendered


def render(mesh: DWMesh, camera: Camera) -> Rendered:
    """Render `mesh` from `camera`, in one thread, which releases the GIL: run frames in parallel threads."""
    profile = mesh.profile
    keys, rays_x, rays_y, rotation, target, cap = _rasterised(mesh, camera)
    alpha = mesh.vertex_alpha if profile.vertex_alpha else np.ones((1, 1), bool)
    seen = Rendered(
        np.empty((*camera.size, 3), np.uint8),
        np.empty(camera.size, np.float32),
        np.empty(camera.size, bool),
        np.empty(camera.size, np.int32),
    )
    shade(
        keys, mesh.z_depth, rays_x, rays_y, rotation, camera.eye, target, mesh.colours, alpha, mesh.face_occluded, cap,
        profile.two_sided, profile.vertex_alpha, seen.colour, seen.z_depth, seen.visible_mask, seen.face_id,
    )  # fmt: skip
    return seen


def render_depth(mesh: DWMesh, camera: Camera) -> np.ndarray:
    """Render only `render(mesh, camera).z_depth`, float32 [H, W], +inf where there is no face; skip shading."""
    keys, *_ = _rasterised(mesh, camera)
    with np.errstate(divide="ignore"):  # a key of 0: no face
        return np.float32(1) / (keys >> 32).astype(np.int32).view(np.float32)


def render_visible(mesh: DWMesh, camera: Camera) -> np.ndarray:
    """Render only `render(mesh, camera).visible_mask`, bool [H, W]; skip shading unless the profile needs it."""
    if mesh.profile.vertex_alpha or mesh.profile.two_sided:
        return render(mesh, camera).visible_mask
    keys, *_ = _rasterised(mesh, camera)
    visible = np.empty(camera.size, bool)
    filled(keys, mesh.face_occluded, visible)
    return visible


def _rasterised(mesh: DWMesh, camera: Camera) -> tuple[np.ndarray, ...]:
    """Rasterise; return (keys int64 [H, W] of the nearest faces, rays_x, rays_y, rotation, target, cap) for `shade`."""
    profile = mesh.profile
    height, width = mesh.size
    rays_x = (np.arange(width) + profile.pixel_offset - mesh.K[0, 2]) / mesh.K[0, 0]
    rays_y = (np.arange(height) + profile.pixel_offset - mesh.K[1, 2]) / mesh.K[1, 1]
    rotation, shift = np.ascontiguousarray(camera.w2c[:3, :3]), np.ascontiguousarray(camera.w2c[:3, 3])
    corners = np.array([[rays_x[k], rays_y[k], 1] for k in (0, -1)]) * mesh.boundary_depth
    cap = cap_faces(mesh.size, profile.fan_cap)
    target = np.array([camera.K[0, 0], camera.K[1, 1], camera.K[0, 2], camera.K[1, 2]])
    near = NEAR_RATIO * float(mesh.z_depth.min())
    # From outside a closed volume, the nearest face always shows its front, so back faces can be culled.
    reach = -1.0 if profile.curtain_reach is None else profile.curtain_reach
    closed = profile.fan_cap and profile.keep_occluded
    cull = reach >= 0 or (closed and not contains(mesh, camera.eye))
    keys = np.zeros(camera.size, np.int64)
    rasterise(
        mesh.z_depth, rays_x, rays_y, rotation.ravel(), shift, target, near, mesh.face_occluded, cap, corners.mean(0),
        cull, profile.keep_occluded, reach, keys,
    )  # fmt: skip
    return keys, rays_x, rays_y, rotation, target, cap
