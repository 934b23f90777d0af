"""Score the frames of a clip, and filter by the scores before the expensive stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.preprocess.filters import decide
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def measure(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `scores` of the clip and of its shot, from the ledger or measured now."""
    from ex4d.quality import clip

    known = row["known_scores"]
    return {"scores": known or clip.measure(row["frames"], row["fps"]) | row["shot_scores"]}


def apply_filters(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Raise Filtered if a score misses its threshold."""
    decide(row["scores"], config.filters)
    return {}


MEASURE = Stage("measure", measure, reads=("frames", "fps", "shot_scores", "known_scores"), writes=("scores",))
FILTER = Stage("score", apply_filters, reads=("scores",), writes=())
