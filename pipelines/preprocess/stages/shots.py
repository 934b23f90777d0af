"""Find the shots of a video: decode every frame once at low resolution, and detect cuts and fades with PySceneDetect.

The same pass finds black bars around each shot's picture, and a logo in a corner.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d.errors import BadSample, ContractError
from ex4d.isolation import File
from pipelines.preprocess import duplicates, fetch
from pipelines.preprocess.stages import isolated
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from ex4d.video.source import Source
    from pipelines.preprocess.settings import PreprocessConfig

MAX_HEIGHT = 144
MAX_FRAMES = 20_000_000  # of one video: four days at 60 frames per second
# No valid video has a lower bit rate, so a header that claims hours in a few kB is not granted hours of processing.
MIN_BYTES_PER_S = 2000


def shots(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `pts_runs` ([first pts, [step, count], …] of all frames in order), `cuts` (index of the first frame after
    each cut), `shots` (one more than cuts: `box` [y, x, height, width] px inside black bars, the scores `bars` and
    `logo`), and `hashes` (see duplicates.sampled).

    Raises:
        BadSample: decode_error and the like, timestamps_disordered.
    """
    honest_s = min(row["info"]["duration_s"], row["size_bytes"] / MIN_BYTES_PER_S)
    pts, cuts, found, hashes = isolated.call(config, "find_shots", File(fetch.video(row, config)), needs_s=honest_s)
    size = row["info"]["size"]
    shots = [_in_source(looks, size) for looks in found]
    return {"pts_runs": pack_pts(pts), "cuts": cuts, "shots": shots, "hashes": hashes}


def _in_source(looks: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    from ex4d.quality import shot

    box = shot.source_box(looks["box"], looks["size"], size)
    return {"box": box, "bars": 1.0 - box[2] * box[3] / (size[0] * size[1]), "logo": looks["logo"]}


def find_shots(path: Source) -> tuple[list[int], list[int], list[dict[str, Any]], list[str]]:
    """Return (pts of every frame in presentation order, sorted indices at which a new shot begins, looks of each shot,
    the video's perceptual hashes).

    Looks of a shot: `box` [y, x, height, width] and `size` [h, w], both in px of the small frames, and `logo`.

    Uses PySceneDetect's adaptive detector (a cut must differ from its whole neighbourhood, so a moving camera is not a
    cut) and its fade detector, both with default settings.
    """
    import cv2
    from scenedetect import AdaptiveDetector, FrameTimecode, ThresholdDetector

    from ex4d import video
    from ex4d.quality.shot import Samples

    detectors = (AdaptiveDetector(), ThresholdDetector())
    found: set[int] = set()
    samples, segments, start = Samples(), [], 0
    pts: list[int] = []
    hashes: list[int | None] = []
    for index, (stamp, image) in enumerate(video.iter_decimated(path, max_height=MAX_HEIGHT)):
        pts.append(stamp)
        hashes.append(duplicates.frame_hash(image))
        if samples.wants(index):
            samples.add(index, cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        timecode = FrameTimecode(index, fps=25.0)  # detectors count frames; the rate does not matter
        bgr = image[..., ::-1].copy()
        for detector in detectors:
            for cut in detector.process_frame(timecode, bgr):
                found.add(cut.frame_num)
                if start < cut.frame_num:
                    segments.append((start, cut.frame_num, _looks(samples.take_until(cut.frame_num), image.shape[:2])))
                    start = cut.frame_num
    if not pts:
        raise BadSample("no_frames", "no frame can be decoded")
    if any(later <= earlier for earlier, later in itertools.pairwise(pts)):
        raise BadSample("timestamps_disordered", "the frame timestamps do not increase")
    segments.append((start, len(pts), _looks(samples.take_until(len(pts)), image.shape[:2])))
    cuts = sorted(cut for cut in found if 0 < cut < len(pts))
    # A fade is reported late and may lie in a closed segment; then both halves share that segment's facts.
    shots = [
        max(segments, key=lambda segment: min(stop, segment[1]) - max(first, segment[0]))[2]
        for first, stop in itertools.pairwise([0, *cuts, len(pts)])
    ]
    return pts, cuts, shots, duplicates.sampled(hashes, pts)


def _looks(grey: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """Return box, size and logo of the sampled frames, uint8 [K,h,w], of one shot."""
    from ex4d.quality import shot

    if not len(grey):
        return {"box": [0, 0, *size], "size": [*size], "logo": 0.0}
    box = shot.find_box(grey)
    return {"box": [*box], "size": [*size], "logo": shot.logo_share(grey, box)}


def pack_pts(pts: Sequence[int]) -> list[Any]:
    """Return increasing pts as [first, [step, count], …]: short at a constant rate, however long the video."""
    steps = (later - earlier for earlier, later in itertools.pairwise(pts))
    return [pts[0], *([step, sum(1 for _ in group)] for step, group in itertools.groupby(steps))]


def unpack_pts(runs: Sequence[Any]) -> list[int]:
    """Return the pts of `pack_pts`. Raises ContractError beyond MAX_FRAMES, as a few bytes can claim any number."""
    if sum(count for _, count in runs[1:]) > MAX_FRAMES:
        raise ContractError(f"pts_runs stand for more than {MAX_FRAMES} frames")
    steps = (step for step, count in runs[1:] for _ in range(count))
    return list(itertools.accumulate(steps, initial=runs[0]))


STAGE = Stage(
    "shots",
    shots,
    reads=("path", "sha256", "info", "size_bytes"),
    writes=("pts_runs", "cuts", "shots", "hashes"),
)
