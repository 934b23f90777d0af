"""Where a video is cut: every frame is decoded once, small, and PySceneDetect looks for cuts and fades."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ex4d.errors import BadSample
from pipelines.stage import Row, Stage
from pipelines.stages import isolated

if TYPE_CHECKING:
    from pipelines.settings import PreprocessConfig

MAX_HEIGHT = 144
# A file cannot hold honest video below this rate, so a header that declares hours in a few kB gets no hours.
MIN_BYTES_PER_S = 2000


def shots(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `pts_runs` ([first pts, [step, count], …] of all frames in order) and `cuts` (index of each first frame).

    Raises:
        BadSample: decode_error and the like, timestamps_disordered.
    """
    honest_s = min(row["info"]["duration_s"], row["size_bytes"] / MIN_BYTES_PER_S)
    pts, cuts = isolated.call(config, "find_shots", row["path"], needs_s=honest_s)
    return {"pts_runs": pack_pts(pts), "cuts": cuts}


def find_shots(path: str) -> tuple[list[int], list[int]]:
    """Return (pts of every frame in the order of presentation, sorted indices at which a new shot begins).

    PySceneDetect's adaptive detector (a frame differs from its neighbourhood, not only from the one before, so that a
    moving camera is no cut) and its fade detector, both with their defaults.
    """
    from scenedetect import AdaptiveDetector, FrameTimecode, ThresholdDetector

    from ex4d import video

    detectors = (AdaptiveDetector(), ThresholdDetector())
    found: set[int] = set()
    pts: list[int] = []
    for index, (stamp, image) in enumerate(video.iter_decimated(path, max_height=MAX_HEIGHT)):
        pts.append(stamp)
        timecode = FrameTimecode(index, fps=25.0)  # detectors count frames; the rate never matters
        bgr = image[..., ::-1].copy()
        for detector in detectors:
            found.update(cut.frame_num for cut in detector.process_frame(timecode, bgr))
    if not pts:
        raise BadSample("no_frames", "nothing decodes")
    if any(later <= earlier for earlier, later in itertools.pairwise(pts)):
        raise BadSample("timestamps_disordered", "frames do not come with rising timestamps")
    return pts, sorted(cut for cut in found if 0 < cut < len(pts))


def pack_pts(pts: Sequence[int]) -> list[Any]:
    """Return rising pts as [first, [step, count], …]: a line for a video of constant rate, however long."""
    steps = (later - earlier for earlier, later in itertools.pairwise(pts))
    return [pts[0], *([step, sum(1 for _ in group)] for step, group in itertools.groupby(steps))]


def unpack_pts(runs: Sequence[Any]) -> list[int]:
    """Return the pts of `pack_pts`."""
    steps = (step for step, count in runs[1:] for _ in range(count))
    return list(itertools.accumulate(steps, initial=runs[0]))


STAGE = Stage("shots", shots, reads=("path", "info", "size_bytes"), writes=("pts_runs", "cuts"))
