"""Evaluate a warp: compare the rendered mesh with the exact novel view of a procedural scene."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from sight import visible_from

from ex4d import synthetic
from ex4d.evaluate.metrics import psnr
from ex4d.geometry.camera import Camera, intrinsics
from ex4d.geometry.mesh import DWMesh, Profile, build, occlusion_flags
from ex4d.geometry.render import render
from ex4d.geometry.trajectory import build as build_path
from ex4d.geometry.trajectory import radius_of

# Closer than this to a depth edge in either picture, visibility depends on single pixels.
BAND_PX = 3
EDGE_JUMP = 0.046  # the relative depth jump between neighbours that matches 2.5° at f = 500 (docs/method.md, 1)


@dataclass(frozen=True)
class Pair:
    """Source and novel view of one scene at one time, both exact.

    Attributes:
        frame, truth: uint8 [H, W, 3], supersampled. z_depth: float32 [H, W] of the source.
        K: float64 [3, 3]. camera: the novel one.
        seen: bool [H, W] over the novel picture: the surface point is visible from the source too.
        ceiling: uint8 [H, W, 3]: the source sampled (Lanczos) at the exact correspondences; meaningful where seen.
        band: bool [H, W] over the novel picture: within BAND_PX of a depth edge of either picture.
    """

    frame: np.ndarray
    truth: np.ndarray
    z_depth: np.ndarray
    K: np.ndarray
    camera: Camera
    seen: np.ndarray
    ceiling: np.ndarray
    band: np.ndarray


@dataclass(frozen=True)
class WarpScore:
    """Figures of one warp against the truth.

    Attributes:
        psnr: dB over the pixels that are marked visible. coverage: their share of the picture.
        recall: share marked visible of the surface that both cameras see, outside the band.
        false_share: share of the pixels marked visible, outside the band, that the source does not see.
    """

    psnr: float
    coverage: float
    recall: float
    false_share: float


def make_pair(
    seed: tuple[int, ...], size: tuple[int, int], angle_deg: float, max_frequency: float, supersample: int = 4
) -> Pair:
    """Render a scene at time 0 from its first source camera and from the end of an orbit.

    Args:
        max_frequency: of the textures in cycles per image height; H / 2 is the Nyquist limit.
    """
    scene = synthetic.Scene.random(seed, max_frequency)
    K = intrinsics(size)
    source = Camera(K, np.eye(4), size)
    frame, z_depth = scene.render(source, 0.0, supersample)
    camera = Camera(K, build_path("orbit", 2, angle_deg, radius_of(z_depth))[-1], size)
    truth, novel_depth = scene.render(camera, 0.0, supersample)
    seen, uv = visible_from(scene, camera, 0.0, source)
    map_x, map_y = (uv[..., 0] - 0.5).astype(np.float32), (uv[..., 1] - 0.5).astype(np.float32)
    ceiling = cv2.remap(frame, map_x, map_y, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
    near_source_edge = cv2.remap(edge_band(z_depth).astype(np.uint8), map_x, map_y, cv2.INTER_NEAREST) > 0
    return Pair(frame, truth, z_depth, K, camera, seen, ceiling, edge_band(novel_depth) | (near_source_edge & seen))


def edge_band(z_depth: np.ndarray) -> np.ndarray:
    """Return bool [H, W]: True within BAND_PX of the border or of a jump above EDGE_JUMP between neighbours."""
    log = np.log(z_depth)
    edge = np.zeros(z_depth.shape, np.uint8)
    for axis in (0, 1):
        jump = np.abs(np.diff(log, axis=axis)) > np.log1p(EDGE_JUMP)
        low = [slice(None)] * 2
        high = [slice(None)] * 2
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        edge[tuple(low)] |= jump
        edge[tuple(high)] |= jump
    edge[[0, -1]] = 1
    edge[:, [0, -1]] = 1
    side = 2 * BAND_PX + 1
    return cv2.dilate(edge, np.ones((side, side), np.uint8)) > 0


def score(pair: Pair, profile: str | Profile = "default", mesh: DWMesh | None = None) -> WarpScore:
    """Return the figures of the source frame's mesh; `mesh` replaces the one of `profile`."""
    drawn = mesh or build(pair.frame, pair.z_depth, pair.K, profile)
    shown = render(drawn, pair.camera, "cpu")
    return _score(pair, shown.colour, shown.visible_mask)


def score_ceiling(pair: Pair) -> WarpScore:
    """Return the figures of exact correspondences, the upper bound for any warp of this source picture."""
    return _score(pair, pair.ceiling, pair.seen)


def _score(pair: Pair, colour: np.ndarray, visible: np.ndarray) -> WarpScore:
    inner = ~pair.band
    true_surface, marked = pair.seen & inner, visible & inner
    return WarpScore(
        psnr=psnr(colour, pair.truth, visible),
        coverage=float(visible.mean()),
        recall=float((visible & true_surface).sum() / max(true_surface.sum(), 1)),
        false_share=float((marked & ~pair.seen).sum() / max(marked.sum(), 1)),
    )


def with_threshold(pair: Pair, angle_deg: float) -> DWMesh:
    """Return the pair's default mesh under another occlusion threshold, degrees at f = 500 px (the method's: 2.5)."""
    own = build(pair.frame, pair.z_depth, pair.K)
    focal = float(pair.K[0, 0])
    angle = math.atan(math.tan(math.radians(angle_deg)) * 500.0 / focal)
    flags = occlusion_flags(own.z_depth, pair.K, angle)
    flags[:, 0], flags[:, -1], flags[:, :, 0], flags[:, :, -1] = (True,) * 4  # the border ring, as build does
    return replace(own, face_occluded=flags)
