"""The base by component: real classes saved and loaded, conditions equal to those of Wan's pipeline, clear errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from wan_checkpoint import save_checkpoint

from ex4d import config
from ex4d.errors import ConfigError, ContractError
from ex4d.models import adapter, backbone, families


@pytest.fixture(scope="module")
def base(wan_folder: Path) -> backbone.Base:
    return backbone.load_base(str(wan_folder))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.rand(2, 3, 5, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def pipeline(wan_folder: Path) -> Any:
    """diffusers' own image-to-video pipeline over the same components."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    parts = backbone.load_base(str(wan_folder))
    return WanImageToVideoPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        image_encoder=parts.image_encoder,
        transformer=parts.transformer,
    )


def test_everything_is_frozen_and_where_asked(base: backbone.Base) -> None:
    for component in backbone.COMPONENTS:
        module = getattr(base, component)
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert base.transformer.dtype == torch.float32
    assert (base.stride, base.shape["out_channels"], base.has_first_frame) == ((4, 8, 8), 16, True)


def test_latents_are_the_normalised_mode(base: backbone.Base, pixels: Tensor) -> None:
    latents = base.encode_video(pixels)
    assert latents.shape == (2, *base.latent_shape((5, 32, 48, 3))[1:]) == (2, 16, 2, 4, 6)
    assert torch.equal(latents, base.encode_video(pixels))
    with torch.no_grad():
        raw = base.vae.encode(pixels).latent_dist.mode()
    mean, std = np.array(base.vae.config.latents_mean), np.array(base.vae.config.latents_std)
    slow = (raw.numpy() - mean[:, None, None, None]) / std[:, None, None, None]
    assert np.allclose(latents.numpy(), slow, atol=1e-5)
    decoded = base.decode_latents(latents)
    with torch.no_grad():
        assert torch.allclose(decoded, base.vae.decode(raw).sample.clamp(-1, 1), atol=1e-4)


def test_first_frame_condition_is_the_pipelines(base: backbone.Base, pixels: Tensor, pipeline: Any) -> None:
    ours = base.first_frame_condition(pixels[:, :, 0], num_frames=5)
    made = [
        pipeline.prepare_latents(one, 1, 16, 32, 48, 5, dtype=torch.float32, device=torch.device("cpu"))[1]
        for one in pixels[:, :, 0].split(1)
    ]
    theirs = torch.cat(made)
    assert ours is not None
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert ours[:, :4, 0].eq(1).all()
    assert not ours[:, :4, 1:].any()


def test_text_is_the_pipelines_and_padded_to_512(
    base: backbone.Base, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines.wan import pipeline_wan_i2v

    # The pipeline's own cleaning needs ftfy; its embedding does not.
    monkeypatch.setattr(pipeline_wan_i2v, "prompt_clean", pipeline_wan_i2v.whitespace_clean)
    prompts = ["a red  ball", ""]
    ours = base.encode_text(prompts)
    theirs = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=512)
    assert ours.shape == (2, 512, 32)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert ours[0, :4].abs().sum(-1).gt(0).all()
    assert not ours[0, 4:].any()
    assert torch.equal(base.encode_text(["a &amp;lt; ball"]), base.encode_text(["a < ball"]))


def test_image_features_are_of_the_last_layer_but_one(base: backbone.Base, pixels: Tensor) -> None:
    ours = base.encode_image(pixels[:, :, 0])
    square = pixels[:, :, 0, :, :32]
    features = base.encode_image(square)
    assert ours is not None
    assert ours.shape == (2, 17, 16)
    settings = base.image_settings or {}
    mean, std = (torch.tensor(settings[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        every = base.image_encoder((square * 0.5 + 0.5 - mean) / std, output_hidden_states=True).hidden_states
    assert torch.allclose(features, every[-2], atol=1e-5)
    assert not torch.allclose(features, every[-1], atol=1e-2)


@pytest.mark.parametrize(("mask_range", "low"), [("unit", -1.0), ("released", -3.0)])
def test_condition_is_colour_then_mask(base: backbone.Base, pixels: Tensor, mask_range: Any, low: float) -> None:
    visible = pixels[:, 0] > 0
    condition = base.encode_condition(pixels, visible, mask_range)
    mask = visible.float().unsqueeze(1).expand(-1, 3, -1, -1, -1) * (1 - low) + low
    assert set(mask.unique().tolist()) == {low, 1.0}
    assert torch.equal(condition[:, :16], base.encode_video(pixels))
    assert torch.allclose(condition[:, 16:], base.encode_video(mask), atol=1e-6)


def test_parts_load_alone(wan_folder: Path) -> None:
    alone = backbone.load_base(str(wan_folder), components=("transformer",), dtype="bfloat16")
    assert alone.vae is alone.text_encoder is alone.tokenizer is alone.image_encoder is None
    assert alone.transformer.patch_embedding.weight.dtype == torch.bfloat16
    assert alone.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    with pytest.raises(ContractError, match="without its vae"):
        alone.encode_video(torch.zeros(1, 3, 5, 32, 32))
    codec = backbone.load_base(str(wan_folder), components=("vae",))
    # What a base takes is known from its configuration, so encoding needs no transformer in memory.
    assert codec.first_frame_condition(torch.zeros(1, 3, 32, 32), 5) is not None
    with pytest.raises(ConfigError, match="components"):
        backbone.load_base(str(wan_folder), components=("decoder",))


def test_text_to_video_base_has_no_image_conditions(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, in_channels=16, image_dim=None, added_kv_proj_dim=None)
    base = backbone.load_base(str(folder), components=("transformer", "vae", "image_encoder"))
    assert base.encode_image(torch.zeros(1, 3, 32, 32)) is None
    assert base.first_frame_condition(torch.zeros(1, 3, 32, 32), 5) is None


def test_wan22_vae_has_16_px_latents_of_48_channels(tmp_path: Path) -> None:
    """The VAE of Wan2.2-TI2V-5B, small: real class, residual, frames cut into 2 × 2 patches first."""
    from diffusers import AutoencoderKLWan

    folder = save_checkpoint(tmp_path, in_channels=48, out_channels=48, image_dim=None, added_kv_proj_dim=None)
    shutil.rmtree(folder / "vae")
    vae: Any = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        num_res_blocks=1,
        latents_mean=[0.1] * 48,
        latents_std=[2.0] * 48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    vae.save_pretrained(folder / "vae")
    base = backbone.load_base(str(folder), components=("transformer", "vae"))
    latents = base.encode_video(torch.zeros(1, 3, 5, 64, 96))
    assert latents.shape == base.latent_shape((5, 64, 96, 3)) == (1, 48, 2, 4, 6)
    assert base.decode_latents(latents).shape == (1, 3, 5, 64, 96)
    assert base.encode_condition(torch.zeros(1, 3, 5, 64, 96), torch.ones(1, 5, 64, 96).bool()).shape[1] == 96
    model = adapter.build_model(base.transformer, backbone.ModelConfig(adapter_hidden=8))
    condition = torch.zeros(1, 96, 2, 4, 6)
    assert model(latents, torch.ones(1), torch.zeros(1, 512, 32), cond_latents=condition).shape == latents.shape
    with pytest.raises(ConfigError, match="multiples of 32"):
        base.latent_shape((5, 48, 96, 3))


@pytest.mark.parametrize(("shape", "key"), [((6, 32, 32, 3), "num_frames"), ((5, 40, 32, 3), "size")])
def test_shapes_that_do_not_fit_are_refused(base: backbone.Base, shape: tuple[int, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        base.latent_shape(shape)


def test_missing_weights_say_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"hf download Wan-AI/W --revision abc --local-dir models/W"):
        backbone.load_base("Wan-AI/W", revision="abc")
    with pytest.raises(ConfigError, match=r"transformer/config\.json is missing"):
        backbone.load_base(str(tmp_path))


def test_only_safetensors_and_text_are_fetched(monkeypatch: pytest.MonkeyPatch, wan_folder: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fetch(repo_id: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(wan_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    backbone.load_base("Wan-AI/W", revision="abc", components=("vae",))
    assert (asked["repo_id"], asked["revision"]) == ("Wan-AI/W", "abc")
    assert {pattern.partition("/")[0] for pattern in asked["allow_patterns"]} == {
        "vae",
        "transformer",
        "model_index.json",
    }
    assert "vae/*.safetensors" in asked["allow_patterns"]
    assert "transformer/*.safetensors" not in asked["allow_patterns"]


def test_damaged_folders_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(wan_folder, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ContractError, match="cannot be loaded"):
        backbone.load_base(str(folder), components=("transformer",))
    settings = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(settings | {"_class_name": "Other"}))
    with pytest.raises(ContractError, match="Other"):
        backbone.load_base(str(folder), components=("vae",))
    weights.unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ContractError, match="cannot be loaded"):
        backbone.load_base(str(folder), components=("transformer",))


def test_family_is_checked_without_weights(wan_folder: Path) -> None:
    known = backbone.transformer_config("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", family="wan2.1-i2v-14b")
    assert known["num_layers"] == 40
    with pytest.raises(ConfigError, match=r"is of the family wan2.1-i2v-14b"):
        backbone.transformer_config("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", family="wan2.1-t2v-1.3b")
    with pytest.raises(ConfigError, match="is of the family None"):
        backbone.transformer_config(str(wan_folder), family="wan2.1-t2v-1.3b")
    with pytest.raises(ConfigError, match="allowed: wan2"):
        backbone.transformer_config(str(wan_folder), family="wan9")


def test_section_model_of_the_tiny_experiment_is_valid(tmp_path: Path) -> None:
    tiny = Path(__file__).parents[2] / "configs" / "tiny.yaml"
    loaded = config.load(tiny, {"model": backbone.ModelConfig})["model"]
    assert (loaded.base, loaded.lora_alpha, loaded.quantize) == ("tiny", 16.0, None)
    (tmp_path / "bad.yaml").write_text("model: {mask_range: half}")
    with pytest.raises(ConfigError, match=r"model.mask_range='half'.*unit.*released"):
        config.load(tmp_path / "bad.yaml", {"model": backbone.ModelConfig})


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_every_family_takes_and_gives_the_shapes_of_its_latents(name: str) -> None:
    """A row of the table suffices: its published configuration runs on the meta device, from input to velocity."""
    family = families.FAMILIES[name]
    shape = dict(family.transformer) | {"num_layers": 1}
    model = adapter.build_model(backbone.meta_transformer(shape), backbone.ModelConfig(adapter_hidden=8))
    z, first = shape["out_channels"], shape["in_channels"] - shape["out_channels"]
    f, h, w = (49 - 1) // family.stride[0] + 1, 512 // family.stride[1], 512 // family.stride[2]

    def empty(*size: int) -> Tensor:
        return torch.empty(size, device="meta")

    velocity = model(
        *(empty(1, z, f, h, w), empty(1), empty(1, 512, 4096), empty(1, 257, 1280) if shape["image_dim"] else None),
        *(empty(1, first, f, h, w) if first else None, empty(1, 2 * z, f, h, w)),
    )
    assert velocity.shape == (1, z, f, h, w)
    assert first in (0, 4 + z)
    assert first or shape["image_dim"] is None, "image features come with a first frame"
    assert len(model.trainable_parameters()) == 20 + 8
    assert families.family_of(family.transformer) == name
    assert all(families.family_of_hub_id(hub_id) == name for hub_id in family.hub_ids)
