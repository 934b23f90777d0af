"""`ex4d retry` repeats exactly the rejects with the named reasons, with the settings of the run."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from ex4d.errors import BadSample, ConfigError
from ex4d.geometry.masks import MaskConfig
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines import cli
from pipelines.commands.retry import retry, summary
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig, Stages
from pipelines.preprocess.settings import DecodeLimits
from pipelines.preprocess.stages import decode, probe
from pipelines.runtime.ledger import Ledger


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Settings, with relative paths, of a run that rejected a video and two clips for different reasons."""
    corpus = SyntheticConfig(num_videos=3, num_frames=12, size=(32, 32), supersample=1)
    write_corpus(tmp_path / "in", corpus)
    monkeypatch.chdir(tmp_path)
    config = PreprocessConfig(
        output="out",
        input="in",
        num_frames=5,
        size=(32, 32),
        clips_per_shot=2,
        masks=MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0),
    )

    def slow_video(row, context):
        if row["path"].endswith("00000.mp4"):
            raise BadSample("decode_timeout", "probe took more than 1 s")
        return probe.probe(row, context)

    def broken_clip(row, context):
        if row["path"].endswith("00001.mp4"):
            raise BadSample("decode_timeout" if row["frame_index"][0] < 5 else "decode_crash", "told to")
        return decode.decode(row, context)

    usual = Stages()
    probed = replace(probe.STAGE, function=slow_video)
    decoded = replace(decode.STAGE, function=broken_clip, reads=(*decode.STAGE.reads, "frame_index"))
    stages = Stages(
        find_shots=tuple(probed if stage is probe.STAGE else stage for stage in usual.find_shots),
        clip=tuple(decoded if stage is decode.STAGE else stage for stage in usual.clip),
    )
    result = preprocess.run(config, runner_name="inline", stages=stages)
    assert sorted(row["reason"] for row in result.rejects) == ["decode_crash", "decode_timeout", "decode_timeout"]
    assert result.counts["samples"] == 2
    return config


def test_only_the_named_reasons_are_tried_again(refused, tmp_path, monkeypatch):
    monkeypatch.chdir("/")  # the folder of the run is remembered
    output = str(tmp_path / "out")
    before = Ledger(output).names()
    result = retry(output, ["decode_timeout"], runner_name="inline")
    assert sorted(result.retried.values()) == [("decode_timeout", "done")] * 2
    assert {row["reason"] for row in result.rejects} == {"decode_crash"}
    assert (result.counts["samples"], result.counts["videos_split"]) == (5, 3)
    assert result.worked["split"] == 1
    assert result.worked["clip"] == 3  # the clip, and two of the video that has clips only now
    assert len(before - Ledger(output).names()) == 2
    assert os.getcwd() == "/"


def test_refusals_under_other_choices_stay(refused):
    """Under other limits the earlier rejects do not apply, so there are none to forget; the work is redone anyway."""
    more = replace(refused, limits=DecodeLimits(timeout_s=240.0))
    before = Ledger("out").names()
    result = preprocess.run(more, runner_name="inline", retry=["decode_timeout"])
    assert result.retried == {}
    assert result.counts["samples"] == 6
    assert before <= Ledger("out").names()


def test_with_current_only_superseded_staging_is_dropped_after_the_commit(refused):
    preprocess.run(refused, runner_name="inline", retry=["decode_timeout", "decode_crash"])
    made = Ledger("out").names()
    preprocess.run(replace(refused, seed=1, keep_staging="current"), runner_name="inline")
    kept = Ledger("out").names()
    assert {name for name in made if name.startswith("videos/")} <= kept
    assert not {name for name in made if name.startswith("clips/")} & kept
    assert sum(name.endswith(".tar") for name in kept) == 6


@pytest.mark.ray
def test_the_command_says_what_became_of_each(refused, ray_local, capsys):
    assert cli.main(["retry", "out", "--reason", "decode_timeout", "--reason", "decode_crash"]) == 0
    assert "tried again: 3\n  decode_crash -> done: 1\n  decode_timeout -> done: 2" in capsys.readouterr().out
    assert cli.main(["retry", "in", "--reason", "decode_timeout"]) == 2
    assert "has written to" in capsys.readouterr().err


def test_what_cannot_be_retried_is_said(refused, tmp_path):
    with pytest.raises(ConfigError, match="at least one"):
        retry("out", [])
    assert summary(retry("out", ["no_such_reason"], runner_name="inline")) == "tried again: 0"
