"""The render contract on a CUDA GPU by nvdiffrast 0.4.0, which is imported on use; whole trajectories in batches.

Differences from the contract: nvdiffrast snaps to 1/16 px, not to 1/256, and compares depth as integers that come
from a float32 z/w. So silhouettes move by up to 1/16 px, and face ids must not be compared. It is not on the package
index and its licence restricts commercial use: installing it is the user's decision.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ex4d.errors import ConfigError
from ex4d.geometry.camera import Camera
from ex4d.geometry.mesh import DWMesh, Profile, build
from ex4d.geometry.render.rendered import NEAR_RATIO, Rendered

MAX_FACES = 2**24  # ids come back as float32
MAX_LAYERS = 8  # at most this many curtains are peeled; surfaces behind the last stay hidden
BATCH_VERTICES = 4_000_000  # about 0.5 GB of positions, attributes and pictures per batch


@lru_cache(maxsize=1)
def _context() -> tuple[Any, Any]:
    """Return (nvdiffrast.torch, its CUDA context), created once. Raises ConfigError without the package or a GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("backend", "nvdiffrast", "needs a CUDA device; choose cpu")
    try:
        import nvdiffrast.torch as dr
    except ImportError as error:
        how = "pip install --no-build-isolation git+https://github.com/NVlabs/nvdiffrast"
        raise ConfigError("backend", "nvdiffrast", f"not installed ({error}): {how}") from error
    return dr, dr.RasterizeCudaContext(device="cuda")


def release() -> None:
    """Free the rasteriser's buffers, which are no part of PyTorch's memory; the next picture makes others."""
    _context.cache_clear()


def render(mesh: DWMesh, camera: Camera) -> Rendered:
    """Render `mesh` from `camera`. Raises ConfigError without CUDA, without nvdiffrast, or with 2²⁴ faces or more."""
    return render_batch([mesh], [camera])[0]


def warp(
    frames: np.ndarray,
    z_depth: np.ndarray,
    K: np.ndarray,
    w2c: np.ndarray,
    profile: str | Profile,
    view_K: np.ndarray,
    valid: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Render (cond_video uint8 [T, H, W, 3], visible bool [T, H, W]); arguments as in render.warp_video.

    view_K: [T, 3, 3].
    """
    cond_video, visible = np.zeros_like(frames), np.zeros(z_depth.shape, bool)
    height, width = z_depth.shape[1:]
    step = max(1, BATCH_VERTICES // (height * width))
    for start in range(0, len(frames), step):
        span = range(start, min(start + step, len(frames)))
        meshes = [build(frames[t], z_depth[t], K, profile, valid=None if valid is None else valid[t]) for t in span]
        cameras = [Camera(view_K[t], w2c[t], (height, width)) for t in span]
        for t, seen in zip(span, render_batch(meshes, cameras), strict=True):
            cond_video[t], visible[t] = seen.colour, seen.visible_mask
    return cond_video, visible


def render_batch(meshes: list[DWMesh], cameras: list[Camera]) -> list[Rendered]:
    """Render each (mesh, camera) pair: meshes of one size and profile, cameras of one size.

    All meshes of a size share their faces, so they go to the GPU as one instanced batch. The torn profile leaves out
    different faces in each frame, so its frames are rendered one by one.
    """
    if not meshes[0].profile.keep_occluded:
        return [_draw([mesh], [camera], ~mesh.occluded)[0] for mesh, camera in zip(meshes, cameras, strict=True)]
    return _draw(meshes, cameras, None)


def _draw(meshes: list[DWMesh], cameras: list[Camera], drawn: np.ndarray | None) -> list[Rendered]:
    import torch

    dr, context = _context()
    profile, size = meshes[0].profile, cameras[0].size
    ids = np.arange(len(meshes[0].faces)) if drawn is None else np.nonzero(drawn)[0]
    if len(ids) >= MAX_FACES:
        allowed = f"the mesh has {len(ids)} faces, fewer than {MAX_FACES} are possible; choose cpu"
        raise ConfigError("backend", "nvdiffrast", allowed)
    if not len(ids):
        return [_empty(size) for _ in meshes]
    faces = torch.from_numpy(meshes[0].faces[ids]).cuda().contiguous()
    id_of = torch.from_numpy(ids.astype(np.int32)).cuda()
    local = [m.vertices @ c.w2c[:3, :3].T + c.w2c[:3, 3] for m, c in zip(meshes, cameras, strict=True)]
    clips = [_clip_matrix(c, _near(m, p)) for m, c, p in zip(meshes, cameras, local, strict=True)]
    points, clip = torch.from_numpy(np.stack(local)).cuda(), torch.from_numpy(np.stack(clips)).cuda()
    source_z = torch.from_numpy(np.stack([m.vertices[:, 2:] for m in meshes])).cuda().float()
    ones = torch.ones_like(points[..., :1])
    position = (torch.cat([points, ones], -1) @ clip.transpose(1, 2)).float().contiguous()
    attributes = torch.from_numpy(np.stack([_attributes(m) for m in meshes])).cuda()
    attributes = torch.cat([attributes, points[..., 2:].float(), source_z], -1).contiguous()
    occluded = torch.from_numpy(np.stack([m.occluded[ids] for m in meshes])).cuda()
    a, b, c = points[:, faces.long()].unbind(2)
    front = (torch.linalg.cross(b - a, c - a) * a).sum(-1) < 0
    if profile.curtain_reach is None:
        raster, _ = dr.rasterize(context, position, faces, resolution=list(size), grad_db=False)
    else:
        end = torch.where(occluded, (1 + profile.curtain_reach) * source_z[:, faces.long(), 0].amin(2), torch.inf)
        end = torch.where(front, end, -torch.inf)
        raster = _first_before_end(position, faces, size, source_z.contiguous(), end)
    mixed, _ = dr.interpolate(attributes, raster, faces)
    index = raster[..., 3].long() - 1
    hit, index = index >= 0, index.clamp(min=0)
    if profile.vertex_alpha:
        seen = hit & (mixed[..., 3] * 255 > 125)
    else:
        seen = hit & ~occluded.gather(1, index.flatten(1)).view(index.shape)
    if not profile.two_sided:
        seen &= front.gather(1, index.flatten(1)).view(index.shape)
    colour = torch.where(seen[..., None], mixed[..., :3] + 0.5, 0.0).clamp(0, 255).to(torch.uint8).cpu().numpy()
    depth = torch.where(hit, mixed[..., 4], torch.inf).cpu().numpy()
    face_id = torch.where(hit, id_of[index], -1).to(torch.int32).cpu().numpy()
    visible = seen.cpu().numpy()
    return [Rendered(colour[n], depth[n], visible[n], face_id[n]) for n in range(len(meshes))]


def _first_before_end(position: Any, faces: Any, size: tuple[int, int], source_z: Any, end: Any) -> Any:
    """Return nvdiffrast's raster [B, H, W, 4] of the nearest faces that do not end before the hit, by depth peeling.

    Args:
        position: [B, N, 4] in clip space; faces: int32 [M, 3].
        source_z: float32 [B, N, 1] of the vertices; end: [B, M], the source depth where a face ends.
    """
    import torch

    dr, context = _context()
    with dr.DepthPeeler(context, position, faces, resolution=list(size), grad_db=False) as peeler:
        kept, _ = peeler.rasterize_next_layer()
        for _ in range(MAX_LAYERS):
            depth, _ = dr.interpolate(source_z, kept, faces)
            index = kept[..., 3].long() - 1
            limit = end.gather(1, index.clamp(min=0).flatten(1)).view(index.shape)
            ended = (index >= 0) & (depth[..., 0] > limit)
            if not ended.any():
                break
            behind, _ = peeler.rasterize_next_layer()
            kept = torch.where(ended[..., None], behind, kept)
    return kept


def _empty(size: tuple[int, int]) -> Rendered:
    return Rendered(
        np.zeros((*size, 3), np.uint8),
        np.full(size, np.inf, np.float32),
        np.zeros(size, bool),
        np.full(size, -1, np.int32),
    )


def _near(mesh: DWMesh, points: np.ndarray) -> float:
    """Return the near plane for vertices float64 [N, 3] in camera axes: the contract's, or just before the nearest.

    If nothing is clipped, both give the same picture, and the farther plane gives finer depth resolution: the integers
    that nvdiffrast compares come from a float32 close to 1, whose steps are about 6e-8 · z / near, relative to z.
    """
    return max(NEAR_RATIO * float(mesh.z_depth.min()), 0.99 * float(points[:, 2].min()))


def _clip_matrix(camera: Camera, near: float) -> np.ndarray:
    """Return the float64 [4, 4] matrix from camera axes to clip space, with z/w = 1 − 2 · near / z.

    nvdiffrast's row 0 is at y = −1, as OpenCV's is at v = 0, so nothing is flipped.
    """
    height, width = camera.size
    K = camera.K
    return np.array(
        [
            [2 * K[0, 0] / width, 0, 2 * K[0, 2] / width - 1, 0],
            [0, 2 * K[1, 1] / height, 2 * K[1, 2] / height - 1, 0],
            [0, 0, 1, -2 * near],
            [0, 0, 1, 0],
        ]
    )


def _attributes(mesh: DWMesh) -> np.ndarray:
    """Return float32 [N, 4]: colour 0–255 and alpha of each vertex; zero at occluded ones in the released profile."""
    values = np.zeros((len(mesh.vertices), 4), np.float32)
    grid = mesh.z_depth.size
    values[:grid, :3], values[:grid, 3] = mesh.colours.reshape(-1, 3), 1
    if mesh.profile.vertex_alpha:
        values[:grid] *= mesh.vertex_alpha.reshape(-1, 1)
    return values
