"""One video and a camera path -> what that camera would see of it: condition video and visible mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import depth as depth_estimators
from ex4d import isolation, video
from ex4d.depth import places, source_cameras
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry import camera, camera_path, trajectory
from ex4d.geometry.profiles import FIRST_FRAMES, profile_of
from ex4d.geometry.render import choose_backend, persistent, warp_video

MIN_SIDE_PX, MAX_SIDE_PX = 16, 8192
RELEASED_FOCAL_PX = 500.0  # the released code's, at any size


@dataclass(frozen=True)
class Clip:
    """A video's frames with their depth, before any path.

    Attributes:
        frames: uint8 [T, H, W, 3]. fps: frames per second.
        z_depth: float32 [T, H, W], along the source camera's z. K: float64 [3, 3] px, pixel centres at +0.5.
        profile: how its meshes are made and drawn. provenance: the depth estimator's record.
        source_w2c: float64 [T, 4, 4] of the source camera in the unit of z_depth, the first the identity; None: it is
            not known. dynamic_mask: bool [T, H, W], True where the surface moves in the world; None: not known.
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
        """Distance of the point that paths turn about, in units of the depth."""
        rule = "released" if self.profile == "released" else "percentile"
        return trajectory.radius_of(self.z_depth[0], rule)


@dataclass(frozen=True)
class Reconstruction:
    """A clip, its geometry, and its view along a trajectory. `reconstruct_files.write` makes files of it.

    Attributes:
        frames: uint8 [T, H, W, 3], the source.
        fps: frames per second.
        z_depth: float32 [T, H, W], along the source camera's z.
        K: float64 [3, 3] px of the source, pixel centres at +0.5.
        w2c: float64 [T, 4, 4] of the new cameras, OpenCV axes; world = the source camera of frame 0.
        view_K: float64 [3, 3] px of the new cameras; [T, 3, 3] where the focal length changes (a zoom).
        cond_video: uint8 [T, H, W, 3], colour where visible, zero elsewhere.
        visible: bool [T, H, W], True where the source shows what the new camera sees.
        source_w2c: float64 [T, 4, 4] of the source camera where it is known; None: it is taken to stand still.
        profile: how the meshes are made and drawn.
        choices: what was asked for, JSON-able.
        provenance: the depth estimator's record.
        valid_mask: bool [T, H, W], True where depth is known; None: everywhere.
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

    @property
    def starts_at_source(self) -> bool:
        """Whether the new camera of frame 0 is the source camera, so that its true picture is known."""
        source = np.eye(4) if self.source_w2c is None else self.source_w2c[0]
        first = self.view_K if self.view_K.ndim == 2 else self.view_K[0]
        return bool(np.abs(self.w2c[0] - source).max() < 1e-9 and np.allclose(first, self.K, rtol=1e-12))


def reconstruct(
    video_path: str | Path,
    *,
    trajectory_name: str = "orbit",
    angle_deg: float = 60.0,
    trajectory_options: Mapping[str, Any] | None = None,
    source_poses: str | Path | None = None,
    source_scale: float | None = None,
    source_motion: str | None = None,
    persistent_frames: int = 0,
    cameras: str = "auto",
    first_frame: str = "exact",
    depth: str = "sidecar",
    depth_path: str | None = None,
    depth_fill_px: int = 0,
    num_frames: int | None = 49,
    size: tuple[int, int] | None = (512, 512),
    fit: str = "crop",
    fov_deg: float | None = None,
    profile: str = "default",
    backend: str = "auto",
    seed: int = 0,
    device: str | None = None,
) -> Reconstruction:
    """Return the first `num_frames` frames of a video as seen along a camera path.

    Args:
        trajectory_name: a key of trajectory.TRAJECTORIES, or a file of poses or key poses.
        trajectory_options: what else that path or file takes; see geometry.camera_path.
        source_poses: a file with the pose of the source camera at each frame, where it moves; source_scale: units of
            the depth for one unit of that file (None: 1, where the lengths are plausible).
        source_motion: what becomes of the source camera's own motion where it is known, from that file or from the
            depth estimator: "remove" (the path is fixed in the world), "keep" (the path rides on the source camera) or
            "smooth" (on a stabilised one). None: remove; keep where the released profile is given no poses.
        persistent_frames: so many other frames fill holes with the static surfaces that they saw; 0 is the paper's.
        cameras: where the source's cameras come from without `source_poses`: see depth.source_cameras.
        first_frame: "exact" shows frame 0 whole where its camera is the source's; "drawn" draws it as the others are.
        depth, depth_path: estimator name, and its file or weights where it reads one.
        depth_fill_px: holes of measured depth that are no wider are filled, px of the frames.
        num_frames: None takes every frame. size: (H, W), both even; None for the video's own, odd sides less one.
        fov_deg: field of view over the longer side where the estimator gives no intrinsics; None: 54, and parallax
            seeks it.
        profile, backend: see geometry.mesh and geometry.render. "released" also takes the released code's mapping of
            relative depth, its radius, and 500 px of focal length where the estimator gives none.
        device: of a depth network; None is a GPU where there is one.

    Raises:
        ConfigError: unknown trajectory, estimator, profile or backend; a number out of its range.
        BadSample: the video or its depth cannot be used (`too_short`, the decoder's and the estimator's reasons).
        ContractError: a file of poses or weights is damaged.
    """
    check_choices(
        trajectory_name,
        source_poses,
        depth,
        num_frames,
        size,
        fov_deg,
        profile,
        backend,
        source_motion,
        persistent_frames,
        cameras,
        first_frame,
        depth_fill_px,
    )
    backend = choose_backend(backend)
    chosen = (size, fit, fov_deg, profile, seed, device, cameras, depth_fill_px)
    clip = read(video_path, depth, depth_path, num_frames, *chosen)
    count, radius = len(clip.frames), clip.radius
    moved, world = clip.source_w2c, None
    if source_poses is not None:
        moved = camera_path.source_poses(source_poses, count, source_scale, radius)
        world = camera_path.first_pose(source_poses, source_scale)
    motion = source_motion or ("keep" if profile == "released" and source_poses is None else "remove")
    w2c, view_K = camera_path.build(trajectory_name, count, angle_deg, radius, clip.K, trajectory_options, world)
    if moved is not None:
        w2c = camera_path.with_source(w2c, moved, motion, clip.fps)
    known = clip.valid_mask
    drawn = (profile, backend, moved, view_K, known, first_frame)
    cond_video, visible = warp_video(clip.frames, clip.z_depth, clip.K, w2c, *drawn)
    if persistent_frames:
        still = np.tile(np.eye(4), (count, 1, 1)) if moved is None else moved
        seen_by = (clip.frames, clip.z_depth, clip.K, w2c, still, persistent_frames, clip.dynamic_mask)
        cond_video, visible = persistent.fill(cond_video, visible, *seen_by, profile, backend, view_K, known)
    choices = {
        "trajectory": trajectory_name,
        "angle_deg": angle_deg,
        "trajectory_options": dict(trajectory_options or {}),
        "source_poses": None if source_poses is None else str(source_poses),
        "source_scale": source_scale,
        "cameras": clip.provenance.get("cameras") if source_poses is None else "file",
        "source_motion": None if moved is None else motion,
        "persistent_frames": persistent_frames,
        "first_frame": first_frame,
        "radius": radius,
        "profile": profile,
        "backend": backend,
        "seed": seed,
    }
    seen = (clip.frames, clip.fps, clip.z_depth, clip.K, w2c, view_K, cond_video, visible, moved, profile)
    return Reconstruction(*seen, choices, clip.provenance, known)


def read(
    video_path: str | Path,
    depth: str = "sidecar",
    depth_path: str | None = None,
    num_frames: int | None = 49,
    size: tuple[int, int] | None = (512, 512),
    fit: str = "crop",
    fov_deg: float | None = None,
    profile: str = "default",
    seed: int = 0,
    device: str | None = None,
    cameras: str = "auto",
    depth_fill_px: int = 0,
) -> Clip:
    """Return the first frames of a video with their depth; arguments and errors as in `reconstruct`.

    The video is decoded in the sandboxed child: one that hangs or crashes its decoder is a BadSample.
    """
    frames, request, fps = _read(video_path, num_frames, size, fit)
    request = replace(request, depth_path=depth_path, seed=seed, device=device, fov_deg=fov_deg, cameras=cameras)
    request = replace(request, fill_px=depth_fill_px)
    result = depth_estimators.estimate(depth, frames, request)
    K = result.K
    if K is None:
        released = profile == "released"
        K = _released_intrinsics(frames.shape) if released else camera.intrinsics(frames.shape[1:3], fov_deg)
    z_depth = depth_estimators.z_depth_of(result, profile)
    w2c = result.w2c if result.kind == "z_depth" or result.metric else None  # else depth was mapped to another unit
    return Clip(frames, fps, z_depth, K, profile, result.provenance, w2c, result.dynamic_mask, result.valid_mask)


def _read(
    video_path: str | Path, num_frames: int | None, size: tuple[int, int] | None, fit: str
) -> tuple[np.ndarray, depth_estimators.DepthRequest, float]:
    """Return (frames uint8 [T, H, W, 3], how they lie in the video, frames per second)."""
    file = isolation.File(str(video_path))
    info = isolation.run("probe", (file,))
    pts, time_base = isolation.run("frame_pts", (file,))
    if num_frames is None:
        num_frames = len(pts)
    if len(pts) < num_frames:
        raise BadSample("too_short", f"{Path(video_path).name} has {len(pts)} frames, {num_frames} are asked for")
    height, width = info.size
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


def check_choices(
    trajectory_name: str = "orbit",
    source_poses: str | Path | None = None,
    depth: str = "sidecar",
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    fov_deg: float | None = None,
    profile: str = "default",
    backend: str = "auto",
    source_motion: str | None = None,
    persistent_frames: int = 0,
    cameras: str = "auto",
    first_frame: str = "exact",
    depth_fill_px: int = 0,
    **_: Any,
) -> None:
    """Raise ConfigError for what can be known to be wrong before any work; arguments as in `reconstruct`."""
    camera_path.check_name(trajectory_name)
    if source_poses is not None and not Path(source_poses).is_file():
        raise ConfigError("source_poses", str(source_poses), "no such file of poses")
    if size is not None and not all(MIN_SIDE_PX <= side <= MAX_SIDE_PX and side % 2 == 0 for side in size):
        raise ConfigError("size", size, f"(H, W), both even, from {MIN_SIDE_PX} to {MAX_SIDE_PX}")
    if num_frames is not None and num_frames < 1:
        raise ConfigError("num_frames", num_frames, "at least 1")
    if fov_deg is not None and not 1 <= fov_deg <= 170:
        raise ConfigError("fov_deg", fov_deg, "from 1 to 170 degrees")
    if depth not in depth_estimators.ESTIMATORS:
        raise ConfigError("depth", depth, f"allowed: {', '.join(depth_estimators.ESTIMATORS)}")
    if source_motion not in (None, *camera_path.SOURCE_MOTIONS):
        raise ConfigError("source_motion", source_motion, f"one of {', '.join(camera_path.SOURCE_MOTIONS)}")
    if persistent_frames < 0:
        raise ConfigError("persistent_frames", persistent_frames, "0 or more")
    source_cameras.check(cameras)
    if cameras != "auto" and source_poses is not None:
        raise ConfigError("cameras", cameras, "auto where source_poses is set: the poses come from that file")
    if first_frame not in FIRST_FRAMES:
        raise ConfigError("first_frame", first_frame, f"one of {', '.join(FIRST_FRAMES)}")
    if depth_fill_px < 0:
        raise ConfigError("depth_fill_px", depth_fill_px, "0 or more")
    profile_of(profile)
    choose_backend(backend)


def _released_intrinsics(shape: tuple[int, ...]) -> np.ndarray:
    return np.array([[RELEASED_FOCAL_PX, 0, shape[2] / 2], [0, RELEASED_FOCAL_PX, shape[1] / 2], [0, 0, 1]])
