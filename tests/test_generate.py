"""`ex4d generate`: a video, a path and an adapter in; a video, its condition and a record out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from ex4d import generate, synthetic, video
from ex4d.errors import BadSample
from ex4d.evaluate.metrics import psnr
from ex4d.models.encoders import Base
from pipelines import cli

WORLD = synthetic.SyntheticConfig(num_videos=1, num_frames=5, size=(64, 64), seed=8, camera_motion="static")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return synthetic.write_corpus(tmp_path_factory.mktemp("clip"), WORLD)[0]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    """Untrained adapters of the tiny base, one per mask range."""
    from ex4d.models import backbone, weights
    from ex4d.models.adapter import build_model
    from ex4d.models.encoders import base_fingerprint

    base = backbone.load_base("tiny", components=("transformer",))
    fingerprint = base_fingerprint(base.transformer)
    config = backbone.ModelConfig(lora_rank=2, lora_alpha=2.0, adapter_hidden=16)
    model = build_model(base.transformer, config)
    made = weights.AdapterMetadata("tiny", None, fingerprint, 2, 2.0, 16, num_frames=5, size=(64, 64))
    folders = {}
    for mask_range in ("unit", "released"):
        folders[mask_range] = str(tmp_path_factory.mktemp(mask_range))
        weights.save_adapter(folders[mask_range], model, replace(made, mask_range=mask_range))
    return folders


def run(clip, adapter: str, output, *flags: str) -> dict:
    argv = ["generate", "--video", str(clip), "--adapter", adapter, "--output", str(output)]
    assert cli.main([*argv, "--num-inference-steps", "2", "--guidance-scale", "1", "--device", "cpu", *flags]) == 0
    return json.loads(output.with_suffix(".json").read_text())


def test_a_view_is_written_with_all_that_repeats_it(clip, adapters, tmp_path):
    flags = ("--trajectory", "zoom", "-t", "zoom=1.5", "--seed", "4")
    first, second = (run(clip, adapters["unit"], tmp_path / name, *flags) for name in ("a.mp4", "b.mp4"))
    assert first == second
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    frames, fps = video.read(tmp_path / "a.mp4")
    assert (frames.shape, fps) == ((5, 64, 64, 3), WORLD.fps)
    assert video.read(tmp_path / "a.cond.mp4")[0].shape == video.read(tmp_path / "a.mask.mp4")[0].shape == frames.shape
    assert (first["trajectory"], first["trajectory_options"], first["seed"]) == ("zoom", {"zoom": 1.5}, 4)
    K = np.array(first["K"])
    assert K[-1, 0, 0] / K[0, 0, 0] == pytest.approx(1.5)
    assert (first["depth"]["estimator"], first["profile"]) == ("sidecar", "default")
    other = run(clip, adapters["unit"], tmp_path / "c.mp4", *flags[:-1], "5")
    assert other["seed"] == 5
    assert (tmp_path / "c.mp4").read_bytes() != (tmp_path / "a.mp4").read_bytes()


def test_a_view_keeps_the_sound_of_its_source(clip, adapters, tmp_path):
    frames, fps = video.read(clip)
    shutil.copy(clip.with_suffix(".depth.npz"), tmp_path / "loud.depth.npz")
    with av.open(str(tmp_path / "loud.mp4"), "w") as container:
        shown, heard = container.add_stream("libx264", rate=int(fps)), container.add_stream("aac", rate=48000)
        shown.height, shown.width, shown.pix_fmt = 64, 64, "yuv420p"
        for image in frames:
            container.mux(shown.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        wave = np.sin(np.arange(round(48000 * len(frames) / fps)) / 20).astype(np.float32)[None]
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        sound.sample_rate = 48000
        container.mux(heard.encode(sound))
        container.mux([*shown.encode(None), *heard.encode(None)])
    record = run(tmp_path / "loud.mp4", adapters["unit"], tmp_path / "view.mp4")
    assert record["seed"] == 0
    with av.open(str(tmp_path / "view.mp4")) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert abs(len(samples) / 48000 - len(frames) / fps) < 0.1
    assert samples.std() > 0.3
    assert video.read(tmp_path / "view.mp4")[0].shape == frames.shape
    with av.open(str(tmp_path / "view.mask.mp4")) as container:
        assert not container.streams.audio


def test_several_paths_share_one_depth_pass_and_one_model(clip, adapters, tmp_path, monkeypatch):
    from ex4d import depth
    from ex4d.geometry.render import nvdiffrast

    order: list = []
    load, estimate, release = generate.load, depth.estimate, depth.release
    monkeypatch.setattr(generate, "load", lambda *args: order.append("load") or load(*args))
    monkeypatch.setattr(depth, "estimate", lambda *args: order.append("depth") or estimate(*args))
    monkeypatch.setattr(depth, "release", lambda: order.append("release") or release())
    monkeypatch.setattr(nvdiffrast, "release", lambda: order.append("release"))
    flags = ("--trajectory", "orbit", "--angle-deg", "20", "--also", "left:30", "--also", "dolly")
    run(clip, adapters["unit"], tmp_path / "a.mp4", *flags)
    assert order == ["depth", "release", "release", "load"]
    record = run(clip, adapters["unit"], tmp_path / "one.mp4", "--trajectory", "left", "--angle-deg", "30")
    for end in ("mp4", "cond.mp4"):
        assert (tmp_path / f"a.left-30.{end}").read_bytes() == (tmp_path / f"one.{end}").read_bytes()
    assert json.loads((tmp_path / "a.left-30.json").read_text()) == record
    assert len({(tmp_path / f"a{name}.cond.mp4").read_bytes() for name in ("", ".left-30", ".dolly")}) == 3


def test_guidance_between_equal_prompts_costs_nothing_and_changes_nothing(clip, adapters, tmp_path, monkeypatch):
    from ex4d.models.adapter import Ex4dModel

    calls = []
    forward = Ex4dModel.forward
    monkeypatch.setattr(Ex4dModel, "forward", lambda *args, **more: calls.append(1) or forward(*args, **more))
    for name, flags in (("one.mp4", ()), ("five.mp4", ("--guidance-scale", "5"))):
        run(clip, adapters["unit"], tmp_path / name, *flags)
    assert len(calls) == 4
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "five.mp4").read_bytes()
    run(clip, adapters["unit"], tmp_path / "told.mp4", "--guidance-scale", "5", "--prompt", "a room")
    assert len(calls) == 8


def test_equal_prompts_are_warned_of(clip, adapters, tmp_path, caplog):
    run(clip, adapters["unit"], tmp_path / "five.mp4", "--guidance-scale", "5")
    assert "guidance_scale=5 has no effect" in caplog.text
    caplog.clear()
    run(clip, adapters["unit"], tmp_path / "one.mp4")
    assert "has no effect" not in caplog.text


def test_more_loras_are_stacked_by_their_scale(clip, adapters, tmp_path):
    from ex4d.models import weights

    state, _ = weights.read_adapter(adapters["unit"])
    generator = torch.Generator().manual_seed(3)
    names = [name for name in state if ".lora_" in name]
    loras = {name: torch.randn(state[name].shape, generator=generator) * 0.1 for name in names}
    made = {}
    for style in ("diffusers", "comfyui", "kohya"):
        weights.write_lora(tmp_path / f"{style}.safetensors", loras, style, 2.0)
        for scale in ("", ":0.5", ":0"):
            run(clip, adapters["unit"], tmp_path / "a.mp4", "--lora", f"{tmp_path / style}.safetensors{scale}")
            made[style, scale] = (tmp_path / "a.mp4").read_bytes()
    plain = tmp_path / "plain.mp4"
    run(clip, adapters["unit"], plain)
    for style in ("diffusers", "comfyui", "kohya"):
        assert made[style, ":0"] == plain.read_bytes() != made[style, ""]
        assert made[style, ""] == made["diffusers", ""], "the same LoRA under other names"
        assert made[style, ""] != made[style, ":0.5"]
    half = f"{tmp_path}/diffusers.safetensors:0.5"
    run(clip, adapters["unit"], tmp_path / "twice.mp4", "--lora", half, "--lora", half)
    assert psnr(video.read(tmp_path / "twice.mp4")[0], video.read(made["diffusers", ""])[0]) > 40


def test_a_longer_video_in_windows(adapters, tmp_path):
    world = replace(WORLD, num_frames=17)
    clip = synthetic.write_corpus(tmp_path / "clip", world)[0]
    flags = ("--num-frames", "17", "--window-frames", "9", "--window-overlap", "4")
    run(clip, adapters["unit"], tmp_path / "long.mp4", *flags)
    assert video.read(tmp_path / "long.mp4")[0].shape == (17, 64, 64, 3)
    run(clip, adapters["unit"], tmp_path / "whole.mp4", "--num-frames", "17")
    run(
        clip,
        adapters["unit"],
        tmp_path / "one.mp4",
        "--num-frames",
        "17",
        "--window-frames",
        "17",
        "--window-overlap",
        "4",
    )
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert (tmp_path / "long.mp4").read_bytes() != (tmp_path / "whole.mp4").read_bytes()


def test_the_video_is_read_before_a_model_is_loaded(clip, adapters, monkeypatch):
    loaded: list = []
    monkeypatch.setattr(generate, "load", lambda *args: loaded.append(args))
    with pytest.raises(BadSample, match="frames"):
        generate.novel_view(clip, adapters["unit"], device="cpu", num_frames=9)
    assert not loaded


def test_a_small_gpu_s_ways_give_the_same_video_or_nearly(clip, adapters, tmp_path):
    """On a CPU, swapping blocks makes copies, and moving components does nothing."""
    made = {}
    ways = {"plain": (), "swap": ("--block-swap", "2"), "offload": ("--offload",), "int8": ("--quantize", "int8")}
    ways |= {"all": ("--quantize", "nf4", "--block-swap", "1", "--offload"), "nf4": ("--quantize", "nf4")}
    for name, flags in ways.items():
        run(clip, adapters["unit"], tmp_path / f"{name}.mp4", *flags)
        made[name] = (tmp_path / f"{name}.mp4").read_bytes()
    assert made["plain"] == made["swap"] == made["offload"]
    assert made["all"] == made["nf4"] != made["plain"]
    frames = {name: video.read(data)[0] for name, data in made.items()}
    assert psnr(frames["plain"], frames["int8"]) > 30
    assert psnr(frames["plain"], frames["int8"]) > psnr(frames["plain"], frames["nf4"]) > 20


def test_with_offload_one_component_alone_is_on_the_device():
    class Component:
        place = "cpu"

        def to(self, device) -> None:
            self.place = str(device)

    parts = {name: Component() for name in ("transformer", "vae", "text_encoder", "image_encoder")}
    base = Base("fake", None, torch.device("meta"), {}, **parts, offload=True)
    for name in ("vae", "text_encoder", "vae", "transformer"):
        assert base.bring(name) is parts[name]
        assert [n for n, part in parts.items() if part.place == "meta"] == [name]
    still = Base("fake", None, torch.device("meta"), {}, **{name: Component() for name in parts})
    assert still.bring("vae").place == "cpu", "without offload nothing is moved"


def test_components_that_really_move_can_be_compared_with_the_base_alone(adapters, monkeypatch):
    """On a GPU every move makes new tensors, also within inference: here each move copies."""
    move = torch.nn.Module.to

    def copied(module, *args, **more):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
        return move(module, *args, **more)

    config = generate.GenerateConfig(num_inference_steps=1, guidance_scale=1.0, offload=True)
    base, model = generate.load(adapters["unit"], config=config)
    monkeypatch.setattr(torch.nn.Module, "to", copied)
    frames, visible = np.zeros((5, 64, 64, 3), np.uint8), np.ones((5, 64, 64), bool)
    first = generate.generate(base, model, frames, visible, config, 0)
    with model.base_alone():
        alone = generate.generate(base, model, frames, visible, config, 0)
    np.testing.assert_array_equal(first, alone)  # the adapter is untrained


def test_an_adapter_of_released_masks_gets_released_meshes(clip, adapters, tmp_path):
    assert run(clip, adapters["released"], tmp_path / "r.mp4")["profile"] == "released"
    assert run(clip, adapters["released"], tmp_path / "t.mp4", "--profile", "torn")["profile"] == "torn"


@pytest.mark.parametrize(
    ("flags", "status", "named"),
    [
        (("--trajectory", "sideways"), 2, "trajectory"),
        (("--also", "sideways"), 2, "trajectory"),
        (("--also", "left:far"), 2, "DEGREES"),
        (("--also", "zoom:3"), 2, "zoom has no angle"),
        (("--source-scale", "2"), 2, "source_scale"),
        (("--also", "left", "--also", "left"), 2, "once"),
        (("--profile", "woven"), 2, "profile"),
        (("--angle-deg", "nan"), 2, "angle_deg"),
        (("--guidance-scale", "nan"), 2, "guidance_scale"),
        (("--shift", "0"), 2, "shift"),
        (("--erosion-px", "-3"), 2, "erosion"),
        (("--num-frames", "6"), 2, "num_frames"),
        (("--size", "60x64"), 2, "size"),
        (("--source-poses", "none.json"), 2, "none.json"),
        (("--num-frames", "9"), 1, "too_short"),
        (("--block-swap", "-1"), 2, "block_swap"),
        (("--block-swap", "99"), 2, "block_swap"),
        (("--lora", "nothing.safetensors:0.5"), 2, "lora"),
        (("--lora", f"high:{__file__}"), 2, "does not have two experts"),
        (("--window-frames", "9", "--window-overlap", "12"), 2, "window_overlap"),
        (("--window-frames", "10"), 2, "window_frames"),
        (("--window-frames", "49", "--window-overlap", "10"), 2, "window_overlap"),
    ],
)
def test_what_cannot_be_done_is_named(clip, adapters, tmp_path, capsys, flags, status, named):
    argv = ["generate", "--video", str(clip), "--adapter", adapters["unit"], "--output", str(tmp_path / "a.mp4")]
    assert cli.main([*argv, *flags]) == status
    assert named in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()


def test_a_hostile_video_is_named(adapters, tmp_path, capsys):
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    argv = ["generate", "--video", str(tmp_path / "noise.mp4"), "--adapter", adapters["unit"]]
    assert cli.main([*argv, "--output", str(tmp_path / "a.mp4")]) == 1
    assert "noise.mp4" in capsys.readouterr().err
