"""Find near duplicates: copies of a video that were re-encoded, scaled, brightened or slightly cropped.

Each frame has a perceptual hash: the signs, about their median, of the 8 × 8 lowest cosine frequencies of its 32 × 32
luma (as ImageHash's phash). Two videos are near duplicates where most of `NUM_FRAMES` frames at the same shares of
their lengths differ in at most `MAX_BITS` of 64 bits. A copy that was trimmed at an end is not found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

NUM_FRAMES = 8
# A crop of 2 % of each side costs up to 12, mostly 4; unrelated videos are 18 or more apart: docs/decisions/data.md.
MAX_BITS = 10
MAJORITY = NUM_FRAMES // 2 + 1
FLAT_LEVELS = 4.0  # standard deviation of luma; below it the signs are noise, and all such frames look alike
UNSEEN = [""] * NUM_FRAMES  # hashes of a video that has no near duplicate
WINDOW = 64  # compare each video with at most so many of those that share a key of the index


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
    """Return the hashes, 16 hex digits or "" for a flat frame, of NUM_FRAMES frames spread over a video's length.

    Args:
        hashes: of every frame.
        pts: of every frame, rising.
    """
    times = np.asarray(pts)
    wanted = times[0] + (np.arange(NUM_FRAMES) + 0.5) / NUM_FRAMES * (times[-1] - times[0])
    after = np.searchsorted(times, wanted).clip(1, max(1, len(times) - 1)) if len(times) > 1 else np.zeros(8, np.int64)
    before = np.maximum(after - 1, 0)
    nearest = np.where(times[after] - wanted < wanted - times[before], after, before)
    found = (hashes[int(index)] for index in nearest)
    return ["" if value is None else f"{value:016x}" for value in found]


def groups(videos: Mapping[str, Sequence[str]], together: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """Return {sha256: the smallest sha256 of its group}, whatever the order of the videos.

    Groups are connected components, so two members may differ more than neighbours do.

    Args:
        videos: {sha256: `sampled` hashes}.
        together: pairs that are in one group whatever they show.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names = sorted(videos)
    place = {name: index for index, name in enumerate(names)}
    values, seen = _arrays([videos[name] for name in names])
    known = [(place[first], place[second]) for first, second in together]
    edges = np.array([*known, *_pairs(values, seen)], np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), bool), edges.T), shape=(len(names), len(names)))
    _, labels = connected_components(graph, directed=False)
    _, firsts = np.unique(labels, return_index=True)  # names are sorted, so the first of a group is its smallest
    return {name: names[firsts[label]] for name, label in zip(names, labels, strict=True)}


def of_videos(rows: Sequence[Mapping[str, Any]], how: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return ({sha256: its group, which goes to one split}, {sha256: the sha256 that is taken in its place}).

    Args:
        rows: of videos, with their records; rejected ones are in no group.
        how: preprocess.near_duplicates.
    """
    kept = [row for row in rows if row["record"]["refusal"] is None]
    good = {row["sha256"]: row["record"] for row in kept}
    looks = {} if how == "off" else {sha256: record["hashes"] for sha256, record in good.items()}
    near = groups(looks)
    taken = best(near, good) if how == "filter" else {}
    paired = [row for row in kept if row["pair"]]
    if not paired:
        return near, taken
    # A clip and its source belong to one group: what is a source in training must not be a target in validation.
    others = {row["other_sha256"]: row["record"]["other"]["hashes"] for row in paired}
    everything = {sha256: looks.get(sha256, UNSEEN) for sha256 in good}
    everything |= others if looks else dict.fromkeys(others, UNSEEN)
    return groups(everything, [(row["sha256"], row["other_sha256"]) for row in paired]), taken


def best(groups: Mapping[str, str], records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return {sha256: sha256 of the best of its group}: the largest frame, then the longest, then the smallest hash.

    Args:
        groups: of `groups`.
        records: {sha256: video record}.
    """

    def rank(sha256: str) -> tuple[float, float, str]:
        info = records[sha256]["info"]
        return -info["size"][0] * info["size"][1], -info["duration_s"], sha256

    chosen: dict[str, str] = {}
    for sha256 in sorted(groups, key=rank):
        chosen.setdefault(groups[sha256], sha256)
    return {sha256: chosen[group] for sha256, group in groups.items()}


def distance(first: Sequence[str], second: Sequence[str]) -> int | None:
    """Return in how many bits most frames of two videos differ at most; None where too many frames are flat."""
    values, seen = _arrays([first, second])
    bits = _bits(values[:1], values[1:], seen[:1] & seen[1:])[0]
    found = int(np.sort(bits)[MAJORITY - 1])
    return None if found > 64 else found


def _arrays(videos: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (uint64 [N,NUM_FRAMES], bool [N,NUM_FRAMES], False for flat frames)."""
    values = np.array([[int(text or "0", 16) for text in hashes] for hashes in videos], np.uint64)
    seen = np.array([[bool(text) for text in hashes] for hashes in videos], bool)
    return values.reshape(-1, NUM_FRAMES), seen.reshape(-1, NUM_FRAMES)


def _bits(first: np.ndarray, second: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, np.bitwise_count(first ^ second), 255)


def _pairs(values: np.ndarray, seen: np.ndarray) -> set[tuple[int, int]]:
    """Return the pairs of near duplicates, found by an index.

    Two hashes of eight bytes that differ in few bits mostly have two equal bytes: so each pair of bytes of every second
    frame is a key, and only videos that share a key are compared. This finds all pairs with up to 6 different bits.
    """
    found: set[tuple[int, int]] = set()
    for frame in range(0, NUM_FRAMES, 2):
        usable = np.flatnonzero(seen[:, frame])
        parts = values[usable, frame].astype(">u8").view(np.uint8).reshape(-1, 8).astype(np.uint32)
        for one, other in combinations(range(8), 2):
            keys = parts[:, one] << 8 | parts[:, other]
            order = np.argsort(keys, kind="stable")
            found |= _neighbours(keys[order], usable[order], values, seen)
    return found


def _neighbours(keys: np.ndarray, index: np.ndarray, values: np.ndarray, seen: np.ndarray) -> set[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for step in range(1, min(WINDOW, len(keys) - 1) + 1):
        same = np.flatnonzero(keys[step:] == keys[:-step])
        if not len(same):
            break
        first, second = index[same], index[same + step]
        near = _bits(values[first], values[second], seen[first] & seen[second]) <= MAX_BITS
        hits = near.sum(1) >= MAJORITY
        found.update(zip(first[hits].tolist(), second[hits].tolist(), strict=True))
    return found
