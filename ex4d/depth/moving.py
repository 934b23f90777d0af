"""Find independently moving bodies in a clip with a moving camera, by flow that no depth explains; place them in depth.

A body that moves along with or against the camera gets a wrong depth from its parallax, in front of everything or
behind the wall. Its limbs, its turns and the rest of its motion break the epipolar geometry, though, in places. So a
picture is cut into patches along the edges of its depth, and a patch moves where much of its flow cannot be
explained. Such a patch becomes a card: upright, at the depth of the static surface just below it, or before that where
its own parallax says so, since a body may hang in the air but not lie behind what it covers.
"""

from __future__ import annotations

import numpy as np

from ex4d.errors import Filtered
from ex4d.geometry.tracks import Flows, sample

RESIDUAL_RATIO = 3.0  # flow that is off by so many times the clip's median is not explained,
RESIDUAL_PX = (0.8, 2.0)  # but at least and at most this
MIN_SHARE = 0.3  # of a patch's pixels
MIN_PATCH = 0.001  # of the picture
MAX_MOVING = 0.6  # of the clip's pixels: the rest is too little to trust the cameras
EDGE = 0.2  # step of log depth between neighbours that bounds a patch
NEARER = 2.0  # × the inverse depth of what a body stands on: the most that its own parallax may bring it before that
BAND = 0.1  # of the picture's height: how far around a body's lower end the surface is sought that it stands on


def find(inverse: np.ndarray, residual: np.ndarray, flows: Flows, weights: Flows) -> np.ndarray:
    """Return dynamic_mask bool [T, H, W]: what moves in its own frame, or in most of the frames that it is seen in.

    Args:
        inverse: float32 [T, H, W] > 0, 1/z.
        residual: float32 [T, H, W] px, the flow that `inverse` and the cameras do not explain.
        flows, weights: between frames, and how far they are trusted.

    Raises:
        Filtered: parallax_moving, where most of the clip moves by itself.
    """
    limit = float(np.clip(RESIDUAL_RATIO * np.median(residual), *RESIDUAL_PX))
    own = [_moving(q, error, limit) for q, error in zip(inverse, residual, strict=True)]
    mask = []
    for i in range(len(own)):
        pairs = [pair for pair in flows if pair[0] == i]
        votes = sum(weights[pair] * sample(own[pair[1]].astype(np.float32), flows[pair]) for pair in pairs)
        mask.append(own[i] | (votes > 0.5 * np.maximum(sum(weights[pair] for pair in pairs), 0.5)))
    share = float(np.mean(mask))
    if share > MAX_MOVING:
        raise Filtered("parallax_moving", share, MAX_MOVING, "most of the picture moves independently of the camera")
    return np.stack(mask)


def _moving(inverse: np.ndarray, residual: np.ndarray, limit: float) -> np.ndarray:
    """Return bool [H, W]: the patches of one frame that move, with the edges and the unexplained pixels around them."""
    import cv2

    logs, kernel = np.log(inverse), np.ones((3, 3), np.uint8)
    edge = cv2.dilate(logs, kernel) - cv2.erode(logs, kernel) > EDGE
    _, labels = cv2.connectedComponents((~edge).astype(np.uint8), connectivity=4)
    size = np.bincount(labels.ravel())
    share = np.bincount(labels.ravel(), (residual > limit).ravel()) / np.maximum(size, 1)
    small = size < MIN_PATCH * labels.size
    chosen, small[0] = (share > MIN_SHARE) & ~small, True
    chosen[0] = False  # the edges
    ball = _ball(labels.shape, 0.015)
    clear = cv2.morphologyEx((residual > 2 * limit).astype(np.uint8), cv2.MORPH_OPEN, ball)
    body = chosen[labels].astype(np.uint8) | clear
    # An edge is some pixels wide; what is enclosed, torn off in small pieces or not explained belongs to the body.
    near = cv2.dilate(body, ball).astype(bool) & small[labels]
    near |= cv2.dilate(body, _ball(labels.shape, 0.05)).astype(bool) & (residual > limit)
    closed = cv2.morphologyEx(body | near.astype(np.uint8), cv2.MORPH_CLOSE, ball)
    return cv2.dilate(closed, ball).astype(bool)


def _ball(size: tuple[int, ...], share: float) -> np.ndarray:
    import cv2

    reach = 2 * max(1, round(share * min(size))) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))


def place(inverse: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return 1/z float32 [T, H, W], each moving body at the depth of the static surface around its lower end or nearer.

    Args:
        inverse: float32 [T, H, W] > 0, 1/z by parallax. mask: bool [T, H, W], what moves.
    """
    return np.stack([_placed(q, moves) for q, moves in zip(inverse, mask, strict=True)])


def _placed(inverse: np.ndarray, moves: np.ndarray) -> np.ndarray:
    import cv2

    placed = inverse.copy()
    height = len(moves)
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(moves.astype(np.uint8))
    for label, (x, y, width, tall, _) in enumerate(boxes):
        if label == 0:
            continue
        band, bottom = max(2, round(BAND * height)), y + tall
        # Surfaces that bodies stand on have one depth along a row: more of the row than lies below makes it robust.
        rows = slice(max(0, min(bottom - band // 2, height - band)), bottom + band)
        columns = slice(max(0, x - width), x + 2 * width)
        support = inverse[rows, columns][~moves[rows, columns]]
        if support.size:
            body, stands_at = labels == label, float(np.median(support))
            placed[body] = np.clip(np.median(inverse[body]), stands_at, NEARER * stands_at)
    return placed
