"""Write the files of a reconstruction, and those that the released generator reads."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ex4d import isolation, storage, video
from ex4d.errors import BadSample
from ex4d.geometry import mesh
from ex4d.geometry.depth import as_grey
from ex4d.reconstruct import Reconstruction

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

CAMERA_VERSION = 2  # of camera.json; 1 had no version, and source_w2c only if poses were given
RELEASED_FPS = 30  # the released tool always writes 30, whatever the source's rate


def write(view: Reconstruction, folder: str | Path, mesh_format: str | None = None) -> list[Path]:
    """Write cond.mp4, mask.npz (`visible` bool [T, H, W]), mask.mp4, camera.json, preview.png; return the paths.

    camera.json: `axes` "opencv", `size` [H, W], `K` [3, 3] px or, for a zoom, [T, 3, 3], `w2c` [T, 4, 4] of the new
    cameras, `source_w2c` [T, 4, 4], null if the source is assumed not to move, and
    `source_motion`. With the released profile also the three files of `released`.

    Args:
        mesh_format: "ply" or "glb": also write mesh/000000.ply …, one per frame, in that frame's own source camera.
    """
    folder = Path(folder)
    mask, preview = io.BytesIO(), io.BytesIO()
    np.savez_compressed(mask, visible=view.visible)
    contact_sheet(view).save(preview, format="PNG")
    contents = {
        "cond.mp4": sounding(view, view.cond_video),
        "mask.npz": mask.getvalue(),
        "mask.mp4": video.encode(white(view.visible), view.fps, crf=0),  # x264 is lossless there
        "camera.json": (json.dumps(cameras(view), indent=1) + "\n").encode(),
        "preview.png": preview.getvalue(),
    }
    if view.profile == "released":
        contents |= released(view)
    for name, data in contents.items():
        storage.write_bytes(folder / name, data)
    paths = [folder / name for name in contents]
    if mesh_format:
        (folder / "mesh").mkdir(exist_ok=True)
        for index, (frame, z_depth) in enumerate(zip(view.frames, view.z_depth, strict=True)):
            paths.append(folder / "mesh" / f"{index:06d}.{mesh_format}")
            valid = None if view.valid_mask is None else view.valid_mask[index]
            mesh.export(mesh.build(frame, z_depth, view.K, view.profile, valid=valid), paths[-1])
    return paths


def sounding(view: Reconstruction, frames: np.ndarray) -> bytes:
    """Encode frames to an mp4 and copy the sound of the view's source; if that fails, log why and omit the sound."""
    data = video.encode(frames, view.fps)
    if not view.video_path or Path(view.video_path).is_dir():  # a folder of pictures has no sound
        return data
    try:
        result = isolation.run("with_audio", (isolation.File(view.video_path), data))
    except BadSample as error:
        log.warning("the result has no audio: %s", error.message)
        return data
    return result or data


def white(visible: np.ndarray) -> np.ndarray:
    """Convert visible bool [T, H, W] to pictures uint8 [T, H, W, 3]: 255 where True."""
    return np.repeat(visible[..., None].astype(np.uint8) * 255, 3, axis=-1)


def cameras(view: Reconstruction) -> dict:
    """Return the contents of camera.json."""
    return {
        "version": CAMERA_VERSION,
        "axes": "opencv",
        "size": list(view.visible.shape[1:]),
        "K": view.view_K.tolist(),
        "w2c": view.w2c.tolist(),
        "source_w2c": None if view.source_w2c is None else view.source_w2c.tolist(),
        "source_motion": view.choices["source_motion"],
    }


def released(view: Reconstruction) -> dict[str, bytes]:
    """Return color_NAME.mp4, mask_NAME.mp4 and camera_NAME.npz in the released tool's format.

    NAME is its name of the path: 180 for the slide, the angle for an orbit, 180_outer for the full sweep; else ours.
    30 frames per second; the mask is 255 where seen; poses are OpenGL world-to-camera, with the source's K [3, 3].
    """
    path, angle_deg = view.choices["trajectory"], view.choices["angle_deg"]
    known = {"released-180": "180", "orbit": f"{angle_deg:g}", "full": "180_outer"}
    name = known.get(path, Path(path).stem)
    poses = io.BytesIO()
    opengl = np.diag([1.0, -1.0, -1.0, 1.0]) @ view.w2c
    np.savez_compressed(poses, extrinsics=opengl.astype(np.float32), intrinsics=view.K.astype(np.float32))
    return {
        f"color_{name}.mp4": video.encode(view.cond_video, RELEASED_FPS),
        f"mask_{name}.mp4": video.encode(white(view.visible), RELEASED_FPS, crf=0),
        f"camera_{name}.npz": poses.getvalue(),
    }


def contact_sheet(view: Reconstruction, num_columns: int = 7, width_px: int = 192) -> Image:
    """Draw a contact sheet: source, disparity and condition (rows) at evenly spaced frames (columns)."""
    from PIL import Image as pillow

    chosen = np.unique(np.linspace(0, len(view.frames) - 1, num_columns).round().astype(int))
    grey = np.repeat(as_grey(view.z_depth)[..., None], 3, axis=-1)
    rows = (view.frames, grey, view.cond_video)
    sheet = pillow.fromarray(np.concatenate([np.concatenate(list(row[chosen]), axis=1) for row in rows], axis=0))
    scale = width_px / view.frames.shape[2]
    return sheet.resize((round(sheet.width * scale), round(sheet.height * scale)))
