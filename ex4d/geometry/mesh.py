"""The depth watertight mesh (DW-Mesh) of one frame: vertices, faces, texture, and an occlusion flag for each face.

Numbering, shared by every renderer. Vertex i·W + j is pixel (i, j); the fan cap adds one vertex, its centre. Faces:
first the triangle (tl, bl, tr) of every 2×2 block, row by row, then (tr, bl, br) of every block, then the cap. The
winding is counter-clockwise seen from outside, which is the source camera's side: the closed volume is what lies
behind the depth surface, with the pushed-back border ring as its walls and the cap as its far end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import check_intrinsics, pixel_rays
from ex4d.geometry.profiles import PROFILES as PROFILES
from ex4d.geometry.profiles import Profile, profile_of

MIN_ANGLE_DEG = 2.5  # released: a face whose smallest interior angle is below this is occluded
RELEASED_FOCAL = 500.0  # the focal length at which the released threshold was chosen
BOUNDARY_RATIO = 1.5  # border ring at this × the largest depth


@dataclass(frozen=True, eq=False)
class DWMesh:
    """One frame's mesh in the axes of its source camera, stored as its depth grid.

    Args:
        z_depth: float32 [H, W], border ring pushed back to the boundary depth.
        K: float64 [3, 3] intrinsics of the source camera.
        colours: uint8 [H, W, 3].
        face_occluded: bool [2, H−1, W−1]: the (tl, bl, tr) and the (tr, bl, br) triangle of each block.
        profile: how the mesh is built and drawn.
    """

    z_depth: np.ndarray
    K: np.ndarray
    colours: np.ndarray
    face_occluded: np.ndarray
    profile: Profile

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the source frame."""
        return self.z_depth.shape[0], self.z_depth.shape[1]

    @property
    def boundary_depth(self) -> float:
        """z of the border ring and the cap."""
        return float(self.z_depth[0, 0])

    @cached_property
    def vertices(self) -> np.ndarray:
        """float64 [N, 3] points in the source camera's axes: H·W pixels, then the centre of the fan cap, if any."""
        grid = pixel_rays(self.size, self.K, self.profile.pixel_offset) * self.z_depth[..., None].astype(np.float64)
        if not self.profile.fan_cap:
            return grid.reshape(-1, 3)
        centre = (grid[0, 0] + grid[-1, -1]) / 2
        return np.concatenate([grid.reshape(-1, 3), centre[None]])

    @cached_property
    def faces(self) -> np.ndarray:
        """int32 [M, 3] vertex indices: 2 (H−1) (W−1) of the grid, then the cap."""
        return topology(self.size, self.profile.fan_cap)

    @cached_property
    def occluded(self) -> np.ndarray:
        """bool [M]: grid faces, then the cap (always occluded; the released code did not test it)."""
        cap = np.ones(len(self.faces) - self.face_occluded.size, bool)
        return np.concatenate([self.face_occluded.reshape(-1), cap])

    @cached_property
    def vertex_alpha(self) -> np.ndarray:
        """bool [H, W], released rule: False at every vertex of an occluded grid face, which is also black."""
        first, second = self.face_occluded
        bad = np.zeros(self.size, bool)
        bad[:-1, :-1] |= first  # tl
        bad[1:, :-1] |= first | second  # bl
        bad[:-1, 1:] |= first | second  # tr
        bad[1:, 1:] |= second  # br
        return ~bad


@lru_cache(maxsize=8)
def topology(size: tuple[int, int], fan_cap: bool = True) -> np.ndarray:
    """Return faces int32 [M, 3] of an H×W grid and its cap, read-only; see the module's docstring for their order."""
    height, width = size
    index = np.arange(height * width, dtype=np.int32).reshape(height, width)
    tl, tr, bl, br = (a.ravel() for a in (index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]))
    faces = np.concatenate([np.stack([tl, bl, tr], 1), np.stack([tr, bl, br], 1), cap_faces(size, fan_cap)])
    faces.flags.writeable = False
    return faces


@lru_cache(maxsize=8)
def cap_faces(size: tuple[int, int], fan_cap: bool = True) -> np.ndarray:
    """Return the cap's faces int32 [C, 3], read-only: a fan over 2 (H + W − 2) border vertices, or two triangles."""
    height, width = size
    index = np.arange(height * width, dtype=np.int32).reshape(height, width)
    if fan_cap:
        # Clockwise in the picture, opposite to the direction in which the grid's own faces run along the border.
        loop = np.concatenate([index[0, :-1], index[:-1, -1], index[-1, :0:-1], index[:0:-1, 0]])
        faces = np.stack([np.full_like(loop, height * width), loop, np.roll(loop, -1)], 1)
    else:
        top_left, top_right, bottom_left, bottom_right = index[0, 0], index[0, -1], index[-1, 0], index[-1, -1]
        faces = np.array([[top_right, top_left, bottom_right], [bottom_right, top_left, bottom_left]], np.int32)
    faces.flags.writeable = False
    return faces


def angle_threshold_deg(focal: float, profile: Profile) -> float:
    """Return the angle below which a face is occluded: atan(tan 2.5° · 500 / focal), or 2.5° with `fixed_angle`."""
    if profile.fixed_angle:
        return MIN_ANGLE_DEG
    return math.degrees(math.atan(math.tan(math.radians(MIN_ANGLE_DEG)) * RELEASED_FOCAL / focal))


def build(
    frame: np.ndarray,
    z_depth: np.ndarray,
    K: np.ndarray,
    profile: str | Profile = "default",
    valid: np.ndarray | None = None,
) -> DWMesh:
    """Build the DW-Mesh of one frame.

    Args:
        frame: uint8 [H, W, 3], RGB.
        z_depth: real [H, W], finite and positive, any unit.
        K: [3, 3] intrinsics in pixels.
        profile: a key of PROFILES, or a Profile.
        valid: bool [H, W], True where depth is known; None: everywhere. Elsewhere the mesh stays watertight,
            but its faces are occluded: they show nothing and have no texture.

    Raises:
        BadSample: depth_shape, depth_nan, depth_nonpositive.
        ConfigError: unknown profile, bad K.
    """
    profile = profile_of(profile) if isinstance(profile, str) else profile
    K = check_intrinsics(K)
    depth = np.array(z_depth, np.float32, order="C")
    frame = np.ascontiguousarray(frame)
    if depth.ndim != 2 or min(depth.shape) < 3 or frame.shape != (*depth.shape, 3) or frame.dtype != np.uint8:
        raise BadSample("depth_shape", f"depth {list(depth.shape)}, frame {frame.dtype} {list(frame.shape)}")
    least, largest = float(depth.min()), float(depth.max())
    if not (math.isfinite(least) and math.isfinite(largest)):
        raise BadSample("depth_nan", "z_depth is not finite; use geometry.depth.to_z_depth")
    if least <= 0:
        raise BadSample("depth_nonpositive", f"least z_depth {least:.6g}; use geometry.depth.to_z_depth")
    boundary = profile.boundary_depth or BOUNDARY_RATIO * largest
    depth[0], depth[-1], depth[:, 0], depth[:, -1] = (boundary,) * 4
    occluded = occlusion_flags(depth, K, math.radians(angle_threshold_deg(K[0, 0], profile)), profile.pixel_offset)
    if not profile.vertex_alpha:
        occluded[:, 0], occluded[:, -1], occluded[:, :, 0], occluded[:, :, -1] = (True,) * 4
    if valid is not None:
        occluded |= faces_with(~valid)
    return DWMesh(depth, K, frame, occluded, profile)


def faces_with(corners: np.ndarray) -> np.ndarray:
    """Return bool [2, H−1, W−1]: faces of the grid with at least one corner that is True in bool [H, W]."""
    either = corners[:-1, 1:] | corners[1:, :-1]
    return np.stack([corners[:-1, :-1] | either, corners[1:, 1:] | either])


def occlusion_flags(z_depth: np.ndarray, K: np.ndarray, angle: float, offset: float = 0.5) -> np.ndarray:
    """Return bool [2, H−1, W−1]: faces of the grid z_depth float32 [H, W] with an angle below `angle` (radians).

    Without arccos: the smallest angle lies between the two longest edges a and b, and |n| = |a| |b| sin(angle) with the
    face's normal n, so the face is occluded when |n|² < sin²(angle) · (largest product of two squared edges).
    """
    from ex4d.geometry.render import cpu_kernels

    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2] - offset, K[1, 2] - offset
    return cpu_kernels.occlusion_flags(z_depth, 1 / fx, 1 / fy, cx, cy, math.sin(angle) ** 2)


def contains(mesh: DWMesh, point: np.ndarray) -> bool:
    """Return True where `point` [3] (source axes) lies inside the closed volume, behind the depth surface.

    Every ray from the source's eye crosses the surface once and the cap once, so comparing depths along it suffices.
    """
    x, y, z = np.asarray(point, np.float64)
    if not 0 < z < mesh.boundary_depth:
        return False
    height, width = mesh.size
    u = mesh.K[0, 0] * x / z + mesh.K[0, 2] - mesh.profile.pixel_offset
    v = mesh.K[1, 1] * y / z + mesh.K[1, 2] - mesh.profile.pixel_offset
    j, i = math.floor(u), math.floor(v)
    if not (0 <= i < height - 1 and 0 <= j < width - 1):
        return False
    s, t = u - j, v - i
    inverse = 1 / mesh.z_depth[i : i + 2, j : j + 2].astype(np.float64)
    (tl, tr), (bl, br) = inverse
    # 1/z is affine over a triangle in image space.
    surface = tl + s * (tr - tl) + t * (bl - tl) if s + t <= 1 else br + (1 - s) * (bl - br) + (1 - t) * (tr - br)
    return bool(1 / z < surface)


def export(mesh: DWMesh, path: str | Path) -> None:
    """Write the mesh as PLY or GLB with vertex colours; world = source camera.

    GLB: two objects, "visible" (frame colours) and "occluded" (black); Y up, Z towards the viewer, as glTF requires.
    PLY: one mesh in OpenCV axes; each face has the property `occluded` (0 or 1).

    Raises:
        ConfigError: the suffix is neither .ply nor .glb.
    """
    import trimesh

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".ply", ".glb"):
        raise ConfigError("mesh path", str(path), "must end in .ply or .glb")
    colours = np.concatenate(
        [mesh.colours.reshape(-1, 3), np.zeros((len(mesh.vertices) - mesh.z_depth.size, 3), np.uint8)]
    )
    drawn = np.ones(len(mesh.faces), bool) if mesh.profile.keep_occluded else ~mesh.occluded
    if suffix == ".ply":
        path.write_bytes(_ply_bytes(mesh.vertices, colours, mesh.faces[drawn], mesh.occluded[drawn]))
        return
    axes = np.array([1.0, -1.0, -1.0])
    scene = trimesh.Scene()
    for name, chosen, shade in (
        ("visible", drawn & ~mesh.occluded, colours),
        ("occluded", drawn & mesh.occluded, colours * 0),
    ):
        if chosen.any():
            part = trimesh.Trimesh(mesh.vertices * axes, mesh.faces[chosen], vertex_colors=shade, process=False)
            part.remove_unreferenced_vertices()
            scene.add_geometry(part, geom_name=name, node_name=name)
    path.write_bytes(scene.export(file_type="glb"))


def _ply_bytes(vertices: np.ndarray, colours: np.ndarray, faces: np.ndarray, occluded: np.ndarray) -> bytes:
    """Return a binary PLY whose faces carry `occluded` as a property; trimesh writes no face properties of its own."""
    points = np.zeros(len(vertices), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    points["xyz"], points["rgb"] = vertices, colours
    triangles = np.zeros(len(faces), [("count", "u1"), ("index", "<i4", 3), ("occluded", "u1")])
    triangles["count"], triangles["index"], triangles["occluded"] = 3, faces, occluded
    header = [
        "ply",
        "format binary_little_endian 1.0",
        "comment DW-Mesh, OpenCV axes of the source camera; occluded = 1: a face across a depth edge, border or cap",
        f"element vertex {len(points)}",
        *(f"property float {name}" for name in "xyz"),
        *(f"property uchar {name}" for name in ("red", "green", "blue")),
        f"element face {len(triangles)}",
        "property list uchar int vertex_indices",
        "property uchar occluded",
        "end_header\n",
    ]
    return "\n".join(header).encode() + points.tobytes() + triangles.tobytes()
