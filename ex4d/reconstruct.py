"""One video and a camera path -> what that camera would see of it: condition video and visible mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ex4d import depth as depth_estimators
from ex4d import video
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry import camera, trajectory
from ex4d.geometry import depth as depth_maps
from ex4d.geometry.render import warp_video


@dataclass(frozen=True)
class Reconstruction:
    """A clip, its geometry, and its view along a trajectory.

    Attributes:
        frames: uint8 [T, H, W, 3], the source.
        fps: frames per second.
        z_depth: float32 [T, H, W], along the source camera's z.
        K: float64 [3, 3] px, pixel centres at +0.5.
        w2c: float64 [T, 4, 4], OpenCV axes; world = the source camera of frame 0.
        cond_video: uint8 [T, H, W, 3], colour where visible, zero elsewhere.
        visible: bool [T, H, W], True where the source shows what the new camera sees.
        provenance: the depth estimator's record.
    """

    frames: np.ndarray
    fps: float
    z_depth: np.ndarray
    K: np.ndarray
    w2c: np.ndarray
    cond_video: np.ndarray
    visible: np.ndarray
    provenance: dict = field(default_factory=dict)


def reconstruct(
    video_path: str | Path,
    *,
    trajectory_name: str = "orbit",
    angle_deg: float = 60.0,
    depth: str = "sidecar",
    depth_path: str | None = None,
    num_frames: int | None = 49,
    size: tuple[int, int] | None = (512, 512),
    fit: str = "crop",
    fov_deg: float = 54.0,
    profile: str = "default",
    backend: str = "auto",
    seed: int = 0,
) -> Reconstruction:
    """Return the first `num_frames` frames of a video as seen along a camera path.

    Args:
        trajectory_name: a key of trajectory.TRAJECTORIES, or a file of poses.
        depth, depth_path: estimator name, and its file where it reads one.
        num_frames: None takes every frame. size: (H, W), or None for the video's own.
        fov_deg: horizontal field of view where the estimator gives no intrinsics.
        profile, backend: see geometry.mesh and geometry.render.

    Raises:
        ConfigError: unknown trajectory, estimator, profile or backend.
        BadSample: the video or its depth cannot be used (`too_short`, the decoder's and the estimator's reasons).
    """
    info = video.probe(video_path)
    pts, _ = video.frame_pts(video_path)
    if num_frames is None:
        num_frames = len(pts)
    if len(pts) < num_frames:
        raise BadSample("too_short", f"{video_path} has {len(pts)} frames, {num_frames} are asked for")
    target = size or info.size
    frames = video.decode(video_path, pts[:num_frames], size=target, fit=fit)
    request = depth_estimators.DepthRequest(
        video_path=str(video_path),
        depth_path=depth_path,
        frame_index=np.arange(num_frames),
        fit=video.Fit(info.size, target, fit),
        seed=seed,
    )
    result = depth_estimators.estimate(depth, frames, request)
    z_depth = depth_maps.to_z_depth(result.values, result.kind)
    K = result.K if result.K is not None else camera.intrinsics(target, fov_deg)
    w2c = build_path(trajectory_name, num_frames, angle_deg, z_depth[0])
    cond_video, visible = warp_video(frames, z_depth, K, w2c, profile=profile, backend=backend)
    return Reconstruction(frames, float(info.fps), z_depth, K, w2c, cond_video, visible, result.provenance)


def build_path(name: str, num_frames: int, angle_deg: float, z_depth0: np.ndarray) -> np.ndarray:
    """Return w2c float64 [T, 4, 4] of a named path (its radius from frame 0's depth) or of a file of poses."""
    if name in trajectory.TRAJECTORIES:
        return trajectory.build(name, num_frames, angle_deg, trajectory.radius_of(z_depth0))
    if not Path(name).is_file():
        known = ", ".join(trajectory.TRAJECTORIES)
        raise ConfigError("trajectory", name, f"a file of poses, or one of {known}")
    w2c = trajectory.load(name)
    if len(w2c) < num_frames:
        raise ConfigError("trajectory", name, f"has {len(w2c)} poses, {num_frames} frames need one each")
    return w2c[:num_frames]
