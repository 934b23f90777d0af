"""A corpus of four small videos, and settings that cut three clips of five frames from each."""

from __future__ import annotations

from pathlib import Path

from ex4d.geometry.masks import MaskConfig
from ex4d.synthetic import SyntheticConfig
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig
from pipelines.runtime.result import Result

CORPUS = SyntheticConfig(num_videos=4, num_frames=17, size=(32, 32), supersample=1)


def choices(corpus: Path, output: Path, **more) -> PreprocessConfig:
    """Return a configuration with one mask per clip, of the cheapest kind."""
    few = {"num_frames": 5, "size": (32, 32), "clips_per_shot": 3, "val_fraction": 0.3}
    masks = MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0)
    return PreprocessConfig(output=str(output), input=str(corpus), **{"masks": masks} | few | more)


def inline(config: PreprocessConfig, **more) -> Result:
    """Run in this process, without Ray, and return the result."""
    return preprocess.run(config, runner_name="inline", **more)
