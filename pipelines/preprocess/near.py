"""Compiled search for near duplicates among many videos, which needs some 40 bytes for each beside its hashes.

Two 8-byte hashes that differ in few bits usually have two equal bytes. So each pair of bytes of every second frame is a
key, and only videos that share a key are compared, at most WINDOW apart. This finds all pairs with up to 6 differing
bits in each frame. `duplicates.are_near` is the same comparison of two videos, plainly written.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from ex4d.compiled import kernel
from pipelines.preprocess.duplicates import MAJORITY, MAX_BITS, NUM_FRAMES

WINDOW = 64  # compare each video with at most this many others that share a key
POSITION_BITS, POSITION, BYTE = np.uint64(32), np.uint64(2**32 - 1), np.uint64(255)
ONE, TWO, FOUR, EIGHT, TOP = (np.uint64(shift) for shift in (1, 2, 4, 8, 56))
PAIRS, FOURS, EIGHTS, ONES = (np.uint64(int(digits * 8, 16)) for digits in ("55", "33", "0f", "01"))


def groups(values: np.ndarray, seen: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return for each video of `order` the position in `order` of the first one of its group, int32.

    Groups are connected components, so two members of a group may differ more than near duplicates do.

    Args:
        values: uint64 [N,NUM_FRAMES], `duplicates.sampled` hashes.
        seen: uint8 [N], bit F is set unless frame F is flat.
        order: int [M], indices of the videos to compare.
    """
    firsts = np.arange(len(order), dtype=np.int32)
    for frame in range(0, NUM_FRAMES, 2):
        usable = np.flatnonzero(seen[order] >> frame & 1).astype(np.int32)
        hashes = values[order[usable], frame]
        keys, own = np.empty_like(hashes), np.empty_like(hashes)  # used again and again: millions of videos take room
        for one, other in combinations(range(8), 2):
            _make_keys(keys, hashes, np.uint64(8 * one), np.uint64(8 * other))
            keys.sort()
            _join_near(firsts, keys, own, usable, hashes, values, seen, order, MAX_BITS, NUM_FRAMES - MAJORITY)
    return settled(firsts)


def joined(firsts: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the `groups` after joining those of each pair. Args: pairs: int [P,2], positions."""
    firsts = firsts.copy()
    _join_all(firsts, pairs)
    return settled(firsts)


def settled(firsts: np.ndarray) -> np.ndarray:
    """Return the first position of each group, where `firsts` leads to it in one or several steps."""
    while not np.array_equal(further := firsts[firsts], firsts):
        firsts = further
    return firsts


@kernel
def _make_keys(keys, hashes, one, other):
    """Fill uint64 `keys`: two bytes of each hash, which begin at the bits `one` and `other`, and below it its index."""
    for index in range(len(hashes)):
        pair = (hashes[index] >> one & BYTE) << EIGHT | (hashes[index] >> other & BYTE)
        keys[index] = pair << POSITION_BITS | np.uint64(index)


@kernel
def _num_bits(bits):
    bits -= (bits >> ONE) & PAIRS
    bits = (bits & FOURS) + ((bits >> TWO) & FOURS)
    return (((bits + (bits >> FOUR)) & EIGHTS) * ONES) >> TOP


@kernel
def _first(firsts, position):
    while firsts[position] != position:
        firsts[position] = firsts[firsts[position]]
        position = firsts[position]
    return position


@kernel
def _join(firsts, first, second):
    first, second = _first(firsts, first), _first(firsts, second)
    firsts[max(first, second)] = min(first, second)


@kernel
def _join_all(firsts, pairs):
    for number in range(len(pairs)):
        _join(firsts, pairs[number, 0], pairs[number, 1])


@kernel
def _are_near(one, other, seen, max_bits, max_far):
    far = 0
    for frame in range(len(one)):
        is_seen = seen >> frame & 1
        far += (not is_seen) or _num_bits(one[frame] ^ other[frame]) > max_bits
        if far > max_far:
            return False
    return True


@kernel
def _join_near(firsts, keys, own, usable, hashes, values, seen, order, max_bits, max_far):
    """Join the groups of near duplicates that share a key.

    Args:
        keys: from `_make_keys`, sorted.
        own: uint64, room for the hashes in the order of the keys, which are compared first.
        usable: positions in `order` of the videos that `hashes` is of.
        max_bits: of near frames. max_far: frames of near duplicates that may differ in more bits.
    """
    for place in range(len(keys)):
        own[place] = hashes[keys[place] & POSITION]
    for start in range(len(keys)):
        for end in range(start + 1, min(start + WINDOW + 1, len(keys))):
            if keys[end] >> POSITION_BITS != keys[start] >> POSITION_BITS:
                break
            if _num_bits(own[start] ^ own[end]) > max_bits:
                continue
            first, second = np.int64(usable[keys[start] & POSITION]), np.int64(usable[keys[end] & POSITION])
            if _first(firsts, first) == _first(firsts, second):
                continue
            one, other = order[first], order[second]
            if _are_near(values[one], values[other], seen[one] & seen[other], max_bits, max_far):
                _join(firsts, first, second)
