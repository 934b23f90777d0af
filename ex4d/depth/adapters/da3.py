"""Depth Anything 3 (pip package depth-anything-3): z-depth with cameras. Small and Base are Apache-2.0."""

import numpy as np


def load(options):
    """Return the network; `weights` is a hub id or a folder."""
    import torch
    from depth_anything_3.api import DepthAnything3

    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    return DepthAnything3.from_pretrained(options["weights"] or "depth-anything/DA3-SMALL").to(device).eval()


def estimate(model, frames):
    """Return depth, intrinsics and cameras, at the frames' size."""
    import cv2

    height, width = frames.shape[1:3]
    prediction = model.inference([frame for frame in frames])
    depth = np.stack([cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR) for one in prediction.depth])
    scale = np.diag([width / prediction.depth.shape[2], height / prediction.depth.shape[1], 1.0])
    w2c = np.tile(np.eye(4), (len(frames), 1, 1))
    w2c[:, :3] = prediction.extrinsics[:, :3]
    return {"values": depth, "kind": "z_depth", "K": scale @ np.median(prediction.intrinsics, axis=0), "w2c": w2c}
