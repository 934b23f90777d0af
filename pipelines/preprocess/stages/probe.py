"""Read a video's container, codec, size and time base; reject files that are not videos."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ex4d.isolation import File
from pipelines.preprocess import fetch
from pipelines.preprocess.stages import isolated
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig


def probe(row: Row, config: PreprocessConfig) -> dict[str, Any]:
    """Return `info`, the VideoInfo as a mapping. Raises BadSample with the reasons of `video.probe`."""
    return {"info": asdict(isolated.call(config, "probe", File(fetch.video(row, config))))}


STAGE = Stage("probe", probe, reads=("path", "sha256"), writes=("info",))
