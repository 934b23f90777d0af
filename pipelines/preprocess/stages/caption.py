"""Caption a clip: from its list or the text file beside it, else by a captioner if one is configured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig

NO_MODEL = {"model": "", "revision": "", "weights_sha256": ""}


def caption(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `caption`, and `caption_facts`: `source` (list, sidecar, model or none), and the model."""
    captioner = config.captioner
    if row["caption"] or captioner is None:
        return {"caption": row["caption"], "caption_facts": {"source": row["caption_source"], **NO_MODEL}}
    from ex4d.models import captioner as network

    device = "cuda" if captioner.num_gpus else "cpu"
    text, facts = network.caption(row["frames"], captioner.model, captioner.prompt, captioner.max_new_tokens, device)
    return {"caption": text, "caption_facts": {"source": "model", **facts}}


STAGE = Stage("caption", caption, reads=("frames", "caption", "caption_source"), writes=("caption", "caption_facts"))
