"""Plan the clips of a video, as a pure function of the video's record.

Workers plan a video's clips as soon as its shots are known, and once more when all videos are known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ex4d.errors import BadSample, Filtered
from pipelines.inputs import Span
from pipelines.preprocess.stages.shots import unpack_pts

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig

T = TypeVar("T")
GAP = 2.5  # in median frame intervals; a longer interval is a gap: a pause is one, a single dropped frame is not


@dataclass(frozen=True)
class Clip:
    """A fixed number of frames of one shot.

    Args:
        key: content hash and span; identifies the frames, independent of other settings.
        frame_index: indices of the frames in the source's presentation order.
        pts: timestamps of these frames, in ticks of time_base.
        time_base: seconds per tick, (numerator, denominator).
        fps: mean frames per second of the clip.
        box: [y, x, height, width] px of the source region that the frames show: the shot inside black bars.
        shot_scores: {name: score} of its shot.
        caption: caption of its span in a list; None if there is none.
        licence: "" if unknown.
    """

    key: str
    frame_index: list[int]
    pts: list[int]
    time_base: tuple[int, int]
    fps: float
    box: list[int]
    shot_scores: dict[str, float]
    caption: str | None = None
    licence: str = ""


def plan(sha256: str, record: Mapping[str, Any], config: PreprocessConfig, spans: Sequence[Span] = ()) -> list[Clip]:
    """Return the clips of a video, in time order, at least one.

    Args:
        record: `info`, `pts_runs`, `cuts` and `shots` of the probe and shots stages.
        spans: each clip lies within one of these and within one shot; () is the whole video. If two spans yield the
            same clip, the first one provides caption and licence.

    Raises:
        BadSample: span_outside (the video ends before any span begins).
        Filtered: shot_length (score: the longest shot, s), frame_rate (score: mean rate of the longest shot, 1/s).
    """
    pts = np.array(unpack_pts(record["pts_runs"]), np.int64)
    time_base = Fraction(*record["info"]["time_base"])
    edges = [0, *record["cuts"], len(pts)]
    shots = list(zip(itertools.pairwise(edges), record["shots"], strict=True))
    seconds = (pts - pts[0]) * float(time_base)
    parts = [(part, look, span) for span in spans or (Span(),) for part, look in _within(span, shots, seconds)]
    if not parts:
        raise BadSample("span_outside", "the video ends before any span of the list begins")
    whole, notes = [0, 0, *record["info"]["size"]], record["info"].get("notes", ())
    facts = {"hdr": any(note.startswith("hdr_") for note in notes), "interlaced": "interlaced" in notes}
    found: dict[str, Clip] = {}
    for part, look, span in parts:
        for index in _of_shot(part, pts, time_base, config):
            seen = {**look, **facts} if config.crop_bars else {**look, **facts, "box": whole}
            clip = _clip(sha256, index, pts, time_base, seen, config)
            found.setdefault(clip.key, replace(clip, caption=span.caption, licence=span.licence))
    if not found:
        raise _why_none([part for part, _, _ in parts], pts, time_base, config)
    ordered = sorted(found.values(), key=lambda clip: clip.frame_index)
    return middles(ordered, config.clips_per_video or len(ordered))


def in_source(clip: Clip, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the clip's position in its source: `frame_s` [T], the frames' times in s from the video's first frame;
    `source_frames`, the video's number of frames; and `source_s`, the time from its first to its last frame in s.
    """
    first, *steps = record["pts_runs"]
    over, under = record["info"]["time_base"]  # dividing integers rounds once, like the value of a Fraction
    return {
        "frame_s": [(tick - first) * over / under for tick in clip.pts],
        "source_frames": 1 + sum(count for _, count in steps),
        "source_s": sum(step * count for step, count in steps) * over / under,
    }


def _within(
    span: Span, shots: Sequence[tuple[tuple[int, int], Any]], seconds: np.ndarray
) -> Iterator[tuple[tuple[int, int], Any]]:
    """Yield the part of each shot that a time span covers, as frames [start, stop), with the shot's facts.

    Args:
        seconds: time of each frame, from the first one.
    """
    half_frame = 0.5 * float(seconds[-1]) / max(1, len(seconds) - 1)  # tolerance, as times in lists are rounded
    first = int(np.searchsorted(seconds, span.start_s - half_frame))
    last = len(seconds) if span.end_s is None else int(np.searchsorted(seconds, span.end_s - half_frame))
    for (start, stop), look in shots:
        if max(start, first) < min(stop, last):
            yield (max(start, first), min(stop, last)), look


def _of_shot(
    span: tuple[int, int], pts: np.ndarray, time_base: Fraction, config: PreprocessConfig
) -> Iterator[np.ndarray]:
    """Yield the frame indices of each clip of a shot: disjoint, evenly spread, and away from the cuts."""
    start, stop = span
    ticks = pts[start:stop]
    if (stop - start) < config.num_frames or float((ticks[-1] - ticks[0]) * time_base) < config.min_shot_s:
        return
    length = config.num_frames
    runs = [run for run in _runs(ticks, time_base, config) if len(run) >= length]
    counts = [0] * len(runs)
    for _ in range(min(sum(len(run) // length for run in runs), config.clips_per_shot)):
        # The next clip goes into the largest free part.
        room = [
            len(run) / (count + 1) if (count + 1) * length <= len(run) else 0.0
            for run, count in zip(runs, counts, strict=True)
        ]
        counts[room.index(max(room))] += 1
    for run, count in zip(runs, counts, strict=True):
        free = len(run) - count * length
        for number in range(count):
            first = number * length + free * (number + 1) // (count + 1)
            yield start + run[first : first + length]


def _runs(ticks: np.ndarray, time_base: Fraction, config: PreprocessConfig) -> list[np.ndarray]:
    """Return runs of positions in the shot: every stride-th frame, or the frame nearest to each wanted time.

    A run ends where time is uneven: at a gap of GAP median intervals or, with a set rate, where a frame would be
    repeated or lies more than half a step from its wanted time.
    """
    if config.fps is None:
        steps = np.diff(ticks)
        breaks = np.flatnonzero(steps > GAP * np.median(steps)) + 1 if len(steps) else np.zeros(0, np.int64)
        return [run[:: config.stride] for run in np.split(np.arange(len(ticks)), breaks)]
    seconds = (ticks - ticks[0]) * float(time_base)
    wanted = np.arange(int(np.floor(seconds[-1] * config.fps + 0.5)) + 1) / config.fps
    after = np.searchsorted(seconds, wanted).clip(1, len(seconds) - 1) if len(seconds) > 1 else np.zeros(1, np.int64)
    before = after - 1
    grid = np.where(seconds[after] - wanted < wanted - seconds[before], after, before)
    near = np.abs(seconds[grid] - wanted) <= (0.5 + 1e-6) / config.fps
    # A repeated frame would be a frozen picture in the clip.
    breaks = np.flatnonzero((np.diff(grid) <= 0) | ~near[1:] | ~near[:-1]) + 1
    return np.split(grid, breaks)


def middles(ordered: Sequence[T], count: int) -> list[T]:
    """Return the middle elements of `count` equal groups; all elements if there are fewer."""
    count = min(count, len(ordered))
    return [ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count)]


def _clip(
    sha256: str,
    index: np.ndarray,
    pts: np.ndarray,
    time_base: Fraction,
    look: Mapping[str, Any],
    config: PreprocessConfig,
) -> Clip:
    ticks = [int(value) for value in pts[index]]
    steps = max(1, len(ticks) - 1)
    span_s = float((ticks[-1] - ticks[0]) * time_base)
    fps = config.fps if config.fps is not None else round(steps / span_s, 6) if span_s else 1.0
    stem = f"{sha256[:16]}-{index[0]:06d}-{index[-1]:06d}"
    return Clip(
        key=f"{stem}-{len(index)}",
        frame_index=[int(value) for value in index],
        pts=ticks,
        time_base=(time_base.numerator, time_base.denominator),
        fps=float(fps),
        box=list(look["box"]),
        shot_scores={
            **{name: float(look[name]) for name in ("bars", "logo", "hdr", "interlaced")},
            "source_side": float(min(look["box"][2:])),
        },
    )


def _why_none(spans: list[tuple[int, int]], pts: np.ndarray, time_base: Fraction, config: PreprocessConfig) -> Filtered:
    start, stop = max(spans, key=lambda span: pts[span[1] - 1] - pts[span[0]])
    # Assume the mean duration of the other frames for the last one.
    span_s = float((pts[stop - 1] - pts[start]) * time_base) * (stop - start) / max(1, stop - start - 1)
    rate = (stop - start) / span_s if span_s else 0.0
    needed_s = config.num_frames / config.fps if config.fps else config.num_frames * config.stride / rate if rate else 0
    needed_s = max(needed_s, config.min_shot_s)
    if config.fps is not None and span_s >= needed_s:
        return Filtered("frame_rate", rate, config.fps)
    return Filtered("shot_length", span_s, needed_s)
