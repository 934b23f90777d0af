"""Read depth from a file beside the video: the estimate of another program, or the truth of a synthetic scene.

`places` finds the file; `layouts` lists the npz layouts that are read, with intrinsics and the source's cameras if they
hold them. Files are opened only by the sandboxed child (`arrays`, `pictures`, `videos`). Values are [N, H, W], one map
for each frame of the whole source; if the npz has its own rate as `fps`, the map nearest in time is used.

A string `kind` ("z_depth" or "disparity") in the npz overrides the key: Video Depth Anything's relative models write
disparity as `depths`, too, so add `kind` there. An npy holds z-depth. Integers of 16 bits or more are millimetres, as
depth cameras write them, and as in a folder of 16-bit PNG, one per frame. A folder of OpenEXR holds floats, as does the
zip of ViPE (`vipe`). z_depth of 0, NaN or inf, and disparity of NaN or inf, is a hole: the sensor has no value there
(`holes`). Pickles are rejected.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ex4d import isolation, storage
from ex4d.depth import DepthRequest, Geometry, holes, layouts, pictures, places, videos, vipe
from ex4d.depth.arrays import MAX_BYTES, Wanted
from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.camera import check_lens
from ex4d.geometry.pose_file import check_poses

LIMITS = isolation.Limits(wall_s=600, cpu_s=300)  # an hour of compressed maps must be unpacked up to the clip
MAX_Z = 1e7  # ten thousand kilometres, or ten kilometres in millimetres
ASPECT_TOLERANCE = 0.02  # networks round sides to multiples of 14 or 64


def estimate(frames: np.ndarray, request: DepthRequest) -> Geometry:
    """Return the stored depth of the clip's frames, cropped and scaled as the frames were.

    Raises:
        BadSample: depth_missing (no file, or no known key), sidecar_ambiguous, depth_pickle (objects inside),
            depth_shape (not [N, H, W], another aspect), depth_frames (not one map a frame), depth_unit (values or a K
            of an implausible unit), depth_holes (a frame has no value at all).
    """
    path = places.find(request)
    index = np.arange(len(frames)) if request.frame_index is None else np.asarray(request.frame_index)
    wanted = Wanted(np.asarray(index, np.int64), request.source_frames, request.source_s, request.frame_s)
    if os.path.isdir(path):
        values, kind = pictures.read(path, index, request.source_frames)
        K, key, w2c = None, "png" if values.dtype == np.uint16 else "exr", None
    elif path.lower().endswith(places.VIDEOS):
        values = videos.read(path, wanted.of)
        kind, K, key, w2c = "disparity", None, "video", None
    else:
        values, kind, K, key, w2c = read(path, wanted)
        if path.lower().endswith(places.VIPE):
            K, w2c = vipe.cameras(path, wanted.index, (values.shape[1], values.shape[2]))
    values = _in_one_unit(values, kind, _name(path))
    values, K = _fitted(values, K, frames.shape[1:3], request, _name(path))
    measured = holes.valid_mask(values, kind)
    values, valid = holes.close(values, kind, measured, request.fill_px)
    facts: dict[str, Any] = {"estimator": "sidecar", "file": _name(path), "key": key, "sha256": places.sha256(path)}
    facts["measured_share"] = float(measured.mean(dtype=np.float64))
    cameras = w2c if kind == "z_depth" else None
    return Geometry(values, kind, K, False, facts, cameras, valid_mask=None if valid.all() else valid)


def read(path: str, wanted: Wanted) -> tuple[np.ndarray, str, np.ndarray | None, str, np.ndarray | None]:
    """Read the requested maps of a file in the isolated child.

    Returns: (values [T, H, W] of a float or integer type, kind, K [3, 3] or None, key, w2c [T, 4, 4] or None).
    """
    name = _name(path)
    with _on_disk(path) as file:
        maps = isolation.run("depth_maps", (isolation.File(str(file)), name, wanted), LIMITS)
    try:  # the child may have been taken over
        values, kind, key = np.asarray(maps["values"]), str(maps["kind"]), str(maps["key"])
        K, w2c = (None if maps[known] is None else np.asarray(maps[known], np.float64) for known in ("K", "w2c"))
        if w2c is not None:
            check_poses(w2c)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise BadSample("depth_shape", f"{name}: {error}"[:300]) from None
    if values.ndim == 4 and 1 in (values.shape[1], values.shape[3]):
        values = values[:, 0] if values.shape[1] == 1 else values[..., 0]
    if values.ndim != 3 or values.dtype.kind not in "fiu" or 0 in values.shape or len(values) != len(wanted.index):
        raise BadSample("depth_shape", f"{name}: {key} is {values.dtype} {list(values.shape)}, not [N, H, W]")
    if kind not in ("z_depth", "disparity"):
        raise BadSample("depth_shape", f"{name}: kind {kind!r}, not z_depth or disparity")
    if w2c is not None and len(w2c) != len(values):
        raise BadSample("depth_shape", f"{name}: {len(w2c)} cameras for {len(values)} maps")
    return values, kind, None if K is None else _lens(K, (values.shape[1], values.shape[2]), name), key, w2c


@contextmanager
def _on_disk(path: str) -> Iterator[Path]:
    """Yield a local file, or a copy of a remote one. Raises BadSample: unreadable."""
    if storage.is_local(path):
        yield storage.local_path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "depth"
        try:
            storage.sha256(path, copy, MAX_BYTES)
        except OSError as error:
            raise BadSample("unreadable", f"{_name(path)}: {error.strerror or type(error).__name__}") from error
        yield copy


def _lens(K: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Return K [3, 3] from one K, or one per frame. Raises BadSample unless it is plausible in px of the maps."""
    try:
        K = layouts.one_lens(K)
    except ValueError as error:
        raise BadSample("depth_shape", f"{name}: {error}") from None
    try:
        return check_lens(K, size)
    except ConfigError as error:  # K comes from data, not from a setting
        message = f"{name}: K is not an intrinsics matrix in px of its maps of {size[1]} × {size[0]}: {error.allowed}"
        raise BadSample("depth_shape", message) from error


def _in_one_unit(values: np.ndarray, kind: str, name: str) -> np.ndarray:
    """Convert values to float32; integers of z-depth are millimetres and become metres."""
    if kind == "z_depth" and values.dtype.kind in "iu":
        if values.dtype.itemsize == 1:
            raise BadSample("depth_unit", f"{name}: 8 bits cannot hold z_depth; if near is bright, name it disparity")
        return values.astype(np.float32) / 1000
    known = values[np.isfinite(values)]
    middle = float(np.median(known)) if known.size else 1.0
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if kind == "z_depth" and middle > MAX_Z:
        raise BadSample("depth_unit", f"{name}: a middle z_depth of {middle:.3g} fits no known unit")
    return values


def _fitted(
    values: np.ndarray, K: np.ndarray | None, size: tuple[int, ...], request: DepthRequest, name: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Crop and scale values and K as the frames were. Maps may have another resolution than the video, not aspect."""
    from ex4d.video import Fit

    stored = (int(values.shape[1]), int(values.shape[2]))
    height, width = size
    fit = request.fit or Fit((height, width), (height, width), "squeeze")
    if tuple(fit.size) != (height, width):
        raise BadSample("depth_shape", f"the frames are {(height, width)}, the fit makes {tuple(fit.size)}")
    aspect = (stored[0] / stored[1]) / (fit.source_size[0] / fit.source_size[1])
    if abs(aspect - 1) > ASPECT_TOLERANCE:
        raise BadSample(
            "depth_shape", f"{name} is {stored}, the video {tuple(fit.source_size)}: their aspect ratios differ"
        )
    depth = np.ascontiguousarray(fit.scaled_to(stored).apply_depth(values))
    if K is None:
        return depth, None
    # By way of the video's own pixels: the crop of the frames need not be whole pixels of a smaller map.
    to_video = np.diag([fit.source_size[1] / stored[1], fit.source_size[0] / stored[0], 1.0])
    return depth, fit.apply_K(to_video @ K)


def _name(path: str) -> str:
    return PurePosixPath(path).name
