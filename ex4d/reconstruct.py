"""Warp a video to a camera path: condition video and visible mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import depth as depth_estimators
from ex4d import isolation, video
from ex4d.config import to_dict
from ex4d.depth import AUTO, auto, dynamic, places
from ex4d.errors import BadSample
from ex4d.geometry import camera, camera_path, trajectory
from ex4d.geometry.render import choose_backend, persistent, warp_video
from ex4d.reconstruct_config import MIN_SIDE_PX, ReconstructConfig
from ex4d.video import pictures

RECORDED = (
    *("trajectory", "angle_deg", "trajectory_options", "source_poses", "source_scale", "source_motion"),
    *("first_frame", "persistent_frames", "profile", "backend", "seed"),
)  # settings that the record of a view keeps
RELEASED_FOCAL_PX = 500.0  # the released code's focal length, at any size


@dataclass(frozen=True)
class Clip:
    """A video's frames with their depth, before a camera path is chosen.

    Attributes:
        frames: uint8 [T, H, W, 3]. fps: frames per second.
        z_depth: float32 [T, H, W], along the source camera's z. K: float64 [3, 3] px, pixel centres at +0.5.
        profile: how its meshes are built and drawn. provenance: the depth estimator's record.
        source_w2c: float64 [T, 4, 4] of the source camera in the unit of z_depth, the first the identity; None:
            unknown. dynamic_mask: bool [T, H, W], True where the surface moves in the world; None: unknown.
        valid_mask: bool [T, H, W], True where depth is known; None: everywhere.
    """

    frames: np.ndarray
    fps: float
    z_depth: np.ndarray
    K: np.ndarray
    profile: str = "default"
    provenance: dict[str, Any] = field(default_factory=dict)
    source_w2c: np.ndarray | None = None
    dynamic_mask: np.ndarray | None = None
    valid_mask: np.ndarray | None = None

    @property
    def radius(self) -> float:
        """Distance of the point about which paths turn, in units of the depth."""
        rule = "released" if self.profile == "released" else "percentile"
        return trajectory.radius_of(self.z_depth[0], rule)


@dataclass(frozen=True)
class Reconstruction:
    """A clip, its geometry, and its view along a trajectory. `reconstruct_files.write` writes it to files.

    Attributes:
        frames: uint8 [T, H, W, 3], the source.
        fps: frames per second.
        z_depth: float32 [T, H, W], along the source camera's z.
        K: float64 [3, 3] px of the source, pixel centres at +0.5.
        w2c: float64 [T, 4, 4] of the new cameras, OpenCV axes; world = the source camera of frame 0.
        view_K: float64 [3, 3] px of the new cameras; [T, 3, 3] where the focal length changes (a zoom).
        cond_video: uint8 [T, H, W, 3], colour where visible, zero elsewhere.
        visible: bool [T, H, W], True where the source shows what the new camera sees.
        source_w2c: float64 [T, 4, 4] of the source camera; None: unknown, assumed not to move.
        profile: how the meshes are built and drawn.
        choices: the settings of the view, JSON-serialisable.
        provenance: the depth estimator's record.
        valid_mask: bool [T, H, W], True where depth is known; None: everywhere.
        video_path: the video whose first frames these are, for its sound; "" if there is no file.
    """

    frames: np.ndarray
    fps: float
    z_depth: np.ndarray
    K: np.ndarray
    w2c: np.ndarray
    view_K: np.ndarray
    cond_video: np.ndarray
    visible: np.ndarray
    source_w2c: np.ndarray | None = None
    profile: str = "default"
    choices: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    valid_mask: np.ndarray | None = None
    video_path: str = ""

    @property
    def starts_at_source(self) -> bool:
        """Whether the new camera of frame 0 is the source camera, so that its true picture is known."""
        source = np.eye(4) if self.source_w2c is None else self.source_w2c[0]
        first = self.view_K if self.view_K.ndim == 2 else self.view_K[0]
        return bool(np.abs(self.w2c[0] - source).max() < 1e-9 and np.allclose(first, self.K, rtol=1e-12))


def reconstruct(
    video_path: str | Path, config: ReconstructConfig = ReconstructConfig(), **changes: Any
) -> Reconstruction:
    """Warp the first frames of a video to a camera path.

    Args:
        video_path: a video, or a folder of pictures (`video.pictures`).
        config: the settings. changes: settings that differ from `config`, by name.

    Raises:
        ConfigError: a setting is invalid.
        BadSample: the video or its depth cannot be used (`too_short`, `too_small`, and the reasons of the decoder and
            the estimator).
        ContractError: a file of poses or weights is damaged.
    """
    config = replace(config, **changes)
    return along(read(video_path, config), config, str(video_path))


def along(clip: Clip, config: ReconstructConfig, video_path: str = "") -> Reconstruction:
    """Warp a clip to a camera path; several paths can share one clip, and so one depth estimate.

    Args:
        video_path: the clip's video, for its sound.

    Raises:
        ConfigError, ContractError: as in `reconstruct`.
    """
    count, radius, source_w2c, world = len(clip.frames), clip.radius, clip.source_w2c, None
    if config.source_poses is not None:
        source_w2c, world = camera_path.source_poses(config.source_poses, count, config.source_scale, radius)
    w2c, view_K = camera_path.build(
        config.trajectory, count, config.angle_deg, radius, clip.K, config.trajectory_options, world
    )
    motion = None
    if source_w2c is not None:
        rides = clip.profile == "released" and config.source_poses is None
        motion = config.source_motion or ("keep" if rides else "remove")
        w2c = camera_path.with_source(w2c, source_w2c, motion, clip.fps)
    config = replace(config, source_motion=motion, profile=clip.profile, backend=choose_backend(config.backend))
    origin = clip.provenance.get("cameras") if config.source_poses is None else "file"
    recorded = {name: value for name, value in to_dict(config).items() if name in RECORDED}
    cond_video, visible = _warp(clip, config, w2c, view_K, source_w2c)
    return Reconstruction(
        frames=clip.frames,
        fps=clip.fps,
        z_depth=clip.z_depth,
        K=clip.K,
        w2c=w2c,
        view_K=view_K,
        cond_video=cond_video,
        visible=visible,
        source_w2c=source_w2c,
        profile=clip.profile,
        choices=recorded | {"cameras": origin, "radius": radius},
        provenance=clip.provenance,
        valid_mask=clip.valid_mask,
        video_path=video_path,
    )


def _warp(
    clip: Clip, config: ReconstructConfig, w2c: np.ndarray, view_K: np.ndarray, source_w2c: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (cond_video, visible) of a clip, with holes filled from other frames if `persistent_frames` is set."""
    cond_video, visible = warp_video(
        clip.frames,
        clip.z_depth,
        clip.K,
        w2c,
        clip.profile,
        config.backend,
        source_w2c,
        view_K,
        clip.valid_mask,
        config.first_frame,
    )
    if not config.persistent_frames:
        return cond_video, visible
    still = np.tile(np.eye(4), (len(clip.frames), 1, 1)) if source_w2c is None else source_w2c
    moves = clip.dynamic_mask
    if moves is None:
        moves = dynamic.of_flow(clip.frames, clip.z_depth, clip.K, source_w2c)
    seen_by = (clip.frames, clip.z_depth, clip.K, w2c, still, config.persistent_frames, moves)
    return persistent.fill(cond_video, visible, *seen_by, clip.profile, config.backend, view_K, clip.valid_mask)


def read(video_path: str | Path, config: ReconstructConfig = ReconstructConfig()) -> Clip:
    """Decode the first frames of a video and estimate their depth; errors as in `reconstruct`.

    The video is decoded in the sandboxed child: one that hangs or crashes its decoder raises BadSample.
    """
    with pictures.as_video(video_path, config.image_fps) as path:
        frames, request, fps = _read(video_path, path, config.num_frames, config.size, config.fit)
    names = ("depth_path", "seed", "device", "fov_deg", "cameras")
    chosen = {name: getattr(config, name) for name in names}
    request = replace(request, fill_px=config.depth_fill_px, python=config.depth_python, **chosen)
    depth = auto.choose([request], config.depth_path)[0] if config.depth == AUTO else config.depth
    result = depth_estimators.estimate(depth, frames, request)
    profile = config.profile or "default"
    K = result.K
    if K is None:
        height, width = frames.shape[1:3]
        K = camera.intrinsics((height, width), config.fov_deg)
        if profile == "released" and config.fov_deg is None:
            K = np.array([[RELEASED_FOCAL_PX, 0, width / 2], [0, RELEASED_FOCAL_PX, height / 2], [0, 0, 1]])
    z_depth = depth_estimators.z_depth_of(result, profile)
    w2c = result.w2c if result.kind == "z_depth" or result.metric else None  # else depth was mapped to another unit
    return Clip(frames, fps, z_depth, K, profile, result.provenance, w2c, result.dynamic_mask, result.valid_mask)


def _read(
    video_path: str | Path, path: str, num_frames: int | None, size: tuple[int, int] | None, fit: str
) -> tuple[np.ndarray, depth_estimators.DepthRequest, float]:
    """Decode (frames uint8 [T, H, W, 3], a DepthRequest that says where they are in the video, frames per second).

    Args:
        path: the file that is decoded; it differs from `video_path` for a folder of pictures.
    """
    file = isolation.File(path)
    info = isolation.run("probe", (file,))
    pts, time_base = isolation.run("frame_pts", (file,))
    if num_frames is None:
        num_frames = len(pts)
    if len(pts) < num_frames:
        raise BadSample("too_short", f"{Path(video_path).name} has {len(pts)} frames, but {num_frames} are requested")
    height, width = info.size
    if min(info.size) < MIN_SIDE_PX:
        raise BadSample("too_small", f"{Path(video_path).name} is {height} × {width} px, the minimum is {MIN_SIDE_PX}")
    target = size or (height - height % 2, width - width % 2)
    frames = isolation.run("decode", (file, pts[:num_frames], target, fit))
    request = depth_estimators.DepthRequest(
        video_path=str(video_path),
        twin=places.twin_of(str(video_path)),
        frame_index=np.arange(num_frames),
        frame_s=(pts[:num_frames] - pts[0]) * float(time_base),
        source_frames=len(pts),
        source_s=float((pts[-1] - pts[0]) * time_base),
        fit=video.Fit(info.size, target, fit),
    )
    fps = float(info.fps)
    if fps <= 0:  # the container declares none
        fps = 1 / (float(time_base) * float(np.median(np.diff(pts)))) if len(pts) > 1 else 1.0
    return frames, request, fps
