"""Write a page with the depth watertight mesh of a clip and its cameras in 3D: one file, no server, no network.

WebGL 2 draws the mesh from the depth picture, with the occlusion flag of every face. The new camera's view in it equals
the condition, up to the browser's rasteriser.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ex4d import storage, video
from ex4d.geometry import mesh
from ex4d.reconstruct import Reconstruction
from ex4d.viewer.html import document, json_block

FOR_EVER = 1e9  # in place of infinity, which JSON lacks
MAX_SIDE_PX = 320  # 49 frames of 320 × 320 make a page of about 10 MB


def write(view: Reconstruction, path: str | Path, title: str, max_side_px: int = MAX_SIDE_PX) -> str:
    """Write the page of a reconstruction to a path or URL, and return it.

    Args:
        max_side_px: pictures and meshes are scaled down to at most this longer side.
    """
    chosen = view.choices
    about = (
        f"{chosen['trajectory']}, {chosen['angle_deg']:g}° · depth: {view.provenance.get('estimator', '')} · "
        f"profile: {view.profile}. White: the source camera, orange: the new one."
    )
    data = document(
        "scene.html",
        title,
        styles=("scene.css",),
        scripts=("scene.js",),
        about=about,
        scene=json_block(json.dumps(scene(view, max_side_px))),
    )
    storage.write_bytes(path, data)
    return str(path)


def scene(view: Reconstruction, max_side_px: int = MAX_SIDE_PX) -> dict:
    """Return the data that the page draws, JSON-serialisable.

    `frames` holds two pictures for every frame, as data URLs: a PNG whose red and green are disparity, in 65535ths of
    `disparity_max`, and whose blue has a bit for each of a block's two faces, set if it is occluded; and the colours.
    """
    height, width = view.frames.shape[1:3]
    scale = min(1.0, max_side_px / max(height, width))
    size = (max(2, round(height * scale)), max(2, round(width * scale)))
    fit = video.Fit((height, width), size, "squeeze")
    K = fit.apply_K(view.K)
    view_K = [fit.apply_K(one) for one in np.broadcast_to(view.view_K, (len(view.frames), 3, 3))]
    valid = fit.apply_depth(np.ones(view.z_depth.shape, bool) if view.valid_mask is None else view.valid_mask)
    parts = zip(fit.apply_image(view.frames), fit.apply_depth(view.z_depth), valid, strict=True)
    meshes = [mesh.build(frame, z, K, view.profile, valid=known) for frame, z, known in parts]
    disparity_max = max(float((1 / one.z_depth).max()) for one in meshes)
    reach = meshes[0].profile.curtain_reach
    still = np.broadcast_to(np.eye(4), view.w2c.shape)
    centre, extent = bounds(meshes, view.w2c)
    return {
        "shape": [len(meshes), *size],
        "centre": centre.tolist(),
        "extent": extent,
        "fps": view.fps,
        "radius": view.choices["radius"],
        "farthest": max(one.boundary_depth for one in meshes),
        "disparity_max": disparity_max,
        "curtain_reach": FOR_EVER if reach is None else reach,
        "K": _pinhole(K),
        "view_K": [_pinhole(one) for one in view_K],
        "w2c": view.w2c.tolist(),
        "source_w2c": (still if view.source_w2c is None else view.source_w2c).tolist(),
        "visible": view.visible.mean(axis=(1, 2)).tolist(),
        "frames": [
            [_url(geometry(one, disparity_max), "png"), _url(one.colours, "jpeg", cv2.IMWRITE_JPEG_QUALITY, 88)]
            for one in meshes
        ],
    }


def bounds(meshes: Sequence[mesh.DWMesh], w2c: np.ndarray) -> tuple[np.ndarray, float]:
    """Return (centre [3], radius) of a ball around scene and cameras, for the page's initial view.

    It covers the 5th to 95th percentile of the surface without its border: sky would make the rest too small.
    """
    step = max(1, len(meshes) // 5)
    grids = [one.vertices[: one.z_depth.size].reshape(*one.size, 3) for one in meshes[::step]]
    inner = np.concatenate([grid[1:-1:4, 1:-1:4].reshape(-1, 3) for grid in grids])
    low, high = np.percentile(inner, [5, 95], axis=0)
    eyes = np.linalg.inv(w2c)[:, :3, 3]
    low, high = np.minimum(low, eyes.min(axis=0)), np.maximum(high, eyes.max(axis=0))
    return (low + high) / 2, float(np.linalg.norm(high - low)) / 2


def geometry(one: mesh.DWMesh, disparity_max: float) -> np.ndarray:
    """Return uint8 [H, W, 3]: disparity as high and low byte, and the flags of the block whose corner the pixel is."""
    parts = np.rint(65535 / (one.z_depth.astype(np.float64) * disparity_max)).clip(1, 65535).astype(np.uint16)
    flags = np.zeros(one.size, np.uint8)
    flags[:-1, :-1] = one.face_occluded[0] | (one.face_occluded[1].astype(np.uint8) << 1)
    return np.stack([(parts >> 8).astype(np.uint8), (parts & 255).astype(np.uint8), flags], axis=-1)


def _pinhole(K: np.ndarray) -> list[float]:
    return [float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])]


def _url(picture: np.ndarray, kind: str, *options: int) -> str:
    data = cv2.imencode(f".{kind}", picture[..., ::-1], options)[1].tobytes()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
