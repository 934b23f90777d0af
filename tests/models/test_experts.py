"""Bases with two experts: which one is loaded and trained, the switch between them, and their two adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from wan_checkpoint import TRANSFORMER, save_checkpoint

from ex4d import flow, generate
from ex4d.errors import ConfigError, ContractError
from ex4d.generate_config import GenerateConfig
from ex4d.models import adapter, backbone, encoders, experts, weights
from ex4d.models.export import export
from ex4d.train import estimate
from pipelines import cli

STEPS, SHIFT = 8, 5.0
HUB_ID = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
SHAPE = backbone.ModelConfig(lora_rank=2, lora_alpha=2.0, adapter_hidden=8)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' own pipeline of two experts, with the sigmas of our sampler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanTransformer3DModel

    class Scheduler(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(sigmas=torch.linspace(1, 0, num_inference_steps + 1)[:-1].tolist(), device=device)

    without_clip = {"image_dim": None, "added_kv_proj_dim": None}
    parts = backbone.load_base(str(save_checkpoint(tmp_path_factory.mktemp("parts"), **without_clip)))
    torch.manual_seed(1)
    second: Any = WanTransformer3DModel(**(TRANSFORMER | without_clip))
    return WanImageToVideoPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        scheduler=Scheduler(shift=SHIFT),
        transformer=parts.transformer,
        transformer_2=second.eval(),
        boundary_ratio=0.9,
    )


@pytest.fixture(scope="module")
def folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, as diffusers saves it."""
    path = tmp_path_factory.mktemp("a14b") / "base"
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two adapters with random weights, as two trainings write them."""
    out = tmp_path_factory.mktemp("run")
    for index, expert in enumerate(experts.EXPERTS):
        base = backbone.load_base(str(folder), components=("transformer",), expert=expert)
        model = adapter.build_model(base.transformer, SHAPE)
        generator = torch.Generator().manual_seed(index)
        state = {n: torch.randn(v.shape, generator=generator) * 0.1 for n, v in weights.adapter_state(model).items()}
        metadata = weights.AdapterMetadata(
            *(str(folder), None, encoders.base_fingerprint(base.transformer), 2, 2.0, 8),
            num_frames=5,
            size=(32, 32),
            expert=expert,
        )
        weights.save_adapter(out / expert / ("adapter" if index else ""), state, metadata)
    return out


def view(seed: int = 3) -> tuple[Any, Any]:
    """Return a random condition video and its mask."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (5, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    visible = (torch.rand(5, 32, 32, generator=generator) > 0.3).numpy()
    visible[0] = True
    return frames, visible


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_both_experts_are_sampled_as_by_diffusers_pipeline(pipeline: Any, folder: Path, scale: float) -> None:
    frames, _ = view()
    image = torch.from_numpy(frames[0]).permute(2, 0, 1)[None] / 255
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    base, model = untrained(folder)
    theirs = pipeline(
        image=image,
        prompt_embeds=base.encode_text(["a red ball"]),  # its own cleaning of prompts needs ftfy
        negative_prompt_embeds=base.encode_text(["rolls"]),
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise,
        output_type="latent",
    ).frames
    first = base.first_frame_condition(generate.to_pixels(frames[:1])[:, :, 0], 5)
    calls: list[str] = []
    for name in experts.EXPERTS:
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))

    def velocity(prompt: str) -> flow.VelocityFn:
        embeds = base.encode_text([prompt])
        return lambda latents, timestep: model(latents, timestep, embeds, None, first)

    with torch.inference_mode():
        ours = flow.sample(velocity("a red ball"), noise, flow.sigmas(STEPS, SHIFT), scale, velocity("rolls"))
    assert (ours - theirs).abs().max() <= 1e-5
    at = flow.sigmas(STEPS, SHIFT)[:-1]
    high = int((at >= 0.9).sum())
    assert 0 < high < STEPS
    times = 1 if scale == 1.0 else 2
    assert calls == ["high"] * high * times + ["low"] * (STEPS - high) * times


def untrained(folder: Path) -> tuple[Any, Any]:
    base = backbone.load_base(str(folder), expert="high")
    base.transformer_2 = backbone.load_base(str(folder), components=("transformer",), expert="low").transformer
    parts = (base.transformer, base.transformer_2)
    boundary = experts.boundary(str(folder))
    assert boundary == 0.9
    return base, experts.Experts(base, *(adapter.build_model(part, SHAPE) for part in parts), boundary)


def test_each_expert_is_loaded_by_name_and_told_apart(folder: Path, pipeline: Any) -> None:
    found = {e: backbone.load_base(str(folder), components=("transformer",), expert=e) for e in ("high", "low")}
    for part, theirs in zip(found.values(), (pipeline.transformer, pipeline.transformer_2), strict=True):
        state = part.transformer.state_dict()
        assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    assert len({encoders.base_fingerprint(part.transformer) for part in found.values()}) == 2


def test_a_video_from_two_adapters_is_the_same_however_the_memory_is_used(adapters: Path) -> None:
    made = {}
    ways: dict[str, dict[str, Any]] = {"plain": {}, "offload": {"offload": True}, "swap": {"block_swap": 2}}
    ways["all"] = {"offload": True, "quantize": "int8"}
    for name, values in ways.items():
        config = GenerateConfig(num_inference_steps=4, guidance_scale=1.0, **values)
        base, model = generate.load(adapters, device="cpu", config=config)
        made[name] = generate.generate(base, model, *view(), config, 0)
    assert (made["plain"] == made["offload"]).all()
    assert (made["plain"] == made["swap"]).all()
    assert (made["plain"] != made["all"]).any()


def test_each_adapter_acts_where_its_expert_works(adapters: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = GenerateConfig(num_inference_steps=4, guidance_scale=1.0)
    made = {}
    for name, path in {"both": adapters, "high": adapters / "high", "low": adapters / "low" / "adapter"}.items():
        base, model = generate.load(path, device="cpu", config=config)
        made[name] = generate.generate(base, model, *view(), config, 0)
        with model.base_alone():
            made[f"{name} alone"] = generate.generate(base, model, *view(), config, 0)
    assert "no adapter for the expert low" in caplog.text
    assert "no adapter for the expert high" in caplog.text
    assert (made["both alone"] == made["high alone"]).all()
    assert (made["both alone"] == made["low alone"]).all()
    different = [made[name].tobytes() for name in ("both", "high", "low", "both alone")]
    assert len(set(different)) == 4


def test_with_offload_one_expert_alone_is_on_the_device(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GenerateConfig(num_inference_steps=4, guidance_scale=1.0, offload=True)
    base, model = generate.load(adapters, device="cpu", config=config)
    moves: list[str] = []
    monkeypatch.setattr(base, "bring", lambda name: [moves.append(name), getattr(base, name)][1])
    generate.generate(base, model, *view(), config, 0)
    sampling = moves[moves.index("transformer") : -1]
    assert sampling[0] == "transformer"
    assert sampling[-1] == "transformer_2"
    assert sampling == sorted(sampling), "one switch, from high to low"


def test_more_loras_go_to_the_expert_that_is_named(adapters: Path, tmp_path: Path) -> None:
    state, _ = weights.read_adapter(adapters / "high")
    loras = {name: value for name, value in state.items() if ".lora_" in name}
    weights.write_lora(tmp_path / "fast.safetensors", loras, "comfyui", 2.0)
    made = {}
    for where in ("", "high:", "low:"):
        config = GenerateConfig(
            num_inference_steps=4, guidance_scale=1.0, lora=(f"{where}{tmp_path}/fast.safetensors",)
        )
        base, model = generate.load(adapters, device="cpu", config=config)
        made[where] = generate.generate(base, model, *view(), config, 0).tobytes()
    assert len(set(made.values())) == 3


@pytest.mark.parametrize("style", ["kohya", "comfyui", "diffusers"])
def test_two_files_go_out_by_comfyui_s_names_and_come_back_bit_equal(
    style: str, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine.safetensors"
    assert cli.main(["export", str(adapters), "--style", style, "--output", str(output)]) == 0
    names = [tmp_path / "mine_high_noise.safetensors", tmp_path / "mine_low_noise.safetensors"]
    assert capsys.readouterr().out.split() == [str(name) for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(name.name for name in names)
    blank = tmp_path / "blank"
    for expert, (file, metadata) in experts.read(adapters).items():
        zeroed = {n: v if "geometry" in n else v * 0 for n, v in weights.read_adapter(file)[0].items()}
        weights.save_adapter(blank / str(expert), zeroed, metadata)
    again = ["export", str(blank), "--from", str(output), "--style", "ex4d", "--output", str(tmp_path / "back")]
    assert cli.main(again) == 0
    for expert, (file, metadata) in experts.read(adapters).items():
        back, found = weights.read_adapter(tmp_path / "back" / str(expert))
        state, _ = weights.read_adapter(file)
        assert found == metadata
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)


def test_what_does_not_belong_together_is_refused(adapters: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "high", tmp_path / "high")
    shutil.copytree(adapters / "high", tmp_path / "low")
    with pytest.raises(ContractError, match="of the expert high, not of low"):
        experts.read(tmp_path)
    state, metadata = weights.read_adapter(adapters / "low" / "adapter")
    weights.save_adapter(tmp_path / "low", state, replace(metadata, mask_range="released"))
    with pytest.raises(ContractError, match="different mask_range: unit and released"):
        experts.read(tmp_path)
    with pytest.raises(ConfigError, match="has one transformer, but the adapter was trained on two experts"):
        generate.load(adapters, base="tiny", device="cpu")
    weights.save_adapter(tmp_path / "one", state, replace(metadata, expert=None))
    with pytest.raises(ConfigError, match="has two experts, but the adapter was trained on a base of one"):
        generate.load(tmp_path / "one", device="cpu")
    with pytest.raises(ConfigError, match=r"Wan2\.1"):
        export(adapters, "released", tmp_path / "x.ckpt")
    assert json.loads((folder / "model_index.json").read_text())["boundary_ratio"] == 0.9


@pytest.mark.parametrize(("ratio", "fits"), [(None, False), (0, False), ("0.9", False), (0.875, True)])
def test_the_boundary_is_read_from_the_base(folder: Path, tmp_path: Path, ratio: Any, fits: bool) -> None:
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
    shutil.copy(folder / "transformer" / "config.json", tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": ratio}))
    if not fits:
        with pytest.raises(ContractError, match="boundary_ratio is"):
            experts.boundary(str(tmp_path))
        return
    assert experts.boundary(str(tmp_path)) == ratio
    assert experts.timesteps(str(tmp_path), None, "low") == (0.0, 875.0)


def test_an_expert_is_named_where_there_are_two_and_only_there(folder: Path) -> None:
    assert experts.boundary(HUB_ID) == 0.9
    assert experts.timesteps(HUB_ID, None, "high") == (900.0, float("inf"))
    for base in (HUB_ID, str(folder)):
        with pytest.raises(ConfigError, match=r"train.expert.*must be high .*0\.9.* or low"):
            experts.timesteps(base, None, None)
    with pytest.raises(ConfigError, match=r"train.expert=.*must be null: tiny has one transformer"):
        experts.timesteps("tiny", None, "low")


@pytest.mark.parametrize("law", list(flow.TIMESTEP_SAMPLING))
def test_an_expert_s_noise_follows_the_law_within_its_range(law: str) -> None:
    """Redrawing gives the distribution conditioned on the range, compared with draws over all timesteps."""
    generator = flow.generator_for(3, law)
    whole = [flow.draw_sigma(law, generator) for _ in range(3000)]
    for ends, wanted in (((900.0, float("inf")), lambda s: s * 1000 >= 900), ((0.0, 900.0), lambda s: s * 1000 < 900)):
        part = [flow.draw_sigma(law, generator, timesteps=ends) for _ in range(1500)]
        assert all(wanted(float(sigma)) for sigma, _ in part)
        slow = [(float(s), float(w)) for s, w in whole if wanted(float(s))]
        for index in (0, 1):
            column = torch.tensor([float(pair[index]) for pair in part])
            other = torch.tensor([pair[index] for pair in slow])
            assert abs(float(column.mean() - other.mean())) < 5 * float(other.std()) / len(other) ** 0.5 + 1e-6


def test_a_dry_run_counts_one_expert() -> None:
    shape = backbone.transformer_config(HUB_ID, family="wan2.2-i2v-a14b")
    counted = estimate.count_parameters(shape, backbone.ModelConfig())
    assert counted["base"] == 14_288_901_184
    assert counted["lora"] == 76_677_120
