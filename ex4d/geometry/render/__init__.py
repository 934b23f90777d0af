"""One render contract, three implementations: `reference` (slow, clear), `cpu` (numba), `nvdiffrast` (CUDA).

The contract. In camera axes, triangles are clipped at the near plane (1/1000 of the mesh's least depth); neighbours
share the cut points. Vertices are then projected and snapped to 1/256 px (round half up). A pixel belongs to a triangle
if its centre (j + 0.5, i + 0.5) lies inside; by the top-left rule, a centre on an edge belongs to exactly one of two
neighbours. The nearest face wins: the one with the largest float32 1/z, interpolated linearly in image space between
the snapped vertices; of equal ones, the lowest face id. Colour and visibility are then shaded once per pixel from the
unsnapped triangle, by homogeneous barycentrics (perspective-correct, and defined for triangles that cross the near
plane), clamped to [0, 1] because snapping may move an edge past the pixel.

If a profile sets `curtain_reach`, an occluded face ends at (1 + reach) × its least source depth and is not drawn
beyond. (Source depth − end) · 1/z is linear in image space between the snapped vertices, and its sign at the pixel
centre decides. The camera may then look into the volume, so back faces are culled.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import Camera, check_intrinsics, pixel_rays, relative_to
from ex4d.geometry.mesh import DWMesh, Profile, build, profile_of
from ex4d.geometry.profiles import FIRST_FRAMES
from ex4d.geometry.render import cpu, nvdiffrast, reference
from ex4d.geometry.render.rendered import Rendered

BACKENDS = {"reference": reference.render, "cpu": cpu.render, "nvdiffrast": nvdiffrast.render}


def choose_backend(name: str = "auto") -> str:
    """Return a key of BACKENDS; "auto" is nvdiffrast if it and CUDA are available, else cpu. Raises ConfigError."""
    if name == "auto":
        found = importlib.util.find_spec("nvdiffrast")
        if found is None or found.origin is None:  # a clone in the working directory is a folder of that name
            return "cpu"
        import torch

        return "nvdiffrast" if torch.cuda.is_available() else "cpu"
    if name not in BACKENDS:
        raise ConfigError("backend", name, f"auto, {', '.join(BACKENDS)}")
    return name


def render(mesh: DWMesh, camera: Camera, backend: str = "auto") -> Rendered:
    """Render `mesh` from `camera` (world = the mesh's source camera).

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
    valid: np.ndarray | None = None,
    first_frame: str = "exact",
) -> tuple[np.ndarray, np.ndarray]:
    """Render each frame's mesh from its own camera: (cond_video uint8 [T, H, W, 3], visible bool [T, H, W]).

    For a camera at the source's position, even if it turns or zooms, the source frame is resampled instead: rendering
    the mesh would leave holes along depth edges. The released profile does so for frame 0 only, as the released code.

    Args:
        frames: uint8 [T, H, W, 3]. z_depth: [T, H, W], finite and positive.
        K: [3, 3] of the source, and of the target unless `view_K` is given.
        w2c: [T, 4, 4], world = the source camera of frame 0.
        profile: a key of mesh.PROFILES, or a Profile.
        backend: a key of BACKENDS or "auto".
        source_w2c: [T, 4, 4] poses of a source camera that moves, in the world and unit of w2c; None: it does not move.
        view_K: [3, 3] or [T, 3, 3] of the target: a zoom.
        valid: bool [T, H, W], True where depth is known; None: everywhere. Unknown pixels are visible in frame 0 only.
        first_frame: "exact": as above; "drawn": if the camera moves later, render the mesh of frame 0, too.

    Raises:
        BadSample: invalid depth, or shapes that do not match.
        ConfigError: unknown profile or backend, bad cameras.
    """
    frames, z_depth = np.asarray(frames), np.asarray(z_depth)
    _check_shapes(frames, z_depth, valid)
    K = check_intrinsics(K)
    w2c, view_K = _checked_cameras(len(frames), w2c, K if view_K is None else view_K)
    if source_w2c is not None:
        w2c = relative_to(w2c, source_w2c)
    if first_frame not in FIRST_FRAMES:
        raise ConfigError("first_frame", first_frame, f"one of {', '.join(FIRST_FRAMES)}")
    chosen = choose_backend(backend)
    profile = profile_of(profile) if isinstance(profile, str) else profile
    if chosen == "nvdiffrast":
        cond_video, visible = nvdiffrast.warp(frames, z_depth, K, w2c, profile, view_K, valid)
    else:
        cond_video, visible = _draw(frames, z_depth, K, w2c, profile, view_K, valid, chosen)
    for t in _unmoved(w2c, profile, first_frame):
        known = np.ones(z_depth[t].shape, bool) if valid is None or t == 0 else valid[t]
        cond_video[t], visible[t] = resampled(frames[t], known, K, Camera(view_K[t], w2c[t], known.shape))
    return cond_video, visible


def _draw(
    frames: np.ndarray,
    z_depth: np.ndarray,
    K: np.ndarray,
    w2c: np.ndarray,
    profile: Profile,
    view_K: np.ndarray,
    valid: np.ndarray | None,
    backend: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Render each frame's mesh: (colours uint8 [T, H, W, 3], visible bool [T, H, W]); view_K [T, 3, 3]."""
    colours, visible = np.zeros_like(frames), np.zeros(z_depth.shape, bool)
    for t, frame in enumerate(frames):
        camera = Camera(view_K[t], w2c[t], (frame.shape[0], frame.shape[1]))
        known = None if valid is None else valid[t]
        view = render(build(frame, z_depth[t], K, profile, valid=known), camera, backend)
        colours[t], visible[t] = view.colour, view.visible_mask
    return colours, visible


def _check_shapes(frames: np.ndarray, z_depth: np.ndarray, valid: np.ndarray | None) -> None:
    """Raise BadSample unless frames [T, H, W, 3], z_depth [T, H, W] and valid [T, H, W] match."""
    if frames.ndim != 4 or frames.shape[:3] != z_depth.shape:
        raise BadSample("depth_shape", f"frames {list(frames.shape)}, depth {list(z_depth.shape)}")
    if valid is not None and valid.shape != z_depth.shape:
        raise BadSample("depth_shape", f"valid {list(valid.shape)}, depth {list(z_depth.shape)}")


def _checked_cameras(num_frames: int, w2c: np.ndarray, view_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (w2c [T, 4, 4], view_K [T, 3, 3]), float64, one of each per frame. Raises ConfigError for other shapes."""
    w2c, view_K = np.asarray(w2c, np.float64), np.asarray(view_K, np.float64)
    if w2c.shape != (num_frames, 4, 4):
        raise ConfigError("w2c", list(w2c.shape), f"[{num_frames}, 4, 4], one pose per frame")
    if view_K.shape not in ((3, 3), (num_frames, 3, 3)):
        raise ConfigError("view_K", list(view_K.shape), f"[3, 3] or [{num_frames}, 3, 3]")
    return w2c, np.broadcast_to(view_K, (num_frames, 3, 3))


def _unmoved(w2c: np.ndarray, profile: Profile, first_frame: str) -> list[int]:
    """Return the indices of the frames whose camera is at the source's position: those are resampled."""
    still = np.abs(w2c[:, :3, 3]).max(axis=1, initial=0.0) < 1e-9
    if profile.vertex_alpha:
        still[1:] = False
    if first_frame == "drawn" and not still.all():
        still[0] = False
    return [int(t) for t in np.flatnonzero(still)]


def resampled(frame: np.ndarray, known: np.ndarray, K: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Resample a frame for a camera at the source's position: (colours uint8 [H, W, 3], visible bool [H, W]).

    Args:
        frame: uint8 [H, W, 3]. known: bool [H, W], which of its pixels may be shown. K: [3, 3] of the source.
        camera: may be turned or have another focal length; its translation is ignored.

    Returns: colours are zero where not visible.
    """
    import cv2

    height, width = frame.shape[:2]
    if np.abs(camera.w2c[:3, :3] - np.eye(3)).max() < 1e-9 and np.allclose(camera.K, K, rtol=1e-12):
        return frame * known[..., None], known.copy()
    rays = pixel_rays(camera.size, camera.K) @ camera.w2c[:3, :3] @ K.T
    z = np.where(rays[..., 2] > 0, rays[..., 2], np.inf)
    x, y = rays[..., 0] / z, rays[..., 1] / z
    inside = (rays[..., 2] > 0) & (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    at = ((x - 0.5).astype(np.float32), (y - 0.5).astype(np.float32))
    colours = cv2.remap(frame, *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    # Interpolation must not mix in pixels of unknown depth.
    share = cv2.remap(known.astype(np.float32), *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    visible = inside & (share > 1 - 1e-3)
    return colours * visible[..., None], visible
