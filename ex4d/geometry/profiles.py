"""Named profiles: how a mesh is built and drawn."""

from __future__ import annotations

from dataclasses import dataclass

from ex4d.errors import ConfigError

# A body is about as deep as it is wide, and fills a few tenths of the picture. Of the reaches from 0 to 0.3 tried on
# procedural scenes, 0.13 is in the middle of those that meet the bounds on colour and recall at 30, 60 and 90°. With
# unlimited curtains, a fifth of what both cameras see at 60° is hidden (docs/decisions/geometry.md).
CURTAIN_REACH = 0.13
FIRST_FRAMES = ("exact", "drawn")  # how frame 0 is shown if its camera is the source camera


@dataclass(frozen=True)
class Profile:
    """How a mesh is built and drawn.

    Args:
        pixel_offset: position of a vertex in its pixel; 0.5 is the centre.
        fixed_angle: use 2.5° at any focal length; else the angle of the depth jump that 2.5° means at f = 500.
        fan_cap: close the far end with a fan over all border vertices; else with two triangles over the four corners.
        boundary_depth: depth of the border ring; None is 1.5 × the largest depth.
        keep_occluded: draw occluded faces, black; else leave them out (the ordinary torn mesh).
        vertex_alpha: the occlusion flag is per vertex and is interpolated, as in the released code; else per face.
        two_sided: a face seen from behind shows its colour; else it is black and hides what is behind it, because the
            source camera never saw that side. From outside a closed mesh, the nearest face never shows its back.
        curtain_reach: an occluded face is opaque up to (1 + reach) × its least depth and is not drawn beyond; back
            faces are culled. None: it is opaque everywhere. Either way the mesh is the same, and watertight.
    """

    pixel_offset: float = 0.5
    fixed_angle: bool = False
    fan_cap: bool = True
    boundary_depth: float | None = None
    keep_occluded: bool = True
    vertex_alpha: bool = False
    two_sided: bool = False
    curtain_reach: float | None = None


PROFILES = {
    "default": Profile(curtain_reach=CURTAIN_REACH),
    "closed": Profile(),
    "torn": Profile(keep_occluded=False, two_sided=True),
    "released": Profile(
        pixel_offset=0.0,
        fixed_angle=True,
        fan_cap=False,
        boundary_depth=100.0,
        vertex_alpha=True,
        two_sided=True,
    ),
}


def profile_of(name: str) -> Profile:
    """Return PROFILES[name]. Raises ConfigError for an unknown name."""
    if name not in PROFILES:
        raise ConfigError("profile", name, f"one of {', '.join(PROFILES)}")
    return PROFILES[name]
