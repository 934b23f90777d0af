"""Find independently moving bodies in a clip with a moving camera, by flow that no depth explains; place them in depth.

A body that moves along with or against the camera gets a wrong depth from its parallax, in front of everything or
behind the wall. Its limbs, its turns and the rest of its motion violate the epipolar geometry in places, though. So a
picture is segmented into patches along its depth edges, and a patch counts as moving if much of its flow cannot be
explained. Such a patch becomes an upright card at the depth of the static surface just below it, or nearer if its own
parallax says so: a body may hang in the air but cannot lie behind what it covers.
"""

from __future__ import annotations

import numpy as np

from ex4d.errors import Filtered
from ex4d.geometry.tracks import Flows, sample

RESIDUAL_RATIO = 3.0  # a residual above this × the clip's median counts as unexplained,
RESIDUAL_PX = (0.8, 2.0)  # within these limits of the threshold
MIN_SHARE = 0.3  # least unexplained share of the pixels of a moving patch
MIN_PATCH = 0.001  # least size of a moving patch, as a fraction of the picture
MAX_MOVING = 0.6  # largest moving share of the clip's pixels: beyond, too little is left to trust the cameras
EDGE = 0.2  # step of log depth between neighbours that bounds a patch
NEARER = 2.0  # largest inverse depth that its own parallax may give a body, × that of the surface it stands on
BAND = 0.1  # fraction of the picture's height, around a body's lower end, in which that surface is searched


def find(inverse: np.ndarray, residual: np.ndarray, flows: Flows, weights: Flows) -> np.ndarray:
    """Return dynamic_mask bool [T, H, W]: what moves in its own frame, or in most of the frames in which it is seen.

    Args:
        inverse: float32 [T, H, W] > 0, 1/z.
        residual: float32 [T, H, W] px, the flow that `inverse` and the cameras do not explain.
        flows, weights: flows between frames, and how far they are trusted.

    Raises:
        Filtered: parallax_moving, if more than MAX_MOVING of the clip moves by itself.
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
    # Edges are several pixels wide: enclosed areas, small fragments and unexplained pixels nearby belong to the body.
    near = cv2.dilate(body, ball).astype(bool) & small[labels]
    near |= cv2.dilate(body, _ball(labels.shape, 0.05)).astype(bool) & (residual > limit)
    closed = cv2.morphologyEx(body | near.astype(np.uint8), cv2.MORPH_CLOSE, ball)
    return cv2.dilate(closed, ball).astype(bool)


def _ball(size: tuple[int, ...], share: float) -> np.ndarray:
    import cv2

    reach = 2 * max(1, round(share * min(size))) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach))


def place(inverse: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Place each moving body at the depth of the static surface around its lower end, or nearer; 1/z float32 [T, H, W].

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
        # The surface that a body stands on has about one depth along a row: a wider part of the row is more robust.
        rows = slice(max(0, min(bottom - band // 2, height - band)), bottom + band)
        columns = slice(max(0, x - width), x + 2 * width)
        support = inverse[rows, columns][~moves[rows, columns]]
        if support.size:
            body, stands_at = labels == label, float(np.median(support))
            placed[body] = np.clip(np.median(inverse[body]), stands_at, NEARER * stands_at)
    return placed
