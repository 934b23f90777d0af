"""`depth: auto`: which estimator it resolves to, once per run, and its message to the user."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from ex4d import depth
from ex4d.depth import DepthRequest, auto, transformers
from ex4d.errors import ConfigError
from ex4d.geometry.masks import MaskConfig
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines import cli
from pipelines.preprocess import fingerprints
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig, find_sources


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, SyntheticConfig(num_videos=2, num_frames=5, size=(32, 32), supersample=1))
    return folder


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A hub's cache without weights; the tests are offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def config_of(corpus, output) -> PreprocessConfig:
    masks = MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0)
    return PreprocessConfig(
        input=str(corpus), output=str(output), num_frames=5, size=(32, 32), masks=masks, depth="auto"
    )


def without_files(corpus, folder, count):
    """Return a copy of the corpus in which the first `count` videos have no depth file."""
    shutil.copytree(corpus, folder)
    for path in sorted(folder.rglob("*.depth.npz"))[:count]:
        path.unlink()
    return folder


def choice_of(config):
    return preprocess.with_depth(config, find_sources(config, None)).depth


def test_files_beside_all_videos_are_taken_and_the_dataset_is_that_of_sidecar(corpus, tmp_path, capsys):
    config = config_of(corpus, tmp_path / "auto")
    assert preprocess.run(config, runner_name="inline").exit_code == 0
    assert capsys.readouterr().out == "depth=auto: sidecar, because every video has a depth file\n"
    named = replace(config, output=str(tmp_path / "named"), depth="sidecar")
    preprocess.run(named, runner_name="inline")
    facts = [json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("auto", "named")]
    assert facts[0]["config"]["depth"] == "sidecar"
    assert facts[0] == facts[1]
    staged = [sorted(path.name for path in (tmp_path / name / "staging/clips").iterdir()) for name in ("auto", "named")]
    assert staged[0] == staged[1]


@pytest.mark.parametrize("count", [1, 2])
def test_without_a_file_and_offline_it_is_parallax_and_one_line_names_the_ways(corpus, tmp_path, capsys, count):
    config = config_of(without_files(corpus, tmp_path / "videos", count), tmp_path / "out")
    assert choice_of(config) == "parallax"
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.startswith("depth=auto: parallax")
    for way in (f"{count} of 2 videos", "NAME.depth.npz", "hf download depth-anything/", "depth_path=FOLDER"):
        assert way in line


def test_weights_that_are_here_are_taken(corpus, tmp_path, monkeypatch, capsys):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    monkeypatch.setattr(transformers.hub, "resolve", lambda *_: snapshot)
    config = config_of(without_files(corpus, tmp_path / "videos", 2), tmp_path / "out")
    assert choice_of(config) == "parallax", "an interrupted download is no weights"
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert choice_of(config) == "depth-anything-v2"
    assert "depth=auto: depth-anything-v2, since 2 of 2 videos" in capsys.readouterr().out


def test_a_video_that_is_missing_does_not_decide(corpus, tmp_path, capsys):
    listing = tmp_path / "list.txt"
    paths = sorted(str(path) for path in corpus.rglob("*.mp4"))
    listing.write_text("\n".join([*paths, str(tmp_path / "nowhere.mp4")]))
    assert choice_of(config_of(listing, tmp_path / "out")) == "sidecar"
    assert "because every video that can be read has a depth file" in capsys.readouterr().out


def test_scores_need_no_choice(corpus, tmp_path, capsys):
    config = replace(config_of(without_files(corpus, tmp_path / "videos", 2), tmp_path / "out"), score_only=True)
    assert preprocess.run(config, runner_name="inline").exit_code == 0
    assert "auto" not in capsys.readouterr().out


def test_a_depth_path_must_say_what_it_is_for(corpus, tmp_path):
    config = replace(config_of(corpus, tmp_path / "out"), depth_path=str(corpus))
    with pytest.raises(ConfigError, match=r"must be null with depth=auto; set depth=sidecar"):
        choice_of(config)
    with pytest.raises(ConfigError, match="depth_path"):
        auto.choose([DepthRequest("a.mp4")], "a.npz")


def test_the_choices_of_a_setting_are_the_estimators_and_auto():
    assert ("auto", *depth.ESTIMATORS) == depth.CHOICES
    fingerprints.sample_settings(PreprocessConfig(depth="auto"))


def test_reconstruct_takes_it_too(corpus, tmp_path, capsys):
    video = next(corpus.rglob("*.mp4"))
    assert cli.main(["reconstruct", str(video), "--depth", "auto", "--output", str(tmp_path / "view")]) == 0
    assert capsys.readouterr().out.startswith("depth=auto: sidecar, because every video has a depth file\n")
