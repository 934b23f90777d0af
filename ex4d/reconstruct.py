"""One video and a camera path -> what that camera would see of it: condition video and visible mask."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ex4d import depth as depth_estimators
from ex4d import storage, video
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry import camera, mesh, trajectory
from ex4d.geometry import depth as depth_maps
from ex4d.geometry.render import warp_video

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE_PX, MAX_SIDE_PX = 16, 8192


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

    def write(self, folder: str | Path, save_mesh: bool = False, profile: str = "default") -> list[Path]:
        """Write cond.mp4, mask.npz (`visible` bool [T, H, W]), mask.mp4, camera.json, preview.png; return the paths.

        Args:
            save_mesh: also mesh/000000.ply …, one a frame, in that frame's own source camera.
            profile: of those meshes.
        """
        folder = Path(folder)
        mask, preview = io.BytesIO(), io.BytesIO()
        np.savez_compressed(mask, visible=self.visible)
        white = np.repeat(self.visible[..., None].astype(np.uint8) * 255, 3, axis=-1)
        contact_sheet(self).save(preview, format="PNG")
        cameras = {
            "axes": "opencv",
            "size": list(self.visible.shape[1:]),
            "K": self.K.tolist(),
            "w2c": self.w2c.tolist(),
        }
        contents = {
            "cond.mp4": video.encode(self.cond_video, self.fps),
            "mask.npz": mask.getvalue(),
            "mask.mp4": video.encode(white, self.fps, crf=0),  # x264 is lossless there
            "camera.json": (json.dumps(cameras, indent=1) + "\n").encode(),
            "preview.png": preview.getvalue(),
        }
        for name, data in contents.items():
            storage.write_bytes(folder / name, data)
        paths = [folder / name for name in contents]
        if save_mesh:
            (folder / "mesh").mkdir(exist_ok=True)
            for index, (frame, z_depth) in enumerate(zip(self.frames, self.z_depth, strict=True)):
                paths.append(folder / "mesh" / f"{index:06d}.ply")
                mesh.export(mesh.build(frame, z_depth, self.K, profile), paths[-1])
        return paths


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
        num_frames: None takes every frame. size: (H, W), both even; None for the video's own, odd sides less one.
        fov_deg: field of view over the longer side where the estimator gives no intrinsics.
        profile, backend: see geometry.mesh and geometry.render.

    Raises:
        ConfigError: unknown trajectory, estimator, profile or backend; a number out of its range.
        BadSample: the video or its depth cannot be used (`too_short`, the decoder's and the estimator's reasons).
    """
    _check_choices(size, num_frames, fov_deg, depth)
    info = video.probe(video_path)
    pts, _ = video.frame_pts(video_path)
    if num_frames is None:
        num_frames = len(pts)
    if len(pts) < num_frames:
        raise BadSample("too_short", f"{video_path} has {len(pts)} frames, {num_frames} are asked for")
    height, width = info.size
    target = size or (height - height % 2, width - width % 2)
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


def _check_choices(size: tuple[int, int] | None, num_frames: int | None, fov_deg: float, depth: str) -> None:
    if size is not None and not all(MIN_SIDE_PX <= side <= MAX_SIDE_PX and side % 2 == 0 for side in size):
        raise ConfigError("size", size, f"(H, W), both even, from {MIN_SIDE_PX} to {MAX_SIDE_PX}")
    if num_frames is not None and num_frames < 1:
        raise ConfigError("num_frames", num_frames, "at least 1")
    if not 1 <= fov_deg <= 170:
        raise ConfigError("fov_deg", fov_deg, "from 1 to 170 degrees")
    if depth not in depth_estimators.ESTIMATORS:
        raise ConfigError("depth", depth, f"allowed: {', '.join(depth_estimators.ESTIMATORS)}")


def build_path(name: str, num_frames: int, angle_deg: float, z_depth0: np.ndarray) -> np.ndarray:
    """Return w2c float64 [T, 4, 4] of a named path (its radius from frame 0's depth) or of a file of poses.

    Raises:
        ConfigError: neither of them, too few poses, or a zoom, whose focal lengths a warp with one K cannot show.
    """
    if name == "zoom":
        raise ConfigError("trajectory", name, "changes the focal length, and a video is warped with one K; take dolly")
    if name in trajectory.TRAJECTORIES:
        return trajectory.build(name, num_frames, angle_deg, trajectory.radius_of(z_depth0))
    if not Path(name).is_file():
        known = ", ".join(trajectory.TRAJECTORIES)
        raise ConfigError("trajectory", name, f"a file of poses, or one of {known}")
    w2c = trajectory.load(name)
    if len(w2c) < num_frames:
        raise ConfigError("trajectory", name, f"has {len(w2c)} poses, {num_frames} frames need one each")
    return w2c[:num_frames]


def contact_sheet(view: Reconstruction, num_columns: int = 7, width_px: int = 192) -> Image:
    """Return a picture: source, disparity and condition (rows) at evenly spaced frames (columns)."""
    from PIL import Image as pillow

    chosen = np.unique(np.linspace(0, len(view.frames) - 1, num_columns).round().astype(int))
    disparity = 1.0 / view.z_depth
    low, high = np.percentile(disparity, [1, 99])
    grey = (np.clip((disparity - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
    rows = (view.frames, np.repeat(grey[..., None], 3, axis=-1), view.cond_video)
    sheet = pillow.fromarray(np.concatenate([np.concatenate(list(row[chosen]), axis=1) for row in rows], axis=0))
    scale = width_px / view.frames.shape[2]
    return sheet.resize((round(sheet.width * scale), round(sheet.height * scale)))
