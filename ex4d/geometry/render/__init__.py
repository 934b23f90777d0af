"""One render contract, three implementations: `reference` (slow, clear), `cpu` (numba), `nvdiffrast` (CUDA).

The contract. A vertex goes to the camera's axes, to the picture, and is snapped to 1/256 px (round half up). Before
that, triangles are cut at the near plane (1/1000 of the mesh's least depth) in homogeneous space; neighbours share the
cut points. A pixel belongs to a triangle when its centre (j + 0.5, i + 0.5) lies inside, edges by the top-left rule, so
that of two neighbours exactly one gets it. Nearest wins: the largest float32 1/z, interpolated linearly in the picture
between the snapped vertices; where these are equal the lowest face id wins. Colour and visibility are then shaded once
a pixel from the unsnapped triangle, by homogeneous barycentrics (perspective-correct, and defined for triangles that
cross the near plane), clamped to [0, 1] because snapping may move an edge past the pixel.

Where a profile's `curtain_reach` bounds them, an occluded face ends at (1 + reach) × its least source depth: what of it
lies farther is not drawn. Source depth less that end, times 1/z, is linear in the picture between the snapped vertices,
and its sign at the pixel centre decides. One may then look into the volume, and no face is drawn from behind.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import Camera, check_intrinsics, relative_to
from ex4d.geometry.mesh import DWMesh, Profile, build, profile_of
from ex4d.geometry.render import cpu, nvdiffrast, reference
from ex4d.geometry.render.rendered import Rendered

BACKENDS = {"reference": reference.render, "cpu": cpu.render, "nvdiffrast": nvdiffrast.render}


def choose_backend(name: str = "auto") -> str:
    """Return a key of BACKENDS; "auto" is nvdiffrast where it and CUDA are there, else cpu. Raises ConfigError."""
    if name == "auto":
        return "nvdiffrast" if _cuda_ready() else "cpu"
    if name not in BACKENDS:
        raise ConfigError("backend", name, f"auto, {', '.join(BACKENDS)}")
    return name


def _cuda_ready() -> bool:
    if importlib.util.find_spec("nvdiffrast") is None:
        return False
    import torch

    return torch.cuda.is_available()


def render(mesh: DWMesh, camera: Camera, backend: str = "auto") -> Rendered:
    """Return what `camera` sees of `mesh` (world = the mesh's source camera).

    Raises:
        ConfigError: unknown backend, or nvdiffrast without its package or a CUDA device.
    """
    return BACKENDS[choose_backend(backend)](mesh, camera)


def warp_video(
    frames: np.ndarray,
    z_depth: np.ndarray,
    K: np.ndarray,
    w2c: np.ndarray,
    profile: str | Profile = "default",
    backend: str = "auto",
    source_w2c: np.ndarray | None = None,
    view_K: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (cond_video uint8 [T, H, W, 3], visible bool [T, H, W]): each frame's mesh seen from its own camera.

    Frame 0 is set to the source frame and a full mask when its camera is the source camera, as in the released code:
    drawn, the identity view has holes along depth edges and on the border.

    Args:
        frames: uint8 [T, H, W, 3].
        z_depth: [T, H, W], finite and positive.
        K: [3, 3] of the source, and of the target unless `view_K` is given.
        w2c: [T, 4, 4], world = the source camera of frame 0.
        profile: a key of mesh.PROFILES, or a Profile.
        backend: a key of BACKENDS or "auto".
        source_w2c: [T, 4, 4] poses of a source camera that moves, in the same world and unit of length as w2c; None: it
            stands still.
        view_K: [3, 3] or [T, 3, 3] of the target: a zoom.

    Raises:
        BadSample: depth that is no depth, or shapes that do not fit.
        ConfigError: unknown profile or backend, bad cameras.
    """
    frames, z_depth = np.asarray(frames), np.asarray(z_depth)
    w2c = np.asarray(w2c, np.float64)
    if frames.ndim != 4 or frames.shape[:3] != z_depth.shape:
        raise BadSample("depth_shape", f"frames {list(frames.shape)}, depth {list(z_depth.shape)}")
    if w2c.shape != (len(frames), 4, 4):
        raise ConfigError("w2c", list(w2c.shape), f"[{len(frames)}, 4, 4], one pose a frame")
    if source_w2c is not None:
        w2c = relative_to(w2c, source_w2c)
    K = check_intrinsics(K)
    view_K = np.asarray(K if view_K is None else view_K, np.float64)
    if view_K.shape not in ((3, 3), (len(frames), 3, 3)):
        raise ConfigError("view_K", list(view_K.shape), f"[3, 3] or [{len(frames)}, 3, 3]")
    view_K = np.broadcast_to(view_K, (len(frames), 3, 3))
    chosen = choose_backend(backend)
    profile = profile_of(profile) if isinstance(profile, str) else profile
    if chosen == "nvdiffrast":
        cond_video, visible = nvdiffrast.warp(frames, z_depth, K, w2c, profile, view_K)
    else:
        cond_video, visible = np.zeros_like(frames), np.zeros(z_depth.shape, bool)
        for t, frame in enumerate(frames):
            camera = Camera(view_K[t], w2c[t], (frame.shape[0], frame.shape[1]))
            seen = render(build(frame, z_depth[t], K, profile), camera, chosen)
            cond_video[t], visible[t] = seen.colour, seen.visible_mask
    if len(frames) and np.abs(w2c[0] - np.eye(4)).max() < 1e-9 and np.allclose(view_K[0], K, rtol=1e-12):
        cond_video[0], visible[0] = frames[0], True
    return cond_video, visible
