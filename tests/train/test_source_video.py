"""The source video as second condition: from two-camera clips to an adapter that generates with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_run import make_base, make_dataset

from ex4d import generate, synthetic, video
from ex4d.data import manifest
from ex4d.data.decoding import decoder_of
from ex4d.data.loader import ShardLoader
from ex4d.data.sample import decode
from ex4d.data.tar import read_sample
from ex4d.errors import ConfigError, ContractError
from ex4d.geometry.masks import MaskConfig
from ex4d.models import export, weights
from ex4d.models.backbone import ModelConfig
from ex4d.models.encoders import to_pixels
from ex4d.train import flops, runlog
from ex4d.train.config import Place, TrainConfig
from ex4d.train.job import build_job
from ex4d.train.trainer import Trainer
from pipelines import cli
from pipelines.encode import job as encode
from pipelines.evaluate import job as evaluate
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig

WORLD = synthetic.SyntheticConfig(num_videos=6, num_frames=5, size=(32, 32), second_camera_deg=60.0, supersample=1)
STEPS = {"num_steps": 4, "save_every": 2, "micro_batch_size": 2, "lr": 1e-3, "wandb_mode": "disabled", "device": "cpu"}
STEPS |= {"validate_every": 4, "validate_samples": 2, "condition_dropout": 0.3, "prompt": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two-camera clips, a base, and the clips' latents by that base, as float32."""
    path = tmp_path_factory.mktemp("pairs")
    config = PreprocessConfig(
        output=str(path / "dataset"),
        num_frames=5,
        size=(32, 32),
        masks=MaskConfig(num_masks=1),
        members=("source",),
        val_fraction=0.4,
    )
    assert preprocess.run(config, synthetic_config=WORLD, runner_name="inline").counts["samples"] == 6
    make_base(path)
    encoding = encode.EncodeConfig(config.output, str(path / "latents"), dtype="float32")
    assert encode.run(encoding, model_of(path), runner_name="inline").exit_code == 0
    return path


def model_of(folder: Path, **changes) -> ModelConfig:
    chosen = {"base": str(folder / "base"), "lora_rank": 3, "adapter_hidden": 8, "source_video": True}
    return ModelConfig(**chosen | changes)


def train(folder: Path, data: str, output: Path, alone: Place, **changes) -> list[float]:
    config = TrainConfig(data=str(folder / data), output=str(output), **STEPS)
    device = torch.device("cpu")
    job = build_job(config, model_of(folder, **changes), alone, device)
    assert Trainer(config, job, alone, device, lambda metrics: None).run() == 0
    return [step["loss"] for step in runlog.read(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def trained(folder, alone, tmp_path_factory):
    """(losses, folder) of a run on pixels."""
    output = tmp_path_factory.mktemp("run")
    return train(folder, "dataset", output, alone), output


def test_training_on_latents_is_training_on_pixels(folder, alone, tmp_path, trained):
    assert train(folder, "latents", tmp_path / "latents", alone) == pytest.approx(trained[0], abs=1e-6)
    without = train(folder, "dataset", tmp_path / "without", alone, source_video=False)
    assert max(abs(ours - theirs) for ours, theirs in zip(without, trained[0], strict=True)) > 1e-4


def test_the_adapter_says_what_it_was_trained_with_and_is_given_it(folder, trained, tmp_path, monkeypatch):
    """With only one camera, the video itself is the source video."""
    path = trained[1] / "adapter"
    assert weights.read_metadata(path).source_video
    clip = next((folder / "dataset" / "source").glob("*-00000.source.mp4"))
    given = []
    encoded = generate.generate

    def watched(*args, **more):
        given.append(more["source"])
        return encoded(*args, **more)

    monkeypatch.setattr(generate, "generate", watched)
    argv = ["generate", "--video", str(clip), "--adapter", str(path), "--output", str(tmp_path / "view.mp4")]
    assert cli.main([*argv, "--num-inference-steps", "2", "--guidance-scale", "1", "--device", "cpu"]) == 0
    np.testing.assert_array_equal(given[0], video.read(clip)[0])
    view = video.read(tmp_path / "view.mp4")[0]
    base, model = generate.load(path, device="cpu")
    frames, visible = given[0], np.ones(given[0].shape[:3], bool)
    config = generate.GenerateConfig(num_inference_steps=2, guidance_scale=1.0)
    with_it, without, other = (
        generate.generate(base, model, frames, visible, config, 0, source=source)
        for source in (frames, None, frames[::-1].copy())
    )
    assert with_it.shape == view.shape
    assert len({made.tobytes() for made in (with_it, without, other)}) == 3


def test_evaluation_gives_the_adapter_the_video_and_the_base_alone_nothing(trained, tmp_path, monkeypatch):
    given = []

    def watched(base, model, *args, **more):
        given.append((model._alone, more["source"], more["first_frame"]))
        return args[0]

    monkeypatch.setattr(generate, "generate", watched)
    config = evaluate.EvaluateConfig(
        adapter=str(trained[1] / "adapter"),
        output=str(tmp_path),
        ranges={"orbit-30": ("orbit", 30.0)},
        num_scenes=2,
        methods=("adapter", "base", "other"),
    )
    one_camera = replace(WORLD, second_camera_deg=None)
    assert evaluate.run(config, generate.GenerateConfig(), one_camera, runner_name="inline").exit_code == 0
    assert len(given) == 6
    for alone, source, first_frame in given:
        assert (source is None) == alone
        if not alone:
            np.testing.assert_array_equal(source[0], first_frame)  # the view's own clip, whoever's condition it is


def test_a_form_that_cannot_say_it_is_refused(trained, tmp_path):
    for style in ("released", "kohya"):
        with pytest.raises(ConfigError, match="source video"):
            export.export(trained[1] / "adapter", style, tmp_path / "out")
    (again,) = export.export(trained[1] / "adapter", "ex4d", tmp_path / "again")
    assert weights.read_metadata(again).source_video


def test_loader_and_encoder_give_the_other_camera_s_frames(folder, alone):
    """The slow twin: the base's own encoding of the frames in the shard, a clip at a time."""
    config = TrainConfig(data=str(folder / "dataset"), output="", **STEPS)
    job = build_job(config, model_of(folder), alone, torch.device("cpu"))
    batch = next(job.open_loader("train", 0, 2, 1))
    assert not np.array_equal(batch["source"], batch["frames"])
    ours = job.encoder.clips(batch).source
    for index, frames in enumerate(batch["source"]):
        theirs = job.encoder.base.encode_video(to_pixels(torch.from_numpy(frames)[None]))[0]
        torch.testing.assert_close(ours[index], theirs.float(), atol=1e-5, rtol=0)
    assert "source" not in next(ShardLoader(config.data, "train", 2, 0))  # who does not ask decodes nothing


def test_a_step_is_counted_with_the_tokens_of_both(folder, alone):
    config = TrainConfig(data=str(folder / "dataset"), output="", **STEPS)
    one, two = (
        build_job(config, model_of(folder, source_video=source), alone, torch.device("cpu")).costs[0]
        for source in (False, True)
    )
    assert isinstance(one, flops.Cost)
    assert isinstance(two, flops.Cost)
    assert two.tokens == 2 * one.tokens


def test_clips_of_one_camera_are_refused(tmp_path, folder, alone):
    """With a clip as its own source, the model would only learn to copy."""
    make_dataset(tmp_path)
    config = TrainConfig(data=str(tmp_path / "dataset"), output=str(tmp_path / "out"), **STEPS)
    with pytest.raises(ConfigError, match=r"model\.source_video=True.*preprocess\.members"):
        build_job(config, model_of(folder), alone, torch.device("cpu"))


def test_a_sample_that_lost_its_source_is_a_bad_one(folder):
    decode = decoder_of(manifest.read_dataset(str(folder / "dataset")), with_source=True)
    loader = ShardLoader(
        str(folder / "dataset"),
        "train",
        2,
        0,
        decode=lambda members, draw: decode({k: v for k, v in members.items() if k != "source.mp4"}, draw),
    )
    with pytest.raises(Exception, match=r"none of the \d samples can be read"):
        next(loader)
    assert "source.mp4" in next(iter(loader.bad.values()))


def test_a_source_of_another_shape_is_a_bad_one(folder):
    dataset = manifest.read_dataset(str(folder / "dataset"))
    row = manifest.read_table(str(folder / "dataset"), manifest.MANIFEST).to_pylist()[0]
    blob = (folder / "dataset" / row["shard"]).read_bytes()[row["offset"] :][: row["length"]]
    members = read_sample(blob, row["key"])
    members["source.mp4"] = video.encode(np.zeros((5, 16, 32, 3), np.uint8), 8.0)
    with pytest.raises(ContractError, match=r"source\.mp4"):
        decoder_of(dataset, with_source=True)(members, lambda count: 0)
    with pytest.raises(ContractError, match=r"source\.mp4"):
        decode(members)
