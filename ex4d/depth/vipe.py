"""The folder that ViPE writes: `depth/NAME.zip` of OpenEXR, `pose/NAME.npz`, `intrinsics/NAME.npz`, for NAME.mp4.

| file | holds |
|---|---|
| `depth/NAME.zip` | a picture for each frame, `00000.exr` and on, channel Z in half floats: z-depth, metres |
| `pose/NAME.npz` | `data` [N, 4, 4] camera to world, OpenCV axes, and `inds` [N], the frames |
| `intrinsics/NAME.npz` | `data` [N, 4], fx fy cx cy in px, and `inds` |
| `intrinsics/NAME_camera.txt` | a line `FRAME: TYPE` for each frame; PINHOLE is read |

Source: `vipe/utils/io.py` of github.com/nv-tlabs/vipe. Depth is read in the sandboxed child (`depth.arrays`), the small
files in this process, like files of poses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ex4d.depth import layouts
from ex4d.errors import BadSample, ConfigError, ContractError
from ex4d.geometry import trajectory_files
from ex4d.geometry.camera import check_lens, invert
from ex4d.geometry.pose_arrays import arrays_of
from ex4d.geometry.pose_file import bytes_of


def parts_of(depth: str | Path) -> list[Path]:
    """Return the files that belong to a `depth/NAME.zip` and exist: poses, intrinsics, lens types."""
    root, name = Path(depth).parent.parent, Path(depth).stem
    names = (f"pose/{name}.npz", f"intrinsics/{name}.npz", f"intrinsics/{name}_camera.txt")
    return [root / one for one in names if (root / one).is_file()]


def cameras(depth: str, index: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Read (K [3, 3] px, w2c [T, 4, 4] of the frames `index`, the first the identity), None where ViPE has none.

    Args:
        size: (H, W) of the depth maps.

    Raises:
        BadSample: depth_shape: a lens that is not a pinhole, or a damaged file; cameras_missing: too few poses.
    """
    K, w2c = None, None
    for path in parts_of(depth):
        try:
            if path.suffix == ".txt":
                _check_pinhole(path)
            elif path.parent.name == "pose":
                w2c = trajectory_files.read(path, "vipe").w2c
            else:
                K = _lens(path, size)
        except (ValueError, ContractError, ConfigError, OSError) as error:
            raise BadSample("depth_shape", f"{path.parent.name}/{path.name}: {error}"[:300]) from None
    if w2c is None:
        return K, None
    if index.max(initial=0) >= len(w2c):
        raise BadSample("cameras_missing", f"ViPE has {len(w2c)} poses, but the clip needs frame {index.max()}")
    return K, w2c[index] @ invert(w2c[index[0]])


def _check_pinhole(path: Path) -> None:
    for line in bytes_of(path).decode("utf-8", "replace").splitlines():
        kind = line.partition(":")[2].strip()
        if line.strip() and kind != "PINHOLE":
            raise ValueError(f"a lens is {kind[:40] or line[:40]}; PINHOLE is read")


def _lens(path: Path, size: tuple[int, int]) -> np.ndarray:
    arrays = arrays_of(path)
    rows = np.asarray(arrays.get("data", np.empty(0)), np.float64)
    if rows.ndim != 2 or rows.shape[1:] != (4,) or not len(rows):
        raise ValueError(f"data is {list(rows.shape)}, not [N, 4] of fx fy cx cy")
    K = np.tile(np.eye(3), (len(rows), 1, 1))
    K[:, 0, 0], K[:, 1, 1], K[:, 0, 2], K[:, 1, 2] = rows.T
    return check_lens(layouts.one_lens(K), size)
