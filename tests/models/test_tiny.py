"""The small real model: its codec by hand, its folder through the loader, and the weights in the repository."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch

from ex4d.errors import ContractError
from ex4d.models import linear_codec
from ex4d.models.backbone import TINY_FOLDER, load_base
from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip


def clips(count: int, seed: int, num_frames: int = 5, size: int = 48) -> np.ndarray:
    config = SyntheticConfig(num_frames=num_frames, size=(size, size), seed=seed)
    return np.stack([render_clip(*clip_scene(config, index), config.fps)[0] for index in range(count)])


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.fixture(scope="module")
def codec() -> linear_codec.LinearVideoCodec:
    return tiny.fit_codec(clips(6, seed=11), z_dim=16, num_shared=6)


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def test_bases_are_orthonormal_and_shared_channels_agree(codec):
    for basis in (codec.frame_basis, codec.group_basis):
        torch.testing.assert_close(basis.T @ basis, torch.eye(16), atol=1e-5, rtol=0)
    still = codec.frame_basis[:, :6].repeat(4, 1) / 2
    torch.testing.assert_close(codec.group_basis[:, :6], still, atol=1e-5, rtol=0)


def test_encoding_equals_the_projection_block_by_block(codec):
    """The slow twin: cut one block out by hand and project it."""
    pixels = to_pixels(clips(1, seed=12))
    latents = codec.encode(pixels).latent_dist.mode()
    assert latents.shape == (1, 16, 2, 6, 6)
    first = pixels[0, :, 0, 8:16, 24:32].reshape(-1)
    torch.testing.assert_close(latents[0, :, 0, 1, 3], (first - codec.frame_mean) @ codec.frame_basis)
    group = pixels[0, :, 1:5, 16:24, 0:8].permute(1, 0, 2, 3).reshape(-1)
    torch.testing.assert_close(latents[0, :, 1, 2, 0], (group - codec.group_mean) @ codec.group_basis / 2)


def test_decoding_is_the_best_linear_inverse(codec):
    pixels = to_pixels(clips(2, seed=13))
    latents = codec.encode(pixels).latent_dist.mode()
    decoded = codec.decode(latents).sample
    assert decoded.shape == pixels.shape
    torch.testing.assert_close(codec.encode(decoded).latent_dist.mode(), latents, atol=1e-4, rtol=0)
    error = (decoded - pixels).square().mean()
    for _ in range(3):
        nearby = codec.decode(latents + 0.05 * torch.randn_like(latents)).sample
        assert (nearby - pixels).square().mean() > error


def test_the_codec_is_causal(codec):
    pixels = to_pixels(clips(1, seed=14, num_frames=9))
    changed = pixels.clone()
    changed[:, :, 5:] = 0
    before, after = (codec.encode(value).latent_dist.mode() for value in (pixels, changed))
    torch.testing.assert_close(before[:, :, :2], after[:, :, :2], atol=0, rtol=0)
    assert (before[:, :, 2] - after[:, :, 2]).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 5, 12, 16), (3, 5, 16, 16)])
def test_pixels_that_do_not_fit_are_refused(codec, shape):
    with pytest.raises(ContractError, match=r"4k \+ 1"):
        codec.encode(torch.zeros(shape))


def test_codec_and_folder_survive_saving(codec, tmp_path):
    tiny.build_tiny(tmp_path, codec, tiny.new_transformer(16, num_layers=1), half=False)
    loaded = load_base(str(tmp_path))
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"] == "LinearVideoCodec"
    for name, value in codec.state_dict().items():
        torch.testing.assert_close(loaded.vae.state_dict()[name], value, atol=0, rtol=0)
    pixels = to_pixels(clips(1, seed=15))
    latents = loaded.encode_video(pixels)
    torch.testing.assert_close(
        loaded.decode_latents(latents), codec.decode(codec.encode(pixels)[0].mode()).sample.clamp(-1, 1)
    )


def test_building_twice_gives_the_same_bytes(codec, tmp_path):
    for name in ("a", "b"):
        tiny.build_tiny(tmp_path / name, codec, tiny.new_transformer(16, num_layers=1))
    files = [path for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    assert len(files) >= 10
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_repository_weights_are_small_and_of_the_real_classes(base):
    size = sum(path.stat().st_size for path in TINY_FOLDER.rglob("*") if path.is_file())
    assert size <= 10_000_000
    assert type(base.transformer).__name__ == "WanTransformer3DModel"
    assert base.transformer.config.in_channels == 2 * base.shape["out_channels"] + 4
    assert base.transformer.config.image_dim == tiny.IMAGE_DIM
    assert all(block.attn2.add_k_proj is not None for block in base.transformer.blocks)
    assert type(base.text_encoder).__name__ == "UMT5EncoderModel"
    assert type(base.image_encoder).__name__ == "CLIPVisionModel"


def test_repository_codec_reaches_its_ceiling_on_held_out_clips(base):
    pixels = to_pixels(clips(6, seed=31, num_frames=9, size=96))
    assert psnr(base.decode_latents(base.encode_video(pixels)), pixels) > 25.5  # measured 26.2


def test_captions_and_pictures_have_features_of_their_own(base):
    first, second, empty = base.encode_text(["a red sphere in a room", "a blue box in a room", ""])
    assert first.shape == (512, tiny.TEXT_DIM)
    assert (first - second).abs().max() > 0.1
    assert empty[1:].abs().max() == 0
    assert base.tokenizer("a purple box under the sky").input_ids.count(base.tokenizer.unk_token_id) == 0
    features = base.encode_image(to_pixels(clips(2, seed=16))[:, :, 0])
    assert features.shape[0] == 2
    assert (features[0] - features[1]).abs().max() > 0.05


def test_the_trained_base_denoises_far_better_than_an_untrained_one(base):
    """On held-out clips, given the first frame: one velocity at sigma 0.5 against the true one."""
    pixels = to_pixels(clips(4, seed=32, num_frames=9, size=96))
    latents = base.encode_video(pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    hidden = torch.cat([0.5 * latents + 0.5 * noise, base.first_frame_condition(pixels[:, :, 0], 9)], dim=1)
    text, image = base.encode_text([""] * 4), base.encode_image(pixels[:, :, 0])
    errors = []
    for transformer in (base.transformer, tiny.new_transformer(base.shape["out_channels"])):
        with torch.no_grad():
            velocity = transformer(hidden, torch.full((4,), 500.0), text, image, return_dict=False)[0]
        errors.append(float((velocity - (noise - latents)).square().mean()))
    assert errors[0] < 0.35 * errors[1]
