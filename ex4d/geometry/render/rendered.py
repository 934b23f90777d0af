"""The result type of all renderers, and the constants of their contract."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SUBPIXELS = 256  # vertices are snapped to 1/256 px
NEAR_RATIO = 1e-3  # near plane / least depth of the mesh (the released code: 1e-3 with the least depth at 2.56)


@dataclass(frozen=True)
class Rendered:
    """A rendered mesh.

    Args:
        colour: uint8 [H, W, 3]; zero where visible_mask is False.
        z_depth: float32 [H, W] of the nearest face along the camera's z, occluded or not; +inf where there is none.
        visible_mask: bool [H, W]; True where the nearest face is not occluded and, unless two_sided, shows its front.
        face_id: int32 [H, W] of the nearest face; −1 where there is none.
    """

    colour: np.ndarray
    z_depth: np.ndarray
    visible_mask: np.ndarray
    face_id: np.ndarray
