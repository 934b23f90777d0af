"""Measure a score of the user's own before the depth stage, and filter by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.preprocess.filters import decide
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def own_score(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `scores` with `own`. Raises Filtered; BadSample (own_score: not a finite number)."""
    from ex4d.quality import own

    scorer = config.scorer
    assert scorer is not None
    device = "cuda" if scorer.num_gpus else "cpu"
    value = own.measure(row["frames"], row["fps"], scorer.file, scorer.weights, device)
    decide({own.OWN: value}, config.filters, scorer)
    return {"scores": {**row["scores"], own.OWN: value}}


STAGE = Stage("own_score", own_score, reads=("frames", "fps", "scores"), writes=("scores",))
