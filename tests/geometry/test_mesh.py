"""The mesh is closed, wound consistently, and flags the faces of the arccos rule; the checks detect mutants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import trimesh
from geometry_scenes import random_scene

from ex4d.depth import DepthRequest, estimate
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import intrinsics
from ex4d.geometry.depth import to_z_depth
from ex4d.geometry.mesh import (
    BOUNDARY_RATIO,
    PROFILES,
    DWMesh,
    angle_threshold_deg,
    build,
    contains,
    export,
)
from ex4d.geometry.mesh import topology as make_topology
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip
from ex4d.video.frames import decode, frame_pts


def smallest_angles(mesh: DWMesh) -> np.ndarray:
    """Return the smallest angle in radians of every grid face, float64 [2, H−1, W−1], by arccos: the slow reference."""
    corners = mesh.vertices[mesh.faces[: mesh.face_occluded.size]]
    angles = []
    for k in range(3):
        a, b = corners[:, (k + 1) % 3] - corners[:, k], corners[:, (k + 2) % 3] - corners[:, k]
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        angles.append(np.arccos(np.clip(cosine, -1, 1)))
    return np.min(angles, axis=0).reshape(mesh.face_occluded.shape)


def edges_closed(faces: np.ndarray) -> bool:
    """Each directed edge once, its opposite once: two faces an edge, wound consistently."""
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    forward = directed[:, 0] << 32 | directed[:, 1]
    backward = directed[:, 1] << 32 | directed[:, 0]
    return len(np.unique(forward)) == len(forward) and np.array_equal(np.sort(forward), np.sort(backward))


def euler_number(faces: np.ndarray) -> int:
    """V − E + F of the vertices that are used."""
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
    return len(np.unique(faces)) - len(np.unique(edges, axis=0)) + len(faces)


def trimesh_closed(vertices: np.ndarray, faces: np.ndarray) -> bool:
    shape = trimesh.Trimesh(vertices, faces, process=False)
    return bool(shape.is_watertight and shape.is_winding_consistent and shape.volume > 0)


def open_rays(vertices: np.ndarray, faces: np.ndarray, origins: np.ndarray, directions: np.ndarray) -> int:
    """Return how many rays cross the surface an odd number of times, or enter and leave it unequally often.

    The side of an edge on which a ray passes is the sign of a determinant, computed once for both faces of the edge
    (from its lower to its higher vertex), so that rays through an edge are counted by exactly one of them.
    """
    triples = np.stack([faces, np.roll(faces, -1, 1)], -1)
    low, high = triples.min(-1), triples.max(-1)
    edges, edge_of = np.unique(low * len(vertices) + high, return_inverse=True)
    edge_of = edge_of.reshape(low.shape)
    a, b = vertices[edges // len(vertices)], vertices[edges % len(vertices)]
    turned = triples[..., 0] > triples[..., 1]
    bad = 0
    for start in range(0, len(origins), 2048):
        origin, ray = origins[start : start + 2048], directions[start : start + 2048]
        # Side: ray · ((a − o) × (b − o)), expanded so that it is two matrix products.
        side = ray @ np.cross(a, b).T - np.cross(origin, ray) @ (b - a).T * -1
        left = (side >= 0)[:, edge_of] != turned
        inward, outward = left.all(-1), ~left.any(-1)
        bad += int(((inward.sum(1) != outward.sum(1)) | ((inward.sum(1) + outward.sum(1)) % 2 == 1)).sum())
    return bad


def rays_at(vertices: np.ndarray, faces: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return lines (origins, directions) from outside, half of them aimed at edges of the border ring and the cap."""
    rng = np.random.default_rng(seed)
    reach = 3 * np.linalg.norm(vertices, axis=1).max()
    origins = rng.standard_normal((count, 3))
    origins *= reach / np.linalg.norm(origins, axis=1, keepdims=True)
    targets = vertices[rng.integers(0, len(vertices), count)] + rng.normal(0, 0.05, (count, 3))
    far = np.isclose(vertices[:, 2], vertices[:, 2].max())
    rim = faces[far[faces].sum(1) >= 2]
    pick = rim[rng.integers(0, len(rim), count // 2)]
    corner = rng.integers(0, 3, count // 2)
    p = vertices[pick[np.arange(count // 2), corner]]
    q = vertices[pick[np.arange(count // 2), (corner + 1) % 3]]
    targets[: count // 2] = p + rng.uniform(0.05, 0.95, (count // 2, 1)) * (q - p)
    return origins, targets - origins


def mutants(vertices: np.ndarray, faces: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    flipped = faces.copy()
    flipped[5] = flipped[5, ::-1]
    return {
        "two-triangle cap": make_topology(size, fan_cap=False),
        "one face removed": np.delete(faces, 5, axis=0),
        "one face flipped": flipped,
    }


@pytest.mark.parametrize("size", [(3, 3), (3, 8), (9, 5), (48, 64)])
def test_topology_is_a_sphere(size):
    faces = make_topology(size)
    assert edges_closed(faces)
    assert euler_number(faces) == 2
    assert len(faces) == 2 * (size[0] - 1) * (size[1] - 1) + 2 * (size[0] + size[1] - 2)


@pytest.mark.parametrize("seed", range(3))
def test_mesh_is_watertight_and_every_check_catches_every_mutant(seed):
    size = (8, 10)
    mesh = build(*random_scene(seed, size), intrinsics(size))
    faces = mesh.faces
    assert edges_closed(faces)
    assert euler_number(faces) == 2
    assert trimesh_closed(mesh.vertices, faces)
    origins, directions = rays_at(mesh.vertices, faces, 4000, seed)
    assert open_rays(mesh.vertices, faces, origins, directions) == 0
    for name, mutant in mutants(mesh.vertices, faces, size).items():
        assert not edges_closed(mutant), name
        assert (euler_number(mutant) == 2) == (name == "one face flipped"), name  # it counts, and sees no direction
        assert not trimesh_closed(mesh.vertices, mutant), name
        # Aimed at the mutated face and at the cap's rim, where the two-triangle cap has its T-junctions.
        middle = mesh.vertices[faces[5]].mean(0)
        aimed = np.concatenate([directions, (middle - origins)[:500]])
        assert open_rays(mesh.vertices, mutant, np.concatenate([origins, origins[:500]]), aimed) > 0, name


@pytest.mark.heavy
def test_a_million_rays_find_no_leak():
    leaks = 0
    for seed in range(10):
        size = (8, 10)
        mesh = build(*random_scene(seed, size), intrinsics(size))
        leaks += open_rays(mesh.vertices, mesh.faces, *rays_at(mesh.vertices, mesh.faces, 100_000, seed))
    assert leaks == 0


def check_mesh(mesh: DWMesh, radius: float) -> None:
    """Finite vertices, no face without area, and the eyes of the usual orbits outside."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    assert np.isfinite(mesh.vertices).all(), "finite"
    assert (np.linalg.norm(np.cross(b - a, c - a), axis=1) > 0).all(), "area"
    for angle in np.radians((-90, -60, -30, 0, 30, 60, 90)):
        eye = np.array([radius * np.sin(angle), 0, radius * (1 - np.cos(angle))])
        assert not contains(mesh, eye), "outside"


def check_frame(frame: np.ndarray, z_depth: np.ndarray) -> None:
    """Run check_mesh; border and cap must be behind everything and occluded."""
    mesh = build(frame, z_depth, intrinsics(z_depth.shape))
    check_mesh(mesh, float(1.06 * np.percentile(z_depth, 1)))
    assert np.isclose(mesh.boundary_depth, BOUNDARY_RATIO * z_depth.max())
    assert mesh.face_occluded[:, [0, -1]].all()
    assert mesh.face_occluded[:, :, [0, -1]].all()
    assert mesh.occluded[mesh.face_occluded.size :].all()


@pytest.mark.parametrize(("place", "value", "what"), [((4, 5), np.nan, "finite"), (np.s_[4, 5:7], 0.0, "area")])
def test_the_checks_of_a_frame_catch_broken_vertices(place, value, what):
    mesh = build(*random_scene(0, (12, 16)), intrinsics((12, 16)))
    broken = mesh.z_depth.copy()
    broken[place] = value
    with pytest.raises(AssertionError, match=what):
        check_mesh(replace(mesh, z_depth=broken), 1.0)


def test_the_checks_of_a_frame_catch_an_eye_inside():
    frame, z_depth = random_scene(0, (12, 16))
    wide = build(frame, z_depth, intrinsics((12, 16), fov_deg=120.0))  # at 54° no orbit's eye is before the camera
    check_mesh(wide, 0.5)
    with pytest.raises(AssertionError, match="outside"):
        check_mesh(wide, 1.3 * float(z_depth.max()))


@pytest.mark.parametrize("seed", range(10))
def test_each_frame_of_synthetic_clips(seed):
    check_frame(*random_scene(seed, (48, 64)))
    config = SyntheticConfig(num_frames=3, size=(36, 48), sky=seed % 2 == 1)
    for frame, z_depth in zip(*render_clip(*clip_scene(config, seed), config.fps), strict=True):
        check_frame(frame, z_depth)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vipe_examples/dog-example.mp4", (72, 128)),
        ("vipe_examples/cosmos-example.mp4", (72, 128)),
        ("ex4d_flower/input.mp4", (96, 96)),
    ],
)
def test_each_frame_of_real_clips(media, name, size):
    """Depth from parallax alone, six frames, at half its size: each mesh is sound, and closed as trimesh sees it."""
    pts, _ = frame_pts(media / name)
    frames = decode(media / name, pts[:18:3], (2 * size[0], 2 * size[1]))
    found = estimate("parallax", frames, DepthRequest())
    clip = to_z_depth(found.values, found.kind, metric=found.metric)[:, ::2, ::2]
    frames = frames[:, ::2, ::2]
    for frame, z_depth in zip(frames, clip, strict=True):
        check_frame(frame, z_depth)
    mesh = build(frames[0], clip[0], intrinsics(size))
    assert trimesh_closed(mesh.vertices, mesh.faces)


def test_contains_agrees_with_trimesh():
    size = (12, 16)
    mesh = build(*random_scene(1, size), intrinsics(size))
    points = np.random.default_rng(0).uniform((-3, -2, 0.1), (3, 2, 10), (400, 3))
    expected = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).contains(points)
    mine = np.array([contains(mesh, point) for point in points])
    assert 0.1 < mine.mean() < 0.9
    assert np.array_equal(mine, expected)


@pytest.mark.parametrize("profile", ["released", "torn"])
@pytest.mark.parametrize("seed", range(3))
def test_flags_equal_the_arccos_rule(seed, profile):
    size = (60, 80)
    mesh = build(*random_scene(seed, size), intrinsics(size), profile)
    slow = smallest_angles(mesh) < np.radians(angle_threshold_deg(mesh.K[0, 0], PROFILES[profile]))
    inner = np.s_[:, 1:-1, 1:-1]
    assert np.array_equal(mesh.face_occluded[inner], slow[inner])
    assert 0.005 < slow[inner].mean() < 0.5


@pytest.mark.parametrize("focal", [250.0, 500.0, 1000.0])
def test_default_threshold_keeps_the_depth_jump(focal):
    K = np.array([[focal, 0, 16], [0, focal, 16], [0, 0, 1]])
    for jump, expected in ((1.03, False), (1.06, True)):
        z_depth = np.full((32, 32), 2.0, np.float32)
        z_depth[:, 16:] *= jump
        flags = build(np.zeros((32, 32, 3), np.uint8), z_depth, K).face_occluded
        assert flags[0, 16, 15] == expected  # 2.5° at f = 500 is a jump of 4.6 %


def test_released_profile_has_the_released_defects():
    size = (32, 40)
    mesh = build(*random_scene(0, size), intrinsics(size), "released")
    alpha = mesh.vertex_alpha
    assert mesh.boundary_depth == 100
    assert alpha[0, 0]
    assert alpha[-1, -1]  # two opposite corners stay opaque
    assert not alpha[0, -1]
    assert not alpha[-1, 0]
    assert len(mesh.faces) == mesh.face_occluded.size + 2
    assert not trimesh_closed(mesh.vertices, mesh.faces)


def test_bad_frames_and_choices_are_refused():
    frame, z_depth = random_scene(0, (8, 8))
    K = intrinsics((8, 8))
    for bad, reason in (
        (z_depth * 0, "depth_nonpositive"),
        (z_depth * np.nan, "depth_nan"),
        (z_depth[:4], "depth_shape"),
    ):
        with pytest.raises(BadSample) as caught:
            build(frame, bad, K)
        assert caught.value.reason == reason
    with pytest.raises(BadSample, match="depth_shape"):
        build(frame.astype(np.float32), z_depth, K)
    with pytest.raises(ConfigError):
        build(frame, z_depth, K, profile="best")


def test_ply_and_glb_open_again_with_their_colours(tmp_path):
    size = (40, 48)
    mesh = build(*random_scene(0, size), intrinsics(size))
    export(mesh, tmp_path / "mesh.ply")
    ply = trimesh.load(tmp_path / "mesh.ply", process=False)
    assert np.array_equal(ply.faces, mesh.faces)
    assert np.allclose(ply.vertices, mesh.vertices, rtol=1e-6)
    assert np.array_equal(ply.visual.vertex_colors[: 40 * 48, :3], mesh.colours.reshape(-1, 3))
    assert np.array_equal(ply.metadata["_ply_raw"]["face"]["data"]["occluded"].reshape(-1), mesh.occluded)
    assert ply.is_watertight
    export(mesh, tmp_path / "mesh.glb")
    parts = trimesh.load(tmp_path / "mesh.glb").geometry
    assert set(parts) == {"visible", "occluded"}
    assert len(parts["occluded"].faces) == mesh.occluded.sum()
    assert len(parts["visible"].faces) == (~mesh.occluded).sum()
    with pytest.raises(ConfigError):
        export(mesh, tmp_path / "mesh.obj")
