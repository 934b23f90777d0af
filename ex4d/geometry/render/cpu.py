"""The render contract on one CPU core, compiled by numba: the default where there is no GPU."""

from __future__ import annotations

import numpy as np

from ex4d.geometry.camera import Camera
from ex4d.geometry.mesh import DWMesh, cap_faces, contains
from ex4d.geometry.render import NEAR_RATIO, Rendered, cpu_kernels


def render(mesh: DWMesh, camera: Camera) -> Rendered:
    """Return what `camera` sees of `mesh`. Releases the GIL: draw frames in parallel threads, not one frame in many."""
    profile = mesh.profile
    height, width = mesh.size
    rays_x = (np.arange(width) + profile.pixel_offset - mesh.K[0, 2]) / mesh.K[0, 0]
    rays_y = (np.arange(height) + profile.pixel_offset - mesh.K[1, 2]) / mesh.K[1, 1]
    rotation, shift = np.ascontiguousarray(camera.w2c[:3, :3]), np.ascontiguousarray(camera.w2c[:3, 3])
    points = cpu_kernels.transform(mesh.z_depth, rays_x, rays_y, rotation, shift)
    cap = cap_faces(mesh.size, profile.fan_cap)
    if profile.fan_cap:
        points = np.concatenate([points, (points[:1] + points[-1:]) / 2])
    target = np.array([camera.K[0, 0], camera.K[1, 1], camera.K[0, 2], camera.K[1, 2]])
    near = NEAR_RATIO * float(mesh.z_depth.min())
    # From outside a closed volume the nearest face always shows its front, so that back faces need not be drawn.
    cull = profile.fan_cap and profile.keep_occluded and not contains(mesh, camera.eye)
    inverse_depth = np.zeros(camera.size, np.float32)
    face_id = np.full(camera.size, -1, np.int32)
    cpu_kernels.rasterise(
        points, mesh.face_occluded, cap, target, near, cull, profile.keep_occluded, inverse_depth, face_id
    )
    alpha = mesh.vertex_alpha.reshape(-1) if profile.vertex_alpha else np.ones(1, bool)
    colours = mesh.colours.reshape(-1, 3)
    colour, visible = cpu_kernels.shade(
        points, colours, alpha, mesh.face_occluded, cap, target, profile.two_sided, profile.vertex_alpha, face_id
    )
    with np.errstate(divide="ignore"):
        return Rendered(colour, 1 / inverse_depth, visible, face_id)
