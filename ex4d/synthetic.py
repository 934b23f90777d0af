"""Procedural moving scenes with exact depth, cameras and novel views, and a corpus of them as ordinary video files.

A scene is a textured room with textured spheres and boxes that move and turn on smooth paths. Rays are cast exactly, so
any camera at any time gives a true picture and a true z-depth, against which warps, masks and generated views are
measured.

The nearest body (the hero) stands at the point about which an orbit turns; all others stay outside the orbit's circle.
So a camera may go ±90° and more around (0, 0, r), r = 1.06 × the 1st percentile of the first depth, without entering a
solid (`tests/test_synthetic.py` measures it).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ex4d import storage, video
from ex4d.config import checked, fingerprint, setting
from ex4d.errors import ConfigError
from ex4d.geometry import pose_trees, trajectory
from ex4d.geometry.camera import FOV_DEG, Camera, intrinsics, look_at
from ex4d.geometry.pose_file import PoseFile
from ex4d.synthetic_bodies import FACES_PER_BODY, Body, Textures, paint, random_bodies, random_room, random_textures

# Unit vector towards the light, fixed in the world: shading does not depend on the view.
LIGHT = np.array([-0.48, -0.78, -0.40])
CAMERA_MOTIONS = ("static", "gentle", "strong")


@dataclass(frozen=True)
class SyntheticConfig:
    """A corpus of procedural videos, which `write_corpus` writes."""

    num_videos: int = setting(24, "Number of videos; video i depends on (seed, i) alone.", ge=1)
    num_frames: int = setting(33, "Frames of each video.", ge=1)
    size: tuple[int, int] = setting((96, 96), "[height, width], px.", ge=2)
    fps: float = setting(8.0, "Frames per second.", gt=0)
    seed: int = setting(0, "Seed of the corpus; corpora of different seeds share no scene.", ge=0)
    camera_motion: str = setting(
        "gentle",
        "Motion of the source camera: gentle is 3 to 30 degrees a second, strong twice as much.",
        choices=CAMERA_MOTIONS,
    )
    moving_bodies: bool = setting(True, "Bodies move; false: they stand still.")
    max_frequency: float = setting(
        3.0, "Finest texture, in cycles per image height at a surface's usual distance.", gt=0
    )
    supersample: int = setting(2, "Rays per pixel along each axis.", ge=1)
    sky: bool = setting(False, "Open sky in place of walls and ceiling; its depth is large and finite.")
    fov_deg: float = setting(FOV_DEG, "Field of view over the longer side, degrees.", ge=1, le=170)
    second_camera_deg: float | None = setting(
        None, "Film each video with a second camera, up to this angle away; null: one camera.", gt=0, le=90
    )

    def __post_init__(self) -> None:
        checked(self, "synthetic")


@dataclass(frozen=True)
class Scene:
    """A room, its bodies and their textures. Create one with `Scene.random`."""

    seed: int
    scale: float
    bodies: tuple[Body, ...]  # the room is last
    textures: Textures
    caption: str

    @staticmethod
    def random(
        seed: int | tuple[int, ...], max_frequency: float = 3.0, moving_bodies: bool = True, sky: bool = False
    ) -> Scene:
        """Create the scene of a seed.

        Args:
            seed: equal seeds give equal scenes.
            max_frequency: upper end of the textures' band in cycles per image height, for a surface seen head-on at
                its usual distance with a field of view of 54°; H/2 is the Nyquist limit of a picture H px high.
            moving_bodies: False: no body moves.
            sky: walls and ceiling are moved far away and become a smooth sky; the floor extends to them.
        """
        if max_frequency <= 0:
            raise ConfigError("synthetic.max_frequency", max_frequency, "must be positive (cycles per image height)")
        rng = np.random.default_rng([7919, *np.atleast_1d(seed)])
        scale = float(rng.uniform(1.6, 3.0))
        bodies = [*random_bodies(rng, scale, moving_bodies), random_room(rng, scale, sky)]
        bases, cycles = paint(rng, bodies, scale, max_frequency, sky)
        textures = random_textures(rng, bases, cycles, contrast=0.11)
        things = " and ".join(f"{'an' if body.name[0] == 'o' else 'a'} {body.name}" for body in bodies[:-1])
        caption = f"{things} {'under the sky' if sky else 'in a room'}"
        return Scene(int(np.atleast_1d(seed)[-1]), scale, tuple(bodies), textures, caption)

    def cast(
        self, origins: np.ndarray, directions: np.ndarray, time_s: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cast rays; return ray parameter float64 [N], body index int64 [N] and body coordinates float64 [N,3] of hits.

        Args:
            origins: float64 [N,3] or [1,3], world.
            directions: float64 [N,3], world, any length (the unit of the ray parameter).
        """
        hits = np.stack([body.intersect(origins, directions, time_s) for body in self.bodies])
        index = np.argmin(hits, axis=0)
        distance = np.take_along_axis(hits, index[None], axis=0)[0]
        points = origins + distance[:, None] * directions
        local = np.empty_like(points)
        for number, body in enumerate(self.bodies):
            chosen = index == number
            local[chosen] = body.to_local(points[chosen], time_s)
        return distance, index, local

    def render(self, camera: Camera, time_s: float, supersample: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Render (frame uint8 [H,W,3] RGB, z_depth float32 [H,W] along the camera's z through pixel centres).

        Args:
            supersample: n × n rays per pixel for the colours (a box filter); depth is always that of the centre ray.
        """
        height, width = camera.size
        origin, directions = camera_rays(camera, supersample)
        depth, index, local = self.cast(origin, directions, time_s)
        colours = self._shade(index, local, time_s)
        colours = colours.reshape(height, supersample, width, supersample, 3).mean(axis=(1, 3))
        frame = np.clip(np.rint(colours * 255), 0, 255).astype(np.uint8)
        if supersample % 2:
            middle = supersample // 2
            depth = depth.reshape(height, supersample, width, supersample)[:, middle, :, middle]
        else:
            depth = self.cast(*camera_rays(camera, 1), time_s)[0].reshape(height, width)
        return frame, depth.astype(np.float32)

    def moving(self, camera: Camera, time_s: float) -> np.ndarray:
        """Return bool [H, W], True where a pixel centre sees a body that moves in the world."""
        _, index, _ = self.cast(*camera_rays(camera, 1), time_s)
        moves = np.array([bool(np.any(body.sway)) or body.spin[0] != 0 for body in self.bodies])
        return moves[index].reshape(camera.size)

    def _shade(self, index: np.ndarray, local: np.ndarray, time_s: float) -> np.ndarray:
        colours = np.empty((len(index), 3), dtype=np.float32)
        for number, body in enumerate(self.bodies):
            chosen = index == number
            points = local[chosen]
            normals, face = body.normal_and_face(points)
            lambert = normals @ (body.rotation(time_s).T @ LIGHT)
            # Walls are lit from inside, so the side turned away from the light is lit as well.
            lambert = np.abs(lambert) if body.kind == "room" else np.maximum(lambert, 0.0)
            light = (0.70 + 0.36 * lambert).astype(np.float32)
            colours[chosen] = self.textures.colour(face + FACES_PER_BODY * number, points) * light[:, None]
        return colours

    def source_cameras(
        self,
        num_frames: int,
        fps: float = 8.0,
        size: tuple[int, int] = (96, 96),
        motion: str = "gentle",
        fov_deg: float = FOV_DEG,
        seed: int = 0,
    ) -> list[Camera]:
        """Return the source camera of each frame; the first has the identity pose (it defines the world).

        Args:
            motion: "static", "gentle" or "strong"; see SyntheticConfig.
            seed: chooses another path through the same scene.
        """
        if motion not in CAMERA_MOTIONS:
            raise ConfigError("synthetic.camera_motion", motion, f"allowed: {', '.join(CAMERA_MOTIONS)}")
        K = intrinsics(size, fov_deg)
        strength = float(CAMERA_MOTIONS.index(motion))
        rng = np.random.default_rng([104729, self.seed, seed])
        arc_deg_s, lift, truck, dolly = rng.uniform([10, -0.06, -0.12, -0.10], [30, 0.03, 0.12, 0.10])
        speed = np.radians(arc_deg_s) * rng.choice([-1.0, 1.0]) * rng.choice([0.3, 1.0])
        pivot = np.array([0.0, 0.0, self.scale])
        poses = []
        for frame in range(num_frames):
            time_s = frame / fps
            # A slow sine keeps long clips within the room: at most ±0.5 rad (29°).
            angle = 0.5 * np.sin(2 * strength * speed * time_s) if strength else 0.0
            drift = strength * np.sin(0.8 * time_s) * self.scale
            eye = pivot + self.scale * (1 + 0.5 * np.sin(0.8 * time_s) * strength * dolly) * np.array(
                [np.sin(angle), 0.0, -np.cos(angle)]
            )
            shift = drift * np.array([0.5 * truck, lift, 0.0])
            poses.append(look_at(eye + shift, pivot + 0.5 * shift))
        return [Camera(K=K, w2c=pose, size=size) for pose in poses]


def clip_scene(config: SyntheticConfig, index: int) -> tuple[Scene, list[Camera]]:
    """Return the scene and the source cameras of video `index` of a corpus."""
    scene = Scene.random((config.seed, index), config.max_frequency, config.moving_bodies, config.sky)
    cameras = scene.source_cameras(
        config.num_frames, config.fps, config.size, config.camera_motion, config.fov_deg, seed=config.seed
    )
    return scene, cameras


def second_cameras(config: SyntheticConfig, index: int, cameras: list[Camera], radius: float) -> list[Camera]:
    """Return video `index`'s second camera per frame: an orbit, of up to `second_camera_deg`, relative to the first.

    Args:
        radius: distance of the point that is orbited (`trajectory.radius_of` the first depth).
    """
    most = config.second_camera_deg
    if most is None:
        raise ConfigError("synthetic.second_camera_deg", most, "must be set: the angle of the second camera")
    rng = np.random.default_rng([15485863, config.seed, index])
    angle_deg = most * rng.uniform(0.5, 1.0) * rng.choice([-1.0, 1.0])
    path = trajectory.build("orbit", len(cameras), angle_deg, radius)
    return [Camera(camera.K, swing @ camera.w2c, camera.size) for camera, swing in zip(cameras, path, strict=True)]


def render_clip(scene: Scene, cameras: list[Camera], fps: float, supersample: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Render (frames uint8 [T,H,W,3], z_depth float32 [T,H,W]); frame t is seen by cameras[t] at time t / fps."""
    views = [scene.render(camera, number / fps, supersample) for number, camera in enumerate(cameras)]
    return np.stack([frame for frame, _ in views]), np.stack([depth for _, depth in views])


def write_corpus(folder: str | Path, config: SyntheticConfig) -> list[Path]:
    """Write a corpus of mp4 files, skipping those that exist; return their paths.

    Beside `NAME.mp4`: `NAME.depth.npz` (z_depth float32 [T,H,W]; K float64 [3,3]; w2c float64 [T,4,4], the source
    cameras) and the caption `NAME.txt`; with a second camera also its video and cameras (docs/dataset_format.md). The
    name holds the fingerprint of the settings. Each file is written atomically, the mp4 last, so a second run completes
    a corpus; equal configs give equal bytes.
    """
    paths = []
    for index in range(config.num_videos):
        recipe = {key: value for key, value in vars(config).items() if key != "num_videos" and value is not None}
        path = Path(folder) / f"synthetic-{fingerprint(recipe)[:8]}-{index:05d}.mp4"
        if not path.exists():
            _write_video(path, config, index)
        paths.append(path)
    return paths


def _write_video(path: Path, config: SyntheticConfig, index: int) -> None:
    scene, cameras = clip_scene(config, index)
    frames, z_depth = render_clip(scene, cameras, config.fps, config.supersample)
    if config.second_camera_deg is not None:
        second = second_cameras(config, index, cameras, trajectory.radius_of(z_depth[0]))
        for which, poses in ((".source.camera.json", cameras), (".camera.json", second)):
            file = PoseFile(_w2c(poses), np.stack([camera.K for camera in poses]), size=config.size)
            storage.write_bytes(path.with_suffix(which), pose_trees.write_json(file))
        _write_filmed(path.with_suffix(".source.mp4"), frames, z_depth, cameras, config.fps)
        cameras = second
        frames, z_depth = render_clip(scene, cameras, config.fps, config.supersample)
    storage.write_bytes(path.with_suffix(".txt"), f"{scene.caption}\n".encode())
    _write_filmed(path, frames, z_depth, cameras, config.fps)


def _write_filmed(path: Path, frames: np.ndarray, z_depth: np.ndarray, cameras: list[Camera], fps: float) -> None:
    sidecar = io.BytesIO()
    np.savez_compressed(sidecar, z_depth=z_depth, K=cameras[0].K, w2c=_w2c(cameras))
    storage.write_bytes(path.with_suffix(".depth.npz"), sidecar.getvalue())
    storage.write_bytes(path, video.encode(frames, fps))


def _w2c(cameras: list[Camera]) -> np.ndarray:
    return np.stack([camera.w2c for camera in cameras])


def camera_rays(camera: Camera, supersample: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the eye [1,3] and ray directions [H·n·W·n,3] with camera z = 1, so that the ray parameter is z_depth."""
    height, width = camera.size
    u = (np.arange(width * supersample) + 0.5) / supersample
    v = (np.arange(height * supersample) + 0.5) / supersample
    grid = np.stack(np.broadcast_arrays(u[None, :], v[:, None], 1.0), axis=-1).reshape(-1, 3)
    c2w = np.linalg.inv(camera.w2c)
    return c2w[None, :3, 3], grid @ (c2w[:3, :3] @ np.linalg.inv(camera.K)).T
