"""A custom score, the example of the how-to with a tiny CLIP, filters clips and is stored in the samples."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_corpus import inline
from vision_networks import make_clip

from ex4d.data.verify import verify
from ex4d.errors import ConfigError
from pipelines.preprocess import fingerprints
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.filters import ScorerConfig

PAGE = Path(__file__).parents[2] / "docs/how-to/own-score.md"


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scorer")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (folder / "looks_like.py").write_text(code)
    (folder / "clip").mkdir()
    return ScorerConfig(file=str(folder / "looks_like.py"), weights=str(make_clip(folder / "clip")))


def scores_of(config):
    return pq.read_table(f"{config.output}/manifest.parquet")["score_own"].to_pylist()


def test_the_example_scores_every_clip_and_a_threshold_needs_no_new_work(config, tmp_path, scorer):
    plain = inline(replace(config, output=str(tmp_path / "plain")))
    scored = replace(config, scorer=scorer)
    assert inline(scored).counts["samples"] == plain.counts["samples"] == 12
    found = sorted(scores_of(scored))
    assert len(set(found)) == 12
    assert -1 <= found[0] <= found[-1] <= 1
    half = replace(scored, scorer=replace(scorer, min=found[6]))
    again = inline(half)
    assert (again.worked["clip"], again.counts["samples"], again.counts["clips_filtered"]) == (0, 6, 6)
    assert {(row["stage"], row["reason"]) for row in again.rejects} == {("own_score", "own")}
    fresh = replace(half, output=str(tmp_path / "fresh"))
    result = inline(fresh)
    assert result.stages["depth"].done == 6  # dropped clips get no depth
    assert verify(fresh.output, full=True).tree_sha256 == verify(half.output, full=True).tree_sha256
    looser = inline(replace(half, scorer=replace(scorer, min=found[3])))
    assert looser.counts["samples"] == 9, "a looser threshold takes dropped clips back"
    assert str(Path(scorer.file).parent) not in Path(fresh.output, "dataset.json").read_text()


def test_the_score_runs_in_the_actors_of_the_gpu(config, scorer):
    chosen = replace(config, scorer=replace(scorer, num_gpus=0.25), depth="depth-pro")
    assert [s.name for s in preprocess.stages_of(chosen).clip if s.num_gpus] == ["own_score", "depth"]


def test_what_is_no_score_is_named(config, tmp_path, scorer):
    file = tmp_path / "nan.py"
    file.write_text("def score(model, frames, fps):\n    return float('nan') if frames.mean() > 0 else 1.0\n")
    bad = inline(replace(config, max_bad_fraction=1.0, scorer=ScorerConfig(file=str(file))))
    assert {row["reason"] for row in bad.rejects} == {"own_score"}
    for text in (None, "def other(): pass", "import nothing_of_that_name", "def score(:"):
        path = tmp_path / "wrong.py"
        if text is not None:
            path.write_text(text)
        fingerprints._scorer.cache_clear()
        with pytest.raises(ConfigError, match=r"preprocess\.scorer\.file"):
            inline(replace(config, output=str(tmp_path / "no"), scorer=ScorerConfig(file=str(path))))
