"""The `released` profile: the released generator can read what `ex4d reconstruct` writes, with the same meaning.

The loader below follows the released tool's conventions and shares no code with ours.
"""

from __future__ import annotations

import numpy as np
import pytest

from ex4d import video
from ex4d.geometry import mesh
from ex4d.geometry.camera import Camera
from ex4d.geometry.render import render
from ex4d.reconstruct import reconstruct
from pipelines import cli

SIZE, NUM_FRAMES = (64, 64), 49


def frames_of(path, num_frames: int, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Return (pictures [T, H, W, 3] RGB as OpenCV decodes them, evenly spaced, the last repeated; frames a second)."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    wanted = np.linspace(0, count - 1, num_frames, dtype=int) if count >= num_frames else np.arange(count)
    pictures = []
    for index in wanted:
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(index))
        good, picture = capture.read()
        assert good
        pictures.append(cv2.resize(picture, size[::-1])[..., ::-1])
    capture.release()
    pictures += [pictures[-1]] * (num_frames - len(pictures))
    return np.stack(pictures), rate


def as_the_released_generator_reads(colour_path, mask_path, num_frames: int, size: tuple[int, int]):
    """Return (colour, mask) [T, H, W, 3] as they reach its VAE, without erosion, and the frame rates of the files."""
    colour, colour_rate = frames_of(colour_path, num_frames, size)
    mask, mask_rate = frames_of(mask_path, num_frames, size)
    seen = (mask / 255 > 0.5).astype(np.float64)  # each channel separately
    condition = (colour / 255 * seen) * 2 - 1
    once = seen * 2 - 1
    twice = once * 2 - 1  # the encoder scales the mask a second time
    return condition, twice, (colour_rate, mask_rate)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video whose depth file is DepthCrafter's: key `depth`, disparity in [0, 1], 1 is near."""
    folder = tmp_path_factory.mktemp("released")
    rng = np.random.default_rng(3)
    picture = np.kron(rng.integers(40, 256, (16, 16, 1)), np.ones((4, 4, 3))).astype(np.uint8)
    video.write(folder / "clip.mp4", np.stack([np.roll(picture, t, axis=1) for t in range(NUM_FRAMES)]), 24)
    near = np.linspace(0.1, 0.4, 64)[None, :, None] * np.ones((NUM_FRAMES, 64, 64))
    near[:, 20:44, 20:40] = 0.9 - 0.2 * np.linspace(0, 1, NUM_FRAMES)[:, None, None]
    np.savez(folder / "clip.npz", depth=near.astype(np.float32))
    return folder / "clip.mp4"


@pytest.fixture(scope="module")
def written(clip):
    folder = clip.parent / "view"
    argv = ["reconstruct", str(clip), "--profile", "released", "--trajectory", "released-180", "--output", str(folder)]
    assert cli.main(argv) == 0
    return folder


def test_names_layout_rate_and_count(written):
    names = {"color_180.mp4", "mask_180.mp4", "camera_180.npz"}
    assert names <= {path.name for path in written.iterdir()}
    with np.load(written / "camera_180.npz", allow_pickle=False) as cameras:
        kinds = {key: (cameras[key].dtype.str, cameras[key].shape) for key in cameras}
    assert kinds == {"extrinsics": ("<f4", (NUM_FRAMES, 4, 4)), "intrinsics": ("<f4", (3, 3))}
    _, _, rates = as_the_released_generator_reads(written / "color_180.mp4", written / "mask_180.mp4", NUM_FRAMES, SIZE)
    assert rates == (30.0, 30.0)


def test_the_condition_and_the_mask_mean_the_same_to_both(written, clip):
    import torch

    from ex4d.models.encoders import Base

    colour, mask, _ = as_the_released_generator_reads(
        written / "color_180.mp4", written / "mask_180.mp4", NUM_FRAMES, SIZE
    )
    view = reconstruct(clip, profile="released", trajectory="released-180", size=None)
    assert 0.03 < view.visible[1:].mean() < 0.95
    np.testing.assert_array_equal(mask, np.where(view.visible, 1.0, -3.0)[..., None].repeat(3, -1))
    assert (colour[~view.visible] == -1).all()
    ours = view.cond_video / 127.5 - 1
    assert np.abs(colour - ours)[view.visible].mean() < 0.03  # H.264 lies between

    class Recorder(Base):
        def encode_video(self, pixels):
            self.__dict__.setdefault("seen", []).append(pixels)
            return pixels

    recorder = object.__new__(Recorder)
    pixels = torch.from_numpy(ours).permute(3, 0, 1, 2)[None].float()
    recorder.encode_condition(pixels, torch.from_numpy(view.visible)[None], "released")
    fed = recorder.__dict__["seen"][1][0].permute(1, 2, 3, 0).numpy()
    np.testing.assert_array_equal(fed, mask)


def test_depth_radius_and_focal_length_are_the_released_ones(clip):
    view = reconstruct(clip, profile="released", trajectory="released-180", size=None)
    with np.load(clip.parent / "clip.npz") as file:
        depth = file["depth"].astype(np.float64)
    scaled = (depth - depth.min()) / (depth.max() - depth.min())
    z_depth = np.clip(10000 / np.maximum(scaled * 3900, 1e-5), 1e-4, 1e4)
    np.testing.assert_allclose(view.z_depth, z_depth, rtol=1e-5)
    np.testing.assert_allclose(view.choices["radius"], z_depth[0, 1:-1, 1:-1].min() + 0.15, rtol=1e-6)
    np.testing.assert_array_equal(view.K, [[500, 0, 32], [0, 500, 32], [0, 0, 1]])
    chosen = reconstruct(clip, profile="released", trajectory="released-180", size=None, fov_deg=90.0)
    np.testing.assert_allclose(chosen.K, [[32, 0, 32], [0, 32, 32], [0, 0, 1]])
    plain = reconstruct(clip, trajectory="released-180", size=None)
    assert np.abs(plain.z_depth / z_depth - 1).max() > 0.1
    drawn = render(mesh.build(view.frames[9], z_depth[9], view.K, "released"), Camera(view.K, view.w2c[9], SIZE))
    assert (drawn.visible_mask == view.visible[9]).mean() > 0.999


def test_the_cameras_are_those_that_the_method_states(written, clip):
    """OpenGL world-to-camera, rows right, up, back, of a slide that looks at (0, 0, r)."""
    radius = reconstruct(clip, profile="released", trajectory="released-180", size=None).choices["radius"]
    with np.load(written / "camera_180.npz", allow_pickle=False) as cameras:
        extrinsics, intrinsics = cameras["extrinsics"].astype(np.float64), cameras["intrinsics"]
    phi = np.linspace(0, 2 * np.pi, NUM_FRAMES)
    for pose, angle in zip(extrinsics, phi, strict=True):
        eye = radius * np.array([np.sin(angle), 0.2 * (np.cos(angle) - 1), 0])
        np.testing.assert_allclose(-pose[:3, :3].T @ pose[:3, 3], eye, atol=1e-5)
        back = (eye - [0, 0, radius]) / np.linalg.norm(eye - [0, 0, radius])
        np.testing.assert_allclose(pose[2, :3], back, atol=1e-5)
        assert pose[0, 0] > 0.5 > -0.5 > pose[1, 1]  # right, and up against OpenCV's y
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(intrinsics, [[500, 0, 32], [0, 500, 32], [0, 0, 1]])


def test_the_released_example_is_reproduced(media, tmp_path):
    """Its 49 cameras, from a clip whose nearest depth is that of the example, to 1e-5; and its files load alike."""
    example = media / "ex4d_flower"
    with np.load(example / "camera_180.npz", allow_pickle=False) as file:
        released, K = file["extrinsics"].astype(np.float64), file["intrinsics"]
    radius = (-released[12, :3, :3].T @ released[12, :3, 3])[0]  # a quarter of the way: x = r
    z_depth = np.full((NUM_FRAMES, 32, 32), 9.0)
    z_depth[0, 8:20, 8:20] = radius - 0.15
    frames = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 32, 32, 3), np.uint8)
    video.write(tmp_path / "clip.mkv", frames, 30, lossless=True)
    np.savez(tmp_path / "clip.npz", z_depth=z_depth)
    argv = ["reconstruct", str(tmp_path / "clip.mkv"), "--profile", "released", "--trajectory", "released-180"]
    assert cli.main([*argv, "--output", str(tmp_path / "view")]) == 0
    with np.load(tmp_path / "view" / "camera_180.npz", allow_pickle=False) as file:
        np.testing.assert_allclose(file["extrinsics"], released, atol=1e-5)
        assert (file["intrinsics"][[0, 1], [0, 1]] == K[[0, 1], [0, 1]]).all()
    colour, mask, rates = as_the_released_generator_reads(
        example / "render_180.mp4", example / "mask_180.mp4", 5, (512, 512)
    )
    assert rates == (30.0, 30.0)
    assert colour.shape == mask.shape == (5, 512, 512, 3)
    assert set(np.unique(mask)) == {-3.0, 1.0}
    assert mask[0].min() == 1  # its first frame is set, too
