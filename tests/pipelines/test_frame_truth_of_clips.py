"""Every frame of every clip in the dataset is the planned one, by the number drawn in it."""

from __future__ import annotations

from collections import Counter

import av
import barcode
import numpy as np
import pytest

from ex4d import storage
from ex4d.data import sample
from ex4d.data.tar import read_sample
from ex4d.geometry.camera import intrinsics
from ex4d.geometry.masks import MaskConfig
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig

RECIPES = (
    *("h264", "h264_open_gop", "h264_vfr", "hevc_open_gop", "hevc_keyint_60", "hevc_closed_gop"),
    *("vp9", "vp9_vfr", "av1", "av1_mp4"),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A bar-coded video of 96 frames in each codec, with a depth file beside it."""
    folder = tmp_path_factory.mktemp("codecs")
    z_depth = np.broadcast_to(np.linspace(2, 3, barcode.SIZE[1], dtype=np.float32), (96, *barcode.SIZE))
    for name in RECIPES:
        recipe = barcode.RECIPES[name]
        if recipe.codec in av.codecs_available:
            barcode.write(folder / (name + recipe.suffix), recipe)
            np.savez_compressed(folder / f"{name}.depth.npz", z_depth=z_depth, K=intrinsics(barcode.SIZE))
    return folder


@pytest.mark.parametrize(("stride", "least"), [(1, 10), (3, 2)])
def test_every_frame_of_every_clip_is_the_one_that_was_asked_for(corpus, tmp_path, stride, least):
    config = PreprocessConfig(
        output=str(tmp_path / "out"),
        input=str(corpus),
        num_frames=9,
        stride=stride,
        size=barcode.SIZE,
        clips_per_shot=10,
        masks=MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0),
    )
    result = preprocess.run(config, runner_name="inline")
    assert (result.exit_code, list(result.rejects)) == (0, [])
    clips: Counter[str] = Counter()
    for path in (tmp_path / "out" / "staging" / "clips").glob("*.tar"):
        key = path.name.partition(".")[0]
        clip = sample.decode(read_sample(storage.read_bytes(path), key))
        first = int(key.split("-")[1])
        assert [barcode.number_of(image) for image in clip.frames] == list(range(first, first + 9 * stride, stride))
        clips[clip.provenance["source_path"].partition(".")[0]] += 1
    there = {path.name.partition(".")[0] for path in corpus.glob("*.depth.npz")}
    assert set(clips) == there
    assert min(clips.values()) >= least
