"""Render a warp with imperfect depth through each visibility mask, for datasets with `cond.mp4`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig

MASKS = 2**8  # more than a sample can have; each mask gets its own errors


def condition(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `cond` uint8 [V·T,H,W,3]: T frames for each of V visibility masks, the clean frames where nothing is
    visible, or T black frames if V is 0. `visible` and `hole_share` exclude what the imperfect warp tore open.
    If the dataset has no such member, `cond` is None and both are unchanged.
    """
    from ex4d.data.members import hole_share
    from ex4d.geometry import imperfect, masks

    visible, frames = row["visible"], row["frames"]
    if "cond" not in config.members:
        return {"cond": None, "visible": visible, "hole_share": row["hole_share"]}
    visible, made = visible.copy(), []
    for index in np.flatnonzero(row["kind"] == masks.KINDS.index("visibility")):
        w2c = np.asarray(row["w2c"][index], np.float64)
        seed = row["seed"] * MASKS + int(index)
        colours, seen = imperfect.condition(frames, row["z_depth"], np.asarray(row["K"]), w2c, seed, valid=row["valid"])
        visible[index] &= seen
        made.append(np.where(seen[..., None], colours, frames))
    cond = np.concatenate(made) if made else np.zeros_like(frames)
    return {"cond": cond, "visible": visible, "hole_share": hole_share(visible)}


STAGE = Stage(
    "condition",
    condition,
    reads=("frames", "z_depth", "valid", "K", "w2c", "kind", "visible", "hole_share", "seed"),
    writes=("cond", "visible", "hole_share"),
)
