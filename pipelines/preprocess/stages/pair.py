"""Clips from two cameras: the other video is the model's input, its warp to the clip's camera is the condition.

The other video goes through the same stages as the clip's video, with other column names (`OTHER`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d import storage
from ex4d.errors import BadSample, ConfigError, ContractError
from pipelines.preprocess import file_cache, pairs
from pipelines.preprocess.stages import isolated
from pipelines.preprocess.stages.shots import unpack_pts
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.clips import Clip
    from pipelines.preprocess.settings import PreprocessConfig

# Column names in the stages for one video, and the corresponding names for the other video.
OTHER = {
    name: f"other_{name}"
    for name in ("frames", "path", "sha256", "size_bytes", "pts", "box", "info", "pts_runs", "cuts", "shots", "hashes")
}
MAX_CAMERA_BYTES = 8 << 20  # our own files have 400 bytes per pose, so this is eleven minutes
SAME_TIME = 0.5  # maximum time difference between the two videos, in frames
FAR = 100.0  # maximum distance of the cameras / farthest depth; more means different units


def need(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Raise BadSample pair_missing if a file of `pairs.files_of` does not exist."""
    if not row["pair"]:
        names = ", ".join(path.rpartition("/")[2] for path in pairs.files_of(row["path"]))
        raise BadSample("pair_missing", f"needs {names}")
    return {}


def check(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `other`, what a record keeps of the other video: `pts_runs`, `cuts`, `hashes`, and `boxes` of its shots.

    Raises:
        BadSample: pair_size (frame sizes differ), pair_frames (frame counts or times differ), pair_cameras (not every
            frame has a pose), source_changed.
    """
    own_info, info = row["info"], row["other_info"]
    if [*info["size"]] != [*own_info["size"]]:
        raise BadSample("pair_size", f"the other camera's pictures are {[*info['size']]}, ours {[*own_info['size']]}")
    own, other = (np.array(unpack_pts(runs), np.int64) for runs in (row["pts_runs"], row["other_pts_runs"]))
    if len(own) != len(other):
        raise BadSample("pair_frames", f"the other camera has {len(other)} frames, the video {len(own)}")
    own_s, other_s = (
        (pts - pts[0]) * (of["time_base"][0] / of["time_base"][1]) for pts, of in ((own, own_info), (other, info))
    )
    frame_s = float(np.median(np.diff(other_s))) if len(other) > 1 else 1.0
    apart = float(np.abs(own_s - other_s).max()) / frame_s
    if not apart <= SAME_TIME:
        raise BadSample("pair_frames", f"the two cameras are up to {apart:.1f} frames apart")
    for which in (0, 1):
        _poses(row, config, which, np.arange(len(own)))
    shots = row["other_shots"]
    kept = {name: row[f"other_{name}"] for name in ("pts_runs", "cuts", "hashes")}
    return {"other": {**kept, "boxes": [shot["box"] for shot in shots]}}


def columns(record: Mapping[str, Any], clip: Clip, crop_bars: bool) -> dict[str, Any]:
    """Return `other_pts` and `other_box`: pts of the clip's frames in the other video, and their region [y, x, height,
    width] px there; and `other_cut`: True if the other video has a cut within the clip.

    Args:
        record: the video's record; its `other` is that of `check`.
        crop_bars: PreprocessConfig.crop_bars.
    """
    other, first, last = record["other"], clip.frame_index[0], clip.frame_index[-1]
    pts = unpack_pts(other["pts_runs"])
    shot, of_last = (int(np.searchsorted(other["cuts"], index, side="right")) for index in (first, last))
    return {
        "other_pts": [pts[index] for index in clip.frame_index],
        "other_box": other["boxes"][shot] if crop_bars else [0, 0, *record["info"]["size"]],
        "other_cut": shot != of_last,
    }


def cameras(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `camera` and `other_camera` at the clip's frames: `w2c` float [T][4][4] in one world, `K` float [3][3] in
    px of the clip's frames, None if the file has none.

    Raises:
        BadSample: pair_frames (the other video has a cut within the clip), pair_cameras, source_changed.
    """
    if row["other_cut"]:
        raise BadSample("pair_frames", "the other camera's video is cut within the clip")
    index = np.asarray(row["frame_index"])
    found = []
    for which, box in ((0, row["box"]), (1, row["other_box"])):
        w2c, K, stored, name = _poses(row, config, which, index)
        found.append({"w2c": w2c.tolist(), "K": _clip_K(K, stored or row["size"], box, name, row["size"], config)})
    if found[0]["K"] is None and row["box"] != row["other_box"]:  # the depth's K is that of the other camera
        raise BadSample("pair_cameras", "the videos have different black bars: the clip's camera must say its K")
    return {"camera": found[0], "other_camera": found[1]}


def _poses(
    row: Row, config: PreprocessConfig, which: int, index: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, Sequence[int] | None, str]:
    """Return (w2c [T,4,4], K [T,3,3] or None, image size that K refers to or None, file name) at some frames.

    Args:
        which: 0: the clip's camera, 1: the other one.
    """
    path = pairs.files_of(row["path"])[1 + which]
    name = path.rpartition("/")[2]
    try:
        data = storage.read_bytes(path, 0, MAX_CAMERA_BYTES + 1)
    except OSError as error:
        raise file_cache.unreadable(error) from error
    if len(data) > MAX_CAMERA_BYTES:
        raise BadSample("pair_cameras", f"{name} has more than {MAX_CAMERA_BYTES} bytes")
    if hashlib.sha256(data).hexdigest() != row["pair"]["sha256"][1 + which]:
        raise BadSample("source_changed", f"{name} has changed since it was hashed")
    w2c, K, size = isolated.call(config, "poses_of", data, index, name)
    return w2c, K, size, name


def poses_of(data: bytes, index: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int] | None]:
    """Return (w2c float64 [T,4,4], K float64 [T,3,3] or None, its image size or None) of the poses `index` of a file.

    Raises:
        BadSample: pair_cameras.
    """
    from ex4d.geometry import trajectory_files
    from ex4d.geometry.camera import nearest_rigid

    try:
        poses = trajectory_files.parse(data)
    except ContractError as error:
        raise BadSample("pair_cameras", f"{name}: {error}"[:300]) from None
    if len(poses.w2c) <= index[-1]:
        raise BadSample("pair_cameras", f"{name} has {len(poses.w2c)} poses, frame {index[-1]} needs one, too")
    return nearest_rigid(poses.w2c[index]), None if poses.K is None else poses.K[index], poses.size


def _clip_K(
    K: np.ndarray | None, stored: Sequence[int], box: Sequence[int], name: str, size: Sequence[int], config: Any
) -> list[list[float]] | None:
    """Return K [3][3] in px of the clip's frames, or None.

    Args:
        K: [T,3,3] in px of images of the size `stored`.
        box, size: region of the video's frames that the clip shows, and the size of these frames.
    """
    from ex4d.geometry.camera import Camera
    from ex4d.video import Fit

    if K is None:
        return None
    if (K[0] != K).any():
        raise BadSample("pair_cameras", f"{name}: the focal length changes within the clip")
    height, width = size
    y, x, box_height, box_width = box
    fit = Fit((height, width), config.size, config.fit, (y, x, box_height, box_width))
    try:
        made = Camera(fit.apply_K(np.diag([width / stored[1], height / stored[0], 1.0]) @ K[0]), np.eye(4), config.size)
    except ConfigError as error:  # here K is data, not a setting
        raise BadSample("pair_cameras", f"{name}: K is not an intrinsics matrix: {error.allowed}") from None
    return made.K.tolist()


def _other_camera(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return K [3,3] of the clip, K of the other camera, the latter's w2c [T,4,4] relative to the clip's camera, and
    its z_depth [T,H,W].

    Raises BadSample (pair_cameras): cameras and depth have no common unit.
    """
    from ex4d.geometry.camera import relative_to

    if not row["absolute"]:
        raise BadSample("pair_cameras", "the other camera's depth is relative; z_depth has the unit of cameras")
    K, other_K = (
        row["K"] if row[name]["K"] is None else np.array(row[name]["K"]) for name in ("camera", "other_camera")
    )
    w2c, other_w2c = (np.array(row[name]["w2c"]) for name in ("camera", "other_camera"))
    z_depth = row["z_depth"]
    if row["depth_facts"]["estimator"] == "depth-pro":  # its metric scale depends on its estimated focal length
        z_depth = z_depth * np.float32(other_K[0, 0] / row["K"][0, 0])
    with np.errstate(over="ignore", invalid="ignore"):  # a non-finite distance fails the check below
        theirs = relative_to(other_w2c, w2c)
        apart = float(np.abs(theirs[:, :3, 3]).max())
    if not apart <= FAR * float(z_depth.max()):
        raise BadSample("pair_cameras", f"the cameras are {apart:.3g} apart, the depth ends at {z_depth.max():.3g}")
    return K, other_K, theirs, z_depth


def warp(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return the condition: the other camera's mesh seen from the clip's camera, eroded as simulated masks are.

    `cond` uint8 [T,H,W,3], the clip's own colours where nothing is visible; `visible` bool [1,T,H,W], `kind` uint8 [1]
    and `hole_share` float32 [1,T]: one visibility mask; `w2c` [1][T][4][4] of the other camera relative to the clip's
    camera; `K` of the clip; `warp_error`, mean difference of visible colours from the clip's, in [0, 1]; `pair_facts`
    for the provenance. Frame 0 is the clip's, fully visible, as in every sample.

    Raises:
        BadSample: pair_cameras: cameras and depth have no common unit, or the warp shows nothing; and the errors of
            `warp_video`.
    """
    from ex4d.data.members import hole_share
    from ex4d.geometry import masks
    from ex4d.geometry.render import warp_video

    K, other_K, theirs, z_depth = _other_camera(row)
    world = np.broadcast_to(np.eye(4), theirs.shape)  # the clip's camera at each frame
    seen_from = (config.profile, "cpu", theirs, K)
    colours, visible = warp_video(row["other_frames"], z_depth, other_K, world, *seen_from, row["valid"])
    least, most = config.masks.erosion_px
    visible = masks.erode(visible, int(np.random.default_rng(row["seed"]).integers(least, most + 1)))
    if not visible[1:].any():
        raise BadSample("pair_cameras", "the clip's camera sees nothing of what the other one filmed")
    differs = np.abs(colours[1:].astype(np.int16) - row["frames"][1:])[visible[1:]]
    visible[0] = True
    cond = np.where(visible[..., None], colours, row["frames"])
    cond[0] = row["frames"][0]
    source, *of_cameras = row["pair"]["sha256"]
    return {
        "cond": cond,
        "visible": visible[None],
        "kind": np.array([masks.KINDS.index("visibility")], np.uint8),
        "hole_share": hole_share(visible[None]),
        "w2c": [theirs.tolist()],
        "K": K,
        "generation_holes": None,
        "warp_error": float(differs.mean(dtype=np.float64)) / 255,
        "pair_facts": {"source_sha256": source, "cameras_sha256": of_cameras, "source_K": other_K.tolist()},
    }


NEED = Stage("find_pair", need, reads=("path", "pair"), writes=())
CHECK = Stage(
    "check_pair",
    check,
    reads=(
        *("path", "pair", "info", "pts_runs"),
        *(OTHER[name] for name in ("info", "pts_runs", "cuts", "shots", "hashes")),
    ),
    writes=("other",),
)
CAMERAS = Stage(
    "pair_cameras",
    cameras,
    reads=("path", "pair", "frame_index", "size", "box", "other_box", "other_cut"),
    writes=("camera", "other_camera"),
)
WARP = Stage(
    "warp_pair",
    warp,
    reads=(
        *("frames", "other_frames", "z_depth", "valid", "K", "absolute", "depth_facts"),
        *("camera", "other_camera", "pair", "seed"),
    ),
    writes=("cond", "visible", "kind", "hole_share", "w2c", "K", "generation_holes", "warp_error", "pair_facts"),
)
