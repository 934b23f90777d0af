"""The settings of `reconstruct`; `reconstruct`, `generate` and `view` have a flag for most of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ex4d.config import checked, setting
from ex4d.depth import CHOICES
from ex4d.geometry import camera_path
from ex4d.geometry.camera import fov_setting
from ex4d.geometry.profiles import FIRST_FRAMES, PROFILES
from ex4d.geometry.trajectory import TRAJECTORIES
from ex4d.video.pictures import FPS, MAX_FPS

MIN_SIDE_PX, MAX_SIDE_PX = 16, 8192


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """How a video is seen along a camera path.

    Raises:
        ConfigError: a setting is out of its range, or a file does not exist.
    """

    depth: str = setting(
        "sidecar",
        "Depth estimator; sidecar: a depth file beside the video; auto: the first that works of sidecar, "
        "depth-anything-v2, parallax.",
        choices=CHOICES,
    )
    depth_python: str | None = setting(
        None, "Python executable of the environment for depth=da3, video-depth-anything or own."
    )
    depth_path: str | None = setting(None, "Depth file, if not beside the video; for a network, its weights.")
    depth_fill_px: int = setting(0, "Fill holes of measured depth that are no wider than this, px of the frames.", ge=0)
    trajectory: str = setting("orbit", f"Camera path: {', '.join(TRAJECTORIES)}, or a pose file.")
    angle_deg: float = setting(60.0, "How far the camera moves, degrees.")
    trajectory_options: Mapping[str, Any] = setting(
        {},
        "KEY=VALUE, repeatable: distance (dolly), turns (spiral), zoom; for a pose file scale, resample, camera, and "
        "rebase=false, which keeps its poses in the world of --source-poses.",
    )
    cameras: str = setting(
        "auto",
        "Source cameras; auto: those of the depth estimator, if any; none: the camera stands still; estimator: "
        "required from the depth estimator; parallax: estimated from motion; colmap: estimated by COLMAP; or a pose "
        "file in any unit.",
    )
    source_poses: str | Path | None = setting(None, "File with the poses of a moving source camera.")
    source_scale: float | None = setting(
        None, "Units of depth per unit of --source-poses; null: 1 if that is plausible."
    )
    source_motion: str | None = setting(
        None,
        "Motion of the source camera, if it is known; remove: the path is fixed in the world; keep: the path moves "
        "with the source camera; smooth: the path moves with a stabilised camera. null: remove; keep for the released "
        "profile without poses.",
        choices=camera_path.SOURCE_MOTIONS,
    )
    first_frame: str = setting(
        "exact",
        "Frame 0, if its camera is the source camera; exact: the source frame without holes; drawn: rendered with "
        "holes like the frames after it, which avoids a jump.",
        choices=FIRST_FRAMES,
    )
    persistent_frames: int = setting(0, "Number of other frames whose static surfaces fill holes.", ge=0)
    fov_deg: float | None = fov_setting()
    profile: str | None = setting(
        None,
        "Mesh profile; released: for the published weights; null: the adapter's own, or default.",
        choices=PROFILES,
    )
    backend: str = setting("auto", "Renderer.", choices=("auto", "cpu", "reference", "nvdiffrast"))
    seed: int = setting(0, "Seed of all random choices.", ge=0)
    num_frames: int | None = setting(49, "Number of frames, from the first; null: all.", ge=1)
    size: tuple[int, int] | None = setting(
        (512, 512),
        "(height, width), px, both even; null: the video's own, rounded down to even.",
        ge=MIN_SIDE_PX,
        le=MAX_SIDE_PX,
        multiple_of=2,
    )
    fit: Literal["crop", "pad", "squeeze"] = setting(
        "crop", "How to fit a video of another aspect ratio into this size."
    )
    image_fps: float = setting(FPS, "Frames per second of a video that is a folder of pictures.", gt=0, le=MAX_FPS)
    device: str | None = setting(None, "Device of a depth network; null: a GPU if there is one.")

    def __post_init__(self) -> None:
        need = checked(self)
        camera_path.check_name(self.trajectory)
        need(self.source_poses is None or Path(self.source_poses).is_file(), "source_poses", "no such pose file")
        scaled = self.source_scale is None or self.source_poses is not None
        need(scaled, "source_scale", "must be left out without source_poses")
        if self.cameras != "auto":
            from ex4d.depth import source_cameras  # imports OpenCV

            source_cameras.check(self.cameras)
        alone = self.cameras == "auto" or self.source_poses is None
        need(alone, "cameras", "must be auto where source_poses is set: the poses come from that file")
