"""MultiCamVideo and SynCamVideo (of ReCamMaster and SynCamMaster) as pairs of cameras: `preprocess.members=[source]`.

In both, each scene was filmed by ten synchronous cameras and has the files

    train/fFF_apertureA/sceneN/videos/camNN.mp4               FF: focal length, mm
    train/fFF_apertureA/sceneN/cameras/camera_extrinsics.json frameN → camNN → camera-to-world, Unreal's axes, cm

Only this layout is supported; SynCamVideo of December 2024 has another one. A pair becomes the files that
`preprocess.pairs` expects: `camNN-camMM.mp4`, filmed by camNN, and `camNN-camMM.source.mp4`, filmed by camMM, with the
cameras of both in metres. Videos are hard links, which take no space.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np

from ex4d import storage
from ex4d.errors import ConfigError, ContractError
from ex4d.geometry import pose_trees, trajectory_files
from ex4d.geometry.pose_file import PoseFile

SENSOR_MM = 23.76  # width and height of the sensor
SIZE = (1280, 1280)  # [height, width] of the published videos, px; K is scaled if a video was resized
EXTRINSICS = Path("cameras", "camera_extrinsics.json")
_LENS = re.compile(r"f(\d+(?:\.\d+)?)_aperture[\d.]+")


def scenes(folder: Path) -> Iterator[Path]:
    """Yield the folder of each scene under a folder, sorted."""
    for place, names, files in os.walk(folder):
        names.sort()
        if Path(place).name == EXTRINSICS.parent.name and EXTRINSICS.name in files:
            yield Path(place).parent


def pairs_of(cameras: Sequence[str], count: int, draw: Random) -> list[tuple[str, str]]:
    """Return up to `count` pairs (target, source) of different cameras; targets are spread evenly over the cameras."""
    targets = [draw.sample(cameras, len(cameras)) for _ in range(-(-count // len(cameras)))]
    chosen = [name for some in targets for name in some][:count]
    found: dict[tuple[str, str], None] = {}
    for target in chosen:
        others = [(target, name) for name in cameras if name != target and (target, name) not in found]
        if others:
            found[draw.choice(others)] = None
    return sorted(found)


def import_scene(scene: Path, target_folder: Path, count: int, draw: Random) -> int:
    """Write the pairs of a scene into a folder and return their number.

    Raises:
        ConfigError: the folder is on another disk than the scene.
        ContractError: the cameras cannot be read, or fewer than two of them have a video.
    """
    videos = {path.stem: path for path in sorted((scene / "videos").glob("cam*.mp4")) if path.is_file()}
    poses: dict[str, PoseFile] = {}
    for name in videos:
        try:
            poses[name] = trajectory_files.read(scene / EXTRINSICS, "recammaster", name)
        except ConfigError:  # the file lacks this camera
            continue
    if len(poses) < 2:
        raise ContractError(f"{scene}: only {len(poses)} of its {len(videos)} videos have a camera in {EXTRINSICS}")
    K = _intrinsics(scene)
    pairs = pairs_of(sorted(poses), count, draw)
    target_folder.mkdir(parents=True, exist_ok=True)
    for target, source in pairs:
        for name, stem in ((target, f"{target}-{source}"), (source, f"{target}-{source}.source")):
            _link(videos[name], target_folder / f"{stem}.mp4")
            lens = None if K is None else np.tile(K, (len(poses[name].w2c), 1, 1))
            file = PoseFile(poses[name].w2c, lens, size=None if K is None else SIZE)
            storage.write_bytes(target_folder / f"{stem}.camera.json", pose_trees.write_json(file))
    return len(pairs)


def _intrinsics(scene: Path) -> np.ndarray | None:
    """Return K [3,3] in px at SIZE, from the focal length in a folder's name; None if no folder states it."""
    found = next((match for name in reversed(scene.parts) if (match := _LENS.fullmatch(name))), None)
    if found is None:
        return None
    focal_px = float(found[1]) / SENSOR_MM * SIZE[1]
    return np.array([[focal_px, 0, SIZE[1] / 2], [0, focal_px, SIZE[0] / 2], [0, 0, 1]])


def _link(video: Path, place: Path) -> None:
    place.unlink(missing_ok=True)
    try:
        os.link(video, place)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            what = f"must be on the disk of {video}, whose videos are linked and not copied"
            raise ConfigError("--output", str(place.parent), what) from error
        raise
