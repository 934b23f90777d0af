"""What a clip looks like in numbers, and the decision on them before the dear stages run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.preprocess.filters import decide
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def measure(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `scores` of the clip and of its shot: those that the ledger had, or measured now."""
    from ex4d.quality import clip

    known = row["known_scores"]
    return {"scores": known or clip.measure(row["frames"], row["fps"]) | row["shot_scores"]}


def filtered(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return nothing. Raises Filtered."""
    decide(row["scores"], config.filters)
    return {}


MEASURE = Stage("measure", measure, reads=("frames", "fps", "shot_scores", "known_scores"), writes=("scores",))
STAGE = Stage("score", filtered, reads=("scores",), writes=())
