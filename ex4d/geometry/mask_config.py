"""The settings of simulated masks (`masks`), and how each camera path scales with its extent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ex4d.config import checked, setting
from ex4d.geometry import tracks, trajectory

Paths = tuple[tuple[str, float], ...]  # (name of a trajectory, its angle in degrees)
# extent in (0, 1], sign ±1, largest angle → keywords of trajectory.build
PATHS: dict[str, Callable[[float, float, float], dict[str, float]]] = {
    "orbit": lambda extent, sign, angle: {"angle_deg": sign * extent * angle},
    "arc": lambda extent, sign, angle: {"angle_deg": sign * extent * angle},
    "crane": lambda extent, sign, angle: {"angle_deg": sign * extent * min(angle, 85.0)},
    "spiral": lambda extent, sign, angle: {"angle_deg": sign * extent * min(angle, 75.0)},
    "lateral": lambda extent, sign, angle: {"angle_deg": extent * min(angle, 75.0)},
    "full": lambda extent, sign, angle: {"angle_deg": extent * angle},
    "dolly": lambda extent, sign, angle: {"distance": 0.95 * extent},
}


@dataclass(frozen=True)
class MaskConfig:
    """How masks are drawn."""

    num_masks: int = setting(4, "Masks of each clip; each is another training sample of the same video.", ge=1)
    visibility: float = setting(0.5, "Share of visibility masks (weights, need not sum to 1).", ge=0)
    tracking: float = setting(
        0.3, "Share of tracking masks; visibility masks replace them where motion is too fast to track.", ge=0
    )
    novel_view: float = setting(0.2, "Share of novel-view masks.", ge=0)
    trajectories: tuple[str, ...] = setting(
        ("orbit", "arc", "crane", "spiral", "lateral", "full", "dolly"),
        "Camera paths, tried in random order.",
        choices=PATHS,
        not_empty=True,
    )
    max_angle_deg: float = setting(90.0, "Largest angle of a path that turns.", gt=0, le=90)
    generation: Paths = setting(
        (("orbit", 30.0), ("orbit", 60.0), ("orbit", 90.0), ("full", 90.0)),
        "[trajectory, degrees] of the paths to generate later; masks match their fractions of holes. []: uniform.",
    )
    hole_share: tuple[float, float] = setting(
        (0.1, 0.97), "[least, most] fraction of holes in a mask's fullest frame.", ge=0, lt=1
    )
    erosion_px: tuple[int, int] = setting(
        (2, 8), "[least, most] side of the square that erodes the visible region, px at 512.", ge=1
    )
    grid: tuple[int, int] = setting((10, 50), "[least, most] tracked points along each side.", ge=2)
    tracker: str = setting(
        "flow",
        "Point tracker; cotracker3 needs tracker_path, and its licence forbids commercial use.",
        choices=tracks.METHODS,
    )
    tracker_path: str | None = setting(
        None, "Folder of CoTracker3's code and weights; it uses a GPU if preprocess.depth_num_gpus is set."
    )
    depth_tolerance: float = setting(
        0.02, "How far behind the surface a pixel may lie and still be visible, as a fraction of depth.", gt=0
    )

    def __post_init__(self) -> None:
        need = checked(self, "preprocess.masks")
        some = self.visibility + self.tracking + self.novel_view > 0
        need(some, "visibility", "the shares visibility, tracking and novel_view must not all be 0")
        for name, angle_deg in self.generation:
            allowed = (
                f"must hold [trajectory, degrees] with one of {', '.join(path for path in PATHS if path != 'dolly')}"
            )
            need(name in PATHS and name != "dolly", "generation", allowed)
            trajectory.build(name, 2, angle_deg)
        for name in ("hole_share", "erosion_px", "grid"):
            least, most = getattr(self, name)
            need(least <= most, name, "must be [least, most], the smaller number first")
