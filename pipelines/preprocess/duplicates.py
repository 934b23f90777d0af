"""Find near duplicates: copies of a video that were re-encoded, scaled, brightened or slightly cropped.

Each frame has a perceptual hash: whether each of the 8 × 8 lowest cosine frequencies of its 32 × 32 luma lies above
their median (as in ImageHash's phash). Two videos are near duplicates if more than half of the `NUM_FRAMES` frames at
equal fractions of their lengths differ in at most `MAX_BITS` of 64 bits. Trimmed copies are not found.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

NUM_FRAMES = 8
# Cropping 2 % of each side changes up to 12 bits, mostly 4; unrelated videos differ in 18+: docs/decisions/data.md
MAX_BITS = 10
MAJORITY = NUM_FRAMES // 2 + 1
FLAT_LEVELS = 4.0  # standard deviation of luma; below it the bits are noise, and all such frames look alike
UNSEEN = [""] * NUM_FRAMES  # hashes of a video that has no near duplicate
MANY = 50_000  # number of videos from which compiling the comparison pays off
WINDOW = 64  # compare each video with at most this many others that share a key of the index


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


def groups(videos: Mapping[str, Sequence[str]], together: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """Return {sha256: smallest sha256 of its group}, independent of the order of the videos.

    Groups are connected components, so two members of a group may differ more than near duplicates do.

    Args:
        videos: {sha256: `sampled` hashes}.
        together: pairs that always share a group.
    """
    names = sorted(videos)
    place = {name: index for index, name in enumerate(names)}
    known = [(place[first], place[second]) for first, second in together]
    firsts = _components(*_arrays([videos[name] for name in names]), known)
    return {name: names[first] for name, first in zip(names, firsts, strict=True)}


def _components(values: np.ndarray, seen: np.ndarray, together: Sequence[tuple[int, int]] = ()) -> np.ndarray:
    """Return the index of the first video in each video's group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.array([*together, *_pairs(values, seen)], np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), bool), edges.T), shape=(len(values), len(values)))
    _, labels = connected_components(graph, directed=False)
    _, firsts = np.unique(labels, return_index=True)
    return firsts[labels]


class Identity:
    """What is needed to compare all videos: a few numbers of each, in arrays, since there may be millions.

    Videos with a pair also bring the hashes of the other camera's video.
    """

    def __init__(self) -> None:
        self._names, self._pixels, self._duration_s = bytearray(), array("q"), array("d")
        self._values, self._seen = array("Q"), array("B")
        self._others: list[tuple[str, str, list[str]]] = []

    def add(
        self,
        sha256: str,
        hashes: Sequence[str],
        size: Sequence[int],
        duration_s: float,
        other: tuple[str, list[str]] | None = None,
    ) -> None:
        """Add a video. Args: hashes: `sampled`. size: [H, W]. other: sha256 and hashes of the other camera's video."""
        self._names += bytes.fromhex(sha256)
        self._pixels.append(size[0] * size[1])
        self._duration_s.append(duration_s)
        self._values.extend([int(text or "0", 16) for text in hashes])
        self._seen.extend(map(bool, hashes))
        if other is not None:
            self._others.append((sha256, *other))

    def columns(self) -> dict[str, Any]:
        """Return everything as columns of a row, for `extend`."""
        arrays = {
            "sha256s": np.frombuffer(self._names, np.uint8),
            "pixels": np.frombuffer(self._pixels, np.int64),
            "durations_s": np.frombuffer(self._duration_s, np.float64),
            "hashes": np.frombuffer(self._values, np.uint64),
            "are_seen": np.frombuffer(self._seen, np.uint8),
        }
        return {**arrays, "others": self._others}

    def extend(self, row: Mapping[str, Any]) -> None:
        """Add the videos in the columns that another Identity returned."""
        self._names += row["sha256s"].tobytes()
        self._pixels.frombytes(row["pixels"].tobytes())
        self._duration_s.frombytes(row["durations_s"].tobytes())
        self._values.frombytes(row["hashes"].tobytes())
        self._seen.frombytes(row["are_seen"].tobytes())
        self._others += [(sha256, other, hashes) for sha256, other, hashes in row["others"]]

    def decide(self, how: str) -> tuple[dict[str, str], dict[str, str]]:
        """Return ({sha256: its group, which goes to one split}, {sha256: the near duplicate that replaces it}).

        Both omit videos that map to themselves.

        Args:
            how: value of preprocess.near_duplicates.
        """
        names = np.frombuffer(self._names, "S32")  # equal lengths: numpy strips trailing zeros, but keeps the order
        values = np.frombuffer(self._values, np.uint64).reshape(-1, NUM_FRAMES)
        seen = np.frombuffer(self._seen, bool).reshape(-1, NUM_FRAMES)
        order = np.arange(len(names))
        if not (
            names[1:] > names[:-1]
        ).all():  # units arrive in any order; a video with several pairs is added several times
            names, order = np.unique(names, return_index=True)
            values, seen = values[order], seen[order]
        alone = np.arange(len(names))
        firsts = alone if how == "off" else _components(values, seen)
        stand_ins = _others_than_self(names, self._best(firsts, order) if how == "filter" else alone)
        if not self._others:
            return _others_than_self(names, firsts), stand_ins
        # A clip and its source share a group: a source video in training must not be a target in validation.
        looks = {name: _texts(*row) for name, *row in zip(_hex(names), values, seen, strict=True)}
        looks |= {other: hashes for _, other, hashes in self._others}
        looks = dict.fromkeys(looks, UNSEEN) if how == "off" else looks
        return groups(looks, [(sha256, other) for sha256, other, _ in self._others]), stand_ins

    def _best(self, firsts: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return the best video of each group: the largest frame, then the longest duration, then the smallest hash."""
        rank = np.lexsort((-np.frombuffer(self._duration_s)[order], -np.frombuffer(self._pixels, np.int64)[order]))
        _, chosen = np.unique(firsts[rank], return_index=True)
        best = np.zeros(len(firsts), np.int64)
        best[firsts[rank][chosen]] = rank[chosen]
        return best[firsts]


def _others_than_self(names: np.ndarray, chosen: np.ndarray) -> dict[str, str]:
    others = np.flatnonzero(chosen != np.arange(len(names)))
    return dict(zip(_hex(names[others]), _hex(names[chosen[others]]), strict=True))


def _hex(names: np.ndarray) -> list[str]:
    return [name.ljust(32, b"\0").hex() for name in names.tolist()]


def _texts(values: np.ndarray, seen: np.ndarray) -> list[str]:
    return [f"{int(value):016x}" if there else "" for value, there in zip(values, seen, strict=True)]


def _arrays(videos: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (hashes uint64 [N,NUM_FRAMES], is_seen bool [N,NUM_FRAMES], False for flat frames)."""
    values = np.array([[int(text or "0", 16) for text in hashes] for hashes in videos], np.uint64)
    seen = np.array([[bool(text) for text in hashes] for hashes in videos], bool)
    return values.reshape(-1, NUM_FRAMES), seen.reshape(-1, NUM_FRAMES)


def _bits(first: np.ndarray, second: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return np.where(seen, np.bitwise_count(first ^ second), 255)


def _pairs(values: np.ndarray, seen: np.ndarray) -> set[tuple[int, int]]:
    """Find the pairs of near duplicates with an index.

    Two 8-byte hashes that differ in few bits usually have two equal bytes. So each pair of bytes of every second frame
    is a key, and only videos that share a key and are near in its frame are compared. This finds all pairs with up to
    6 differing bits.
    """
    neighbours = _neighbours if len(values) < MANY else _compiled_neighbours()
    found: set[tuple[int, int]] = set()
    for frame in range(0, NUM_FRAMES, 2):
        usable = np.flatnonzero(seen[:, frame])
        parts = values[usable, frame].astype(">u8").view(np.uint8).reshape(-1, 8).astype(np.uint16)
        for one, other in combinations(range(8), 2):
            keys = parts[:, one] << 8 | parts[:, other]
            order = np.argsort(keys, kind="stable")  # 16-bit keys: numpy uses a radix sort
            pairs = neighbours(keys[order], usable[order], values[usable[order], frame], values, seen)
            found.update(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True))
    return found


def _neighbours(
    keys: np.ndarray, index: np.ndarray, own: np.ndarray, values: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the near pairs among videos that share a key and are at most WINDOW apart in key order.

    Args:
        index: of each video, sorted by key. own: uint64 hashes of their frame that the key is of.
    """
    found = [np.zeros((2, 0), np.int64)]
    for step in range(1, min(WINDOW, len(keys) - 1) + 1):
        same = np.flatnonzero(keys[step:] == keys[:-step])
        if not len(same):
            break
        same = same[np.bitwise_count(own[same] ^ own[same + step]) <= MAX_BITS]
        first, second = index[same], index[same + step]
        near = _bits(values[first], values[second], seen[first] & seen[second]) <= MAX_BITS
        hits = near.sum(1) >= MAJORITY
        found.append(np.stack([first[hits], second[hits]]))
    first, second = np.concatenate(found, axis=1)
    return first, second


@cache
def _compiled_neighbours() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return `_neighbours` compiled by Numba: it stops at the fourth frame that is not near, and makes no copies."""
    import numba

    one, two, four, top = (np.uint64(shift) for shift in (1, 2, 4, 56))
    pairs, fours, eights, ones = (np.uint64(int(digits * 8, 16)) for digits in ("55", "33", "0f", "01"))

    @numba.njit(nogil=True)
    def num_bits(bits: Any) -> Any:
        bits -= (bits >> one) & pairs
        bits = (bits & fours) + ((bits >> two) & fours)
        return (((bits + (bits >> four)) & eights) * ones) >> top

    @numba.njit(nogil=True)
    def neighbours(keys: Any, index: Any, own: Any, values: Any, seen: Any) -> Any:
        firsts, seconds = [np.int64(0)], [np.int64(0)]
        for start in range(len(keys)):
            for end in range(start + 1, min(start + WINDOW + 1, len(keys))):
                if keys[end] != keys[start]:
                    break
                if num_bits(own[start] ^ own[end]) > MAX_BITS:
                    continue
                first, second = index[start], index[end]
                far = 0
                for frame in range(NUM_FRAMES):
                    count = num_bits(values[first, frame] ^ values[second, frame])
                    far += (count > MAX_BITS) | (not (seen[first, frame] and seen[second, frame]))
                    if far > NUM_FRAMES - MAJORITY:
                        break
                if far <= NUM_FRAMES - MAJORITY:
                    firsts.append(first)
                    seconds.append(second)
        return np.array(firsts[1:]), np.array(seconds[1:])

    return neighbours
