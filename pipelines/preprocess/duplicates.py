"""Find near duplicates: copies of a video that were re-encoded, scaled, brightened or slightly cropped.

Each frame has a perceptual hash: whether each of the 8 × 8 lowest cosine frequencies of its 32 × 32 luma lies above
their median (as in ImageHash's phash). Two videos are near duplicates if more than half of the `NUM_FRAMES` frames at
equal fractions of their lengths differ in at most `MAX_BITS` of 64 bits. Trimmed copies are not found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_FRAMES = 8
# Cropping 2 % of each side changes up to 12 bits, mostly 4; unrelated videos differ in 18+: docs/decisions/data.md
MAX_BITS = 10
MAJORITY = NUM_FRAMES // 2 + 1
FLAT_LEVELS = 4.0  # standard deviation of luma; below it the bits are noise, and all such frames look alike


def frame_hash(image: np.ndarray) -> int | None:
    """Return the 64-bit perceptual hash of a frame, uint8 [H,W,3] RGB; None for a flat frame."""
    import cv2

    small = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    luma = small.astype(np.float32)
    if luma.std() < FLAT_LEVELS:
        return None
    low = cv2.dct(luma)[:8, :8].ravel()
    return int.from_bytes(np.packbits(low > np.median(low[1:])).tobytes(), "big")


def sampled(hashes: Sequence[int | None], pts: Sequence[int]) -> list[str]:
    """Return the hashes of NUM_FRAMES frames spread over a video's length: 16 hex digits, or "" for a flat frame.

    Args:
        hashes: of every frame.
        pts: of every frame, increasing.
    """
    times = np.asarray(pts)
    wanted = times[0] + (np.arange(NUM_FRAMES) + 0.5) / NUM_FRAMES * (times[-1] - times[0])
    after = (
        np.searchsorted(times, wanted).clip(1, max(1, len(times) - 1))
        if len(times) > 1
        else np.zeros(NUM_FRAMES, np.int64)
    )
    before = np.maximum(after - 1, 0)
    nearest = np.where(times[after] - wanted < wanted - times[before], after, before)
    found = (hashes[int(index)] for index in nearest)
    return ["" if value is None else f"{value:016x}" for value in found]


def are_near(first: Sequence[str], second: Sequence[str]) -> bool:
    """Return whether two videos are near duplicates, slowly: `near.py` finds those among millions.

    Args:
        first, second: `sampled` hashes.
    """
    frames = ((one, other) for one, other in zip(first, second, strict=True) if one and other)
    return sum((int(one, 16) ^ int(other, 16)).bit_count() <= MAX_BITS for one, other in frames) >= MAJORITY
