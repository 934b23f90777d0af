"""The render contract: `cpu` against `reference`, both against rays, and the rules one by one."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from geometry_scenes import random_camera, random_scene
from scipy.spatial.transform import Rotation

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import Camera, intrinsics, look_at, pixel_rays
from ex4d.geometry.mesh import PROFILES, DWMesh, build
from ex4d.geometry.render import Rendered, choose_backend, cpu, cpu_raster, nvdiffrast, reference, render, warp_video

SIZE = (96, 128)


def compare(seed: int, profile: str) -> tuple[float, float, float, int]:
    """Return shares of equal face ids, visibility, visibility unsnapped, and the largest colour difference."""
    mesh = build(*random_scene(seed, SIZE), intrinsics(SIZE), profile)
    camera = random_camera(seed, SIZE)
    fast, slow = cpu.render(mesh, camera), reference.render(mesh, camera)
    same = fast.face_id == slow.face_id
    difference = np.abs(fast.colour.astype(int) - slow.colour)[same & (fast.visible_mask == slow.visible_mask)].max()
    free = reference.render(mesh, camera, snap=False) if profile == "default" else slow
    equal = fast.visible_mask == slow.visible_mask
    return same.mean(), equal.mean(), (fast.visible_mask == free.visible_mask).mean(), difference


@pytest.mark.parametrize(("seed", "profile"), [(0, "default"), (3, "closed"), (1, "torn"), (2, "released")])
def test_cpu_equals_reference(seed, profile):
    same, visible, unsnapped, difference = compare(seed, profile)
    assert same >= 0.999
    assert visible >= 0.999
    assert unsnapped >= 0.998
    assert difference <= 1


@pytest.mark.heavy
def test_cpu_equals_reference_on_fifty_scenes():
    results = np.array([compare(seed, "default") for seed in range(50)])
    names = ("face ids", "visible", "visible, against the unsnapped reference")
    for name, values in zip(names, results.T[:3], strict=True):
        print(f"{name}: equal on {values.mean():.4%} of the pixels, least {values.min():.4%}")
    assert results[:, 0].min() >= 0.999
    assert results[:, 1].min() >= 0.999
    assert results[:, 2].mean() >= 0.998
    assert results[:, 3].max() <= 1


@pytest.mark.parametrize(
    ("eye", "target", "magnified"),
    [
        ((2.5, 0, 2.5), (0, 0.7, 2.5), 1),  # across the near plane, walls and cap in sight
        ((0.3, 0.1, 0.2), (0, 0, 3), 5),  # triangles of many pixels
        ((0.1, 0.1, 3.5), (0, 0.2, -1), 1),  # out of the closed volume, through back faces
    ],
)
@pytest.mark.parametrize(("profile", "least"), [("closed", 0.05), ("default", 0.0)])
def test_cpu_is_bit_equal_to_the_reference_in_hard_views(profile, least, eye, target, magnified):
    size = (40, 90)
    K = intrinsics(size) * np.array([[magnified, 1, 1], [1, magnified, 1], [1, 1, 1]])
    mesh = build(*random_scene(7, size), intrinsics(size), profile)
    camera = Camera(K, look_at(eye, target), (50, 70))
    fast, slow = cpu.render(mesh, camera), reference.render(mesh, camera)
    assert (slow.face_id >= 0).mean() >= least
    for field in ("face_id", "z_depth", "visible_mask", "colour"):
        assert np.array_equal(getattr(fast, field), getattr(slow, field)), field


def nearest_by_rays(mesh: DWMesh, camera: Camera) -> np.ndarray:
    """Return float64 [H, W] z of the nearest face by Möller–Trumbore, +inf where there is none."""
    points = mesh.vertices @ camera.w2c[:3, :3].T + camera.w2c[:3, 3]
    a, b, c = (points[mesh.faces[:, k]] for k in range(3))
    rays = pixel_rays(camera.size, camera.K).reshape(-1, 1, 3)
    normal = np.cross(rays, c - a)
    determinant = (normal * (b - a)).sum(-1)
    u = -(normal * a).sum(-1) / determinant
    q = np.cross(-a, b - a)
    v = (rays * q).sum(-1) / determinant
    distance = (q * (c - a)).sum(-1) / determinant  # along a ray with z = 1: it is z
    hit = (u >= 0) & (v >= 0) & (u + v <= 1) & (distance > 1e-3 * mesh.z_depth.min())
    if mesh.profile.curtain_reach is not None:
        source_z = (rays * distance[..., None] - camera.w2c[:3, 3]) @ camera.w2c[:3, 2]
        end = (1 + mesh.profile.curtain_reach) * mesh.vertices[mesh.faces, 2].min(1)
        hit &= (~mesh.occluded | (source_z <= end)) & (determinant > 0)
    return np.where(hit, distance, np.inf).min(1).reshape(camera.size)


@pytest.mark.parametrize("profile", ["default", "closed"])
@pytest.mark.parametrize("seed", range(6))
def test_depth_is_the_nearest_along_the_ray_also_across_the_near_plane(seed, profile):
    size = (36, 48)
    mesh = build(*random_scene(seed, size), intrinsics(size), profile)
    camera = random_camera(seed, size)
    if seed >= 3:
        camera = Camera(camera.K, look_at([2.5, 0, 2.5], [0, 0.1 * seed, 2.5]), size)
        local = mesh.vertices @ camera.w2c[:3, :3].T + camera.w2c[:3, 3]
        assert (local[:, 2] < 0).any()  # some triangles cross the near plane
    expected, drawn = nearest_by_rays(mesh, camera), cpu.render(mesh, camera).z_depth
    agree = np.isclose(drawn, expected, rtol=0.01)
    assert agree.mean() >= 0.97  # the rest: pixels within 1/256 px of an edge, slivers seen almost along them


def test_a_plane_is_drawn_exactly():
    """A fronto-parallel plane with a linear ramp of colour, seen from the side: depth and colour have closed forms."""
    size = (64, 64)
    K = intrinsics(size)
    ramp = np.broadcast_to((2 * np.arange(64) + 40).astype(np.uint8)[None, :, None], (64, 64, 3))
    mesh = build(ramp, np.full(size, 4.0), K)
    shift = np.eye(4)
    shift[:3, 3] = (-4 * 10.3 / K[0, 0], 4 * 0.2 / K[1, 1], 0)  # the picture moves by −10.3 px, +0.2 px
    seen = cpu.render(mesh, Camera(K, shift, size))
    inner = np.s_[4:-4, 4:48]
    assert seen.visible_mask[inner].all()
    assert np.allclose(seen.z_depth[inner], 4, rtol=1e-6)
    expected = 2 * (np.arange(64) + 10.3) + 40
    assert np.abs(seen.colour[inner][..., 0] - expected[None, 4:48]).max() <= 0.51
    turned = Camera(K, look_at([2.0, 0, 1], [0, 0, 4]), size)  # perspective: depth along each ray
    rays = pixel_rays(size, K) @ turned.w2c[:3, :3]
    truth = (4 - turned.eye[2]) / rays[..., 2]
    picture = cpu.render(mesh, turned)
    assert np.abs(picture.z_depth / truth - 1)[picture.visible_mask].max() < 1e-3


def test_pixel_centres_keep_the_picture_where_released_corners_shift_it():
    frame, z_depth = random_scene(0, SIZE)
    camera = Camera(intrinsics(SIZE), np.eye(4), SIZE)
    errors = {}
    for profile in ("default", "released"):
        seen = cpu.render(build(frame, z_depth, camera.K, profile), camera)
        errors[profile] = np.abs(seen.colour.astype(int) - frame)[seen.visible_mask].mean()
    assert errors["default"] <= 1 < errors["released"]


def fill_both(corners: np.ndarray, inverse: np.ndarray, face: int, slow: tuple, keys: np.ndarray) -> None:
    reference.draw_triangle(corners, inverse, np.zeros(3), face, *slow)
    values = [x for (u, v), i in zip(corners, inverse, strict=True) for x in (u, v, i, 0)]
    cpu_raster._fill(*(float(x) for x in values), face, False, keys)


def blank(size: tuple[int, int]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    return (np.zeros(size, np.float32), np.full(size, -1, np.int32)), np.zeros(size, np.int64)


def faces_of(keys: np.ndarray) -> np.ndarray:
    return np.where(keys == 0, -1, cpu_raster.LAST_ID - (keys & 0xFFFFFFFF))


def test_equal_depth_goes_to_the_lowest_face_and_nearest_wins():
    slow, keys = blank((8, 8))
    corners, level = np.array([[0.0, 0], [0, 2048], [2048, 0]]), np.ones(3)
    for face, depth in ((3, 1.0), (7, 1.0), (9, 0.5)):
        fill_both(corners, level * depth, face, slow, keys)
    assert set(np.unique(slow[1])) == set(np.unique(faces_of(keys))) == {-1, 3}
    cpu_raster._fill(0.0, 0.0, 1.0, 0.0, 0.0, 2048.0, 1.0, 0.0, 2048.0, 0.0, 1.0, 0.0, 1, False, keys)
    assert set(np.unique(faces_of(keys))) == {-1, 1}  # in any order
    fill_both(corners, level * 2, 11, slow, keys)
    assert set(np.unique(faces_of(keys))) == {-1, 11}


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_share_each_pixel_once(seed):
    """A fan around a pixel centre: every pixel of the picture is drawn by exactly one of its triangles."""
    rng = np.random.default_rng(seed)
    centre = np.array([4 * 256 + 128.0, 4 * 256 + 128.0])
    turns = np.sort(rng.uniform(0, 2 * np.pi, 9))
    turns = np.concatenate([turns, [0, np.pi / 2, np.pi, 3 * np.pi / 2]])
    rim = np.round(centre + 40000 * np.stack([np.cos(np.sort(turns)), np.sin(np.sort(turns))], 1))
    count = np.zeros((9, 9), int)
    for k in range(len(rim)):
        corners = np.stack([centre, rim[k], rim[(k + 1) % len(rim)]])
        slow, keys = blank((9, 9))
        fill_both(corners, np.ones(3), 0, slow, keys)
        assert np.array_equal(slow[1], faces_of(keys))
        count += keys > 0
    assert (count == 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_small_triangles_are_covered_as_by_the_reference(seed):
    """The float32 set-up without branches, on 64 random triangles of a few pixels, many with corners on the rule."""
    rng = np.random.default_rng(seed)
    size, stride, chunk = (6, 7), cpu_raster.STRIDE, cpu_raster.CHUNK
    lane, out = np.zeros(8 * stride, np.float32), np.zeros(3 * chunk, np.int32)
    base = np.repeat(np.tile(rng.integers(-1, 6, 2), 2), stride)
    lane[: 4 * stride] = (base + rng.integers(0, 7, 4 * stride)) * 128
    lane[: 4 * stride] += rng.integers(-100, 100, 4 * stride) * rng.integers(0, 2, 4 * stride)
    last_i, last_j = np.float32(size[0] - 1), np.float32(size[1] - 1)
    kinds = []
    for cull, half in ((False, 0), (True, 0), (False, 1)):
        cpu_raster._cover_chunk(half, lane, cull, last_j, last_i, out)
        for n in range(chunk):
            picks = [n + half, 2 * stride + n, 2 * half * stride + n + 1]
            corners = np.array([[lane[k], lane[stride + k]] for k in picks], np.float64)
            (dx, dy), (ex, ey) = corners[1] - corners[0], corners[2] - corners[0]
            slow, _ = blank(size)
            if not (cull and dx * ey - dy * ex > 0):
                reference.draw_triangle(corners, np.ones(3), np.zeros(3), 0, *slow)
            covered = list(zip(*np.nonzero(slow[1] == 0), strict=True))
            kind, j, i = out[[n, n + chunk, n + 2 * chunk]]
            kinds.append(kind)
            if kind == cpu_raster.ONE:
                assert covered == [(i, j)]
            elif kind == cpu_raster.NONE:
                assert not covered
    assert set(kinds) == {cpu_raster.NONE, cpu_raster.ONE, cpu_raster.MORE}


def test_scaling_depth_and_path_leaves_the_picture():
    frame, z_depth = random_scene(4, SIZE)
    camera = random_camera(4, SIZE)
    longer = camera.w2c.copy()
    longer[:3, 3] *= 8
    small = cpu.render(build(frame, z_depth, camera.K), camera)
    large = cpu.render(build(frame, z_depth * 8, camera.K), Camera(camera.K, longer, SIZE))
    assert np.array_equal(small.face_id, large.face_id)
    assert np.array_equal(small.colour, large.colour)


def test_warp_video_sets_frame_0_and_compensates_a_moving_source():
    frame, z_depth = random_scene(5, SIZE)
    frames, depths = np.stack([frame] * 2), np.stack([z_depth] * 2)
    camera = random_camera(5, SIZE)
    path = np.stack([np.eye(4), camera.w2c])
    cond_video, visible = warp_video(frames, depths, camera.K, path, backend="cpu")
    assert visible[0].all()
    assert np.array_equal(cond_video[0], frame)
    single = render(build(frame, z_depth, camera.K), camera, backend="cpu")
    assert np.array_equal(cond_video[1], single.colour)
    assert np.array_equal(visible[1], single.visible_mask)
    assert not cond_video[1][~visible[1]].any()
    source = np.stack([camera.w2c] * 2)
    moved, _ = warp_video(frames, depths, camera.K, camera.w2c @ path, backend="cpu", source_w2c=source)
    stays = camera.w2c @ path @ np.linalg.inv(camera.w2c)
    still, _ = warp_video(frames, depths, camera.K, stays, backend="cpu")
    assert (np.abs(moved.astype(int) - still) <= 1).mean() > 0.999


@pytest.mark.parametrize("zoom", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("turn_deg", [0.0, 10.0])
def test_a_camera_that_has_not_moved_sees_all_of_the_picture(zoom, turn_deg):
    """It needs no depth: what is in the source's picture is visible, of the colours that the lens would see."""
    frame, z_depth = random_scene(6, SIZE)
    frame = cv2.GaussianBlur(frame, (0, 0), 2)
    K, turned = intrinsics(SIZE), np.eye(4)
    turned[:3, :3] = Rotation.from_euler("y", turn_deg, degrees=True).as_matrix()
    view_K = K.copy()
    view_K[[0, 1], [0, 1]] *= zoom
    path, frames, depths = np.stack([turned] * 2), np.stack([frame] * 2), np.stack([z_depth] * 2)
    cond_video, visible = warp_video(frames, depths, K, path, backend="cpu", view_K=view_K)
    rays = pixel_rays(SIZE, view_K) @ turned[:3, :3] @ K.T
    x, y = rays[..., 0] / rays[..., 2], rays[..., 1] / rays[..., 2]
    inside = (x > 0) & (x < SIZE[1]) & (y > 0) & (y < SIZE[0])
    np.testing.assert_array_equal(visible[1], inside)
    nearest = frame[np.floor(y).astype(int).clip(0, SIZE[0] - 1), np.floor(x).astype(int).clip(0, SIZE[1] - 1)]
    assert np.abs(cond_video[1].astype(int) - nearest)[inside].mean() < 4
    assert not cond_video[1][~inside].any()


def test_frame_0_is_whole_or_drawn_like_the_next():
    frame, z_depth = random_scene(7, SIZE)
    K, camera = intrinsics(SIZE), random_camera(7, SIZE)
    closer = np.eye(4)
    closer[:3, 3] = (camera.w2c[:3, 3]) * 1e-4
    path = np.stack([np.eye(4), closer, camera.w2c])
    frames, depths = np.stack([frame] * 3), np.stack([z_depth] * 3)
    shares = {}
    for first_frame in ("exact", "drawn"):
        cond_video, visible = warp_video(frames, depths, K, path, backend="cpu", first_frame=first_frame)
        shares[first_frame] = visible.mean(axis=(1, 2))
        assert not cond_video[~visible].any()
    assert shares["exact"][0] == 1
    assert shares["exact"][1] < 0.95
    assert abs(shares["drawn"][0] - shares["drawn"][1]) < 0.02
    np.testing.assert_array_equal(shares["exact"][1:], shares["drawn"][1:])
    still = warp_video(frames, depths, K, np.stack([np.eye(4)] * 3), backend="cpu", first_frame="drawn")[1]
    assert still.all()  # a camera that never moves has nothing to pop to
    with pytest.raises(ConfigError, match="first_frame"):
        warp_video(frames, depths, K, path, first_frame="last")


def source_depth(shown: Rendered, camera: Camera) -> np.ndarray:
    """Return [H, W]: depth of the rendered surface along the source camera's axis; −inf where there is none."""
    hit = np.where(shown.face_id >= 0, shown.z_depth, 0)
    points = (pixel_rays(camera.size, camera.K) * hit[..., None] - camera.w2c[:3, 3]) @ camera.w2c[:3, :3]
    return np.where(shown.face_id >= 0, points[..., 2], -np.inf)


def test_a_curtain_is_looked_through_beyond_its_reach():
    """A body at depth 2 before a wall at depth 6, passed sideways: its curtain hides down to 2 × 1.2 and no farther."""
    size = (48, 64)
    K = intrinsics(size)
    z_depth = np.full(size, 6, np.float32)
    z_depth[14:34, 24:40] = 2
    frame = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    camera = Camera(K, look_at([1.4, 0.1, 0.3], [0, 0, 2.6]), size)
    profiles = {"closed": PROFILES["closed"], "torn": replace(PROFILES["torn"], two_sided=False)}
    profiles |= {"cut": replace(PROFILES["closed"], curtain_reach=0.2)}
    meshes = {name: build(frame, z_depth, K, profile) for name, profile in profiles.items()}
    closed, torn, cut = (render(meshes[name], camera, "cpu") for name in ("closed", "torn", "cut"))
    mesh = meshes["closed"]
    end = np.where(mesh.occluded, 1.2 * mesh.vertices[mesh.faces, 2].min(-1), np.inf)
    through = (closed.face_id >= 0) & (source_depth(closed, camera) > end[closed.face_id])
    least = mesh.vertices[mesh.faces[closed.face_id], 2].min(-1)
    assert through.sum() > 100
    assert (~through & mesh.occluded[closed.face_id] & np.isclose(least, 2)).sum() > 20
    assert (torn.visible_mask & through & (cut.face_id == torn.face_id)).sum() > 50
    assert (source_depth(cut, camera) <= end[cut.face_id] + 1e-3).all()
    open_ = through & torn.visible_mask & ~mesh.occluded[cut.face_id]  # neither the next curtain nor a back
    for field in ("colour", "z_depth", "visible_mask", "face_id"):
        assert np.array_equal(getattr(cut, field)[~through], getattr(closed, field)[~through]), field
        assert np.array_equal(getattr(cut, field)[open_], getattr(torn, field)[open_]), field
    farther = render(replace(meshes["cut"], profile=replace(profiles["cut"], curtain_reach=1e6)), camera, "cpu")
    assert np.array_equal(farther.face_id, closed.face_id)
    cond_video, visible = warp_video(frame[None], z_depth[None], K, camera.w2c[None], profiles["cut"], "cpu")
    assert np.array_equal(cond_video[0], cut.colour)
    assert np.array_equal(visible[0], cut.visible_mask)


def test_wrong_shapes_and_unknown_backends_are_refused():
    frame, z_depth = random_scene(0, (16, 16))
    with pytest.raises(BadSample, match="depth_shape"):
        warp_video(frame[None], z_depth[None, :8], intrinsics((16, 16)), np.eye(4)[None])
    with pytest.raises(ConfigError):
        warp_video(frame[None], z_depth[None], intrinsics((16, 16)), np.eye(4))
    with pytest.raises(ConfigError):
        choose_backend("opengl")
    assert choose_backend("auto") in ("cpu", "nvdiffrast")


def test_a_clone_of_nvdiffrast_is_not_the_package(tmp_path, monkeypatch):
    import importlib

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "clone" / "nvdiffrast" / "csrc").mkdir(parents=True)
    (tmp_path / "site" / "nvdiffrast").mkdir(parents=True)
    (tmp_path / "site" / "nvdiffrast" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "clone")
    importlib.invalidate_caches()
    found = importlib.util.find_spec("nvdiffrast")
    assert choose_backend("auto") == ("cpu" if found is None or found.origin is None else "nvdiffrast")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    assert choose_backend("auto") == "nvdiffrast"


def test_nvdiffrast_without_a_gpu_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("only a machine without a GPU can say that it has none")
    mesh = build(*random_scene(0, (16, 16)), intrinsics((16, 16)))
    with pytest.raises(ConfigError, match="CUDA"):
        render(mesh, random_camera(0, (16, 16)), backend="nvdiffrast")


def test_clip_matrix_for_nvdiffrast_puts_pixels_where_the_contract_does():
    """In nvdiffrast the centre of pixel (i, j) is at x = (2 j + 1) / W − 1, y = (2 i + 1) / H − 1."""
    size = (16, 24)
    K = np.array([[20.0, 0, 11], [0, 22, 9], [0, 0, 1]])
    mesh, camera = build(*random_scene(0, size), K), Camera(K, np.eye(4), size)
    points = mesh.vertices[: 16 * 24]
    clip = (
        np.concatenate([points, np.ones((len(points), 1))], 1)
        @ nvdiffrast._clip_matrix(camera, nvdiffrast._near(mesh, points)).T
    )
    row, column = np.divmod(np.arange(16 * 24), 24)
    assert np.allclose(clip[:, 0] / clip[:, 3], (2 * column + 1) / 24 - 1)
    assert np.allclose(clip[:, 1] / clip[:, 3], (2 * row + 1) / 16 - 1)
    assert (np.abs(clip[:, 2]) <= clip[:, 3]).all()
