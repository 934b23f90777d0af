"""DepthCrafter through the real `from_pretrained`, offline, on a tiny checkpoint written by the real classes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_svd

from ex4d import hub
from ex4d.depth import DepthRequest, depthcrafter, depthcrafter_weights, estimate
from ex4d.errors import BadSample, ConfigError, ContractError


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return tiny_svd.save(tmp_path_factory.mktemp("depthcrafter"))


def networks_of(weights: str) -> depthcrafter_weights.Networks:
    """Return the networks that `estimate` uses."""
    return depthcrafter_weights.load(weights, "cpu")


def pictures(num_frames: int = 3, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    import cv2

    noise = np.random.default_rng(0).uniform(0, 255, (8, 8, 3)).astype(np.float32)
    picture = np.clip(cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, 3 * shift, axis=1) for shift in range(num_frames)])


def test_a_clip_becomes_disparity_of_its_size(weights, caplog):
    hub.say_licence.cache_clear()
    depthcrafter_weights._load.cache_clear()
    with caplog.at_level(logging.WARNING):
        first, second, other = (
            estimate("depthcrafter", pictures(3, (40, 72)), DepthRequest(depth_path=weights, seed=seed))
            for seed in (0, 0, 1)
        )
    assert (first.kind, first.metric, first.K) == ("disparity", False, None)
    assert first.values.shape == (3, 40, 72)
    assert 0 <= first.values.min() < first.values.max() <= 1
    assert first.values.tobytes() == second.values.tobytes() != other.values.tobytes()
    assert len(first.provenance["weights_sha256"].split("+")) == 3
    assert "no commercial use" in first.provenance["licence"]
    assert sum("no commercial use" in record.message for record in caplog.records) == 1
    json.dumps(first.provenance)


def slow_windows(step, noise: np.ndarray, num_frames: int, window: int, overlap: int, scale: float, sigma: float):
    """The windows of the published tool, frame by frame: which noise, which start, which weight each frame gets."""
    done: list[np.ndarray] = []
    order = list(range(window))  # which noise frame is at which position of this window
    start = 0
    while start == 0 or start < num_frames - overlap:
        count = min(window, num_frames - start)
        latents = [noise[order[k]] * scale for k in range(count)]
        if start:
            for k in range(overlap):
                latents[k] = done[start + k] + noise[order[k]] * sigma
        found = step(np.stack(latents), start)
        for k in range(count):
            if start and k < overlap:
                weight = k / (overlap - 1)
                done[start + k] = weight * found[k] + (1 - weight) * done[start + k]
            else:
                done.append(found[k])
        order = order[window - overlap :] + order[: window - overlap]
        start += window - overlap
        if num_frames <= window:
            break
    return np.stack(done)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 10, 15, 16, 17, 22, 30])
def test_windows_and_their_overlap_equal_the_slow_twin(monkeypatch, num_frames):
    import torch

    monkeypatch.setattr(depthcrafter, "OVERLAP", 3)
    window = min(9, num_frames)
    noise = np.random.default_rng(num_frames).standard_normal((window, 2, 2))
    calls = []

    def step(latents, start):
        calls.append((start, len(latents)))
        return latents * 0.5 + np.arange(start, start + len(latents))[:, None, None] + 0.1 * start

    def torch_step(latents, start):
        return torch.from_numpy(step(latents.numpy(), start))

    fast = depthcrafter.in_windows(torch_step, torch.from_numpy(noise), num_frames, 7.0, 4.0).numpy()
    covered = {frame for start, count in calls for frame in range(start, start + count)}
    assert covered == set(range(num_frames))
    calls_fast, calls[:] = list(calls), []
    slow = slow_windows(step, noise, num_frames, window, 3, 7.0, 4.0)
    assert calls == calls_fast
    np.testing.assert_allclose(fast, slow, atol=1e-12)


def test_a_long_clip_is_sampled_as_euler_says(weights, monkeypatch):
    """The whole denoising against a slow twin with the sampler's formulas, in windows of 4 that overlap by 2."""
    import torch

    monkeypatch.setattr(depthcrafter, "WINDOW", 4)
    monkeypatch.setattr(depthcrafter, "OVERLAP", 2)
    networks = networks_of(weights)
    random = torch.Generator().manual_seed(3)
    condition, embeddings = torch.randn(7, 4, 8, 8, generator=random), torch.randn(7, 1, 16, generator=random)
    with torch.inference_mode():
        fast = depthcrafter.denoise(networks, condition, embeddings, torch.Generator().manual_seed(5))
    noise = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    ramp = np.linspace(700 ** (1 / 7), 0.002 ** (1 / 7), 5) ** 7  # Karras et al. 2022, eq. 5
    sigmas = np.append(ramp, 0.0)
    time_ids = torch.tensor([[7, 127, 0.02]])

    def step(latents, start):
        x, span = torch.from_numpy(latents).float(), slice(start, start + len(latents))
        for sigma, after in itertools.pairwise(sigmas):
            seen = torch.cat([x / (sigma**2 + 1) ** 0.5, condition[span]], 1)[None].float()
            with torch.inference_mode(), depthcrafter.one_embedding_a_frame(networks.unet, embeddings[span]):
                time = torch.tensor(0.25 * np.log(sigma), dtype=torch.float32)
                velocity = networks.unet(seen, time, embeddings[span][:1], time_ids).sample[0]
            clean = x / (sigma**2 + 1) - velocity * sigma / (sigma**2 + 1) ** 0.5
            x = x + (x - clean) / sigma * (after - sigma)
        return x.numpy().astype(np.float64)

    slow = slow_windows(step, noise.double().numpy(), 7, 4, 2, (700**2 + 1) ** 0.5, 700.0)
    np.testing.assert_allclose(fast.numpy(), slow, rtol=1e-3, atol=1e-3 * np.abs(slow).max())


def test_each_frame_has_its_own_embedding(weights):
    import torch

    unet = networks_of(weights).unet
    random = torch.Generator().manual_seed(0)
    sample, time_ids = torch.randn(1, 3, 8, 8, 8, generator=random), torch.tensor([[7.0, 127.0, 0.02]])
    embeddings = torch.randn(1, 1, 16, generator=random).repeat(3, 1, 1)

    def run(values):
        with torch.inference_mode(), depthcrafter.one_embedding_a_frame(unet, values):
            return unet(sample, torch.tensor(1.5), values[:1], time_ids).sample

    with torch.inference_mode():
        plain = unet(sample, torch.tensor(1.5), embeddings[:1], time_ids).sample
    torch.testing.assert_close(run(embeddings), plain)
    changed = embeddings.clone()
    changed[2] += 5
    assert (run(changed) - plain)[0, 2].abs().max() > 1e-4
    with torch.inference_mode():  # nothing is left behind
        torch.testing.assert_close(unet(sample, torch.tensor(1.5), embeddings[:1], time_ids).sample, plain)


def test_pictures_are_shrunk_as_the_embeddings_were_trained():
    import torch
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as library

    for size in ((64, 64), (96, 200), (32, 40), (20, 24)):
        pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
        torch.testing.assert_close(depthcrafter.shrink(pixels, 32), library._resize_with_antialiasing(pixels, (32, 32)))


def test_pictures_pass_the_vae_in_chunks(weights, monkeypatch):
    networks = networks_of(weights)
    sizes: list[tuple[str, int]] = []
    for name in ("encode", "decode"):
        method = getattr(networks.vae, name)

        def counted(pixels, *args, _name=name, _method=method, **kwargs):
            sizes.append((_name, len(pixels)))
            return _method(pixels, *args, **kwargs)

        monkeypatch.setattr(networks.vae, name, counted)
    monkeypatch.setattr(depthcrafter, "NUM_STEPS", 1)
    assert estimate("depthcrafter", pictures(19), DepthRequest(depth_path=weights)).values.shape == (19, 64, 64)
    assert sizes == [("encode", 8), ("encode", 8), ("encode", 3), ("decode", 8), ("decode", 8), ("decode", 3)]


def test_working_sizes():
    assert depthcrafter.working_size((576, 1024)) == (576, 1024)
    assert depthcrafter.working_size((1080, 1920)) == (576, 1024)
    assert depthcrafter.working_size((512, 512)) == (512, 512)
    assert depthcrafter.working_size((40, 72)) == (64, 64)


def test_weights_that_are_not_here_name_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="hf download tencent/DepthCrafter --local-dir") as caught:
        estimate("depthcrafter", pictures(), DepthRequest())
    assert depthcrafter_weights.BASE_ID in str(caught.value)
    for part in ("image_encoder", "feature_extractor", "scheduler"):
        (tmp_path / part).mkdir()
    with pytest.raises(ConfigError, match="unet, vae is missing"):
        estimate("depthcrafter", pictures(), DepthRequest(depth_path=str(tmp_path)))


def test_another_network_and_damaged_folders_are_refused(weights, tmp_path):
    for name, change in (("other", "config"), ("damaged", "weights")):
        shutil.copytree(weights, tmp_path / name)
        if change == "config":
            (tmp_path / name / "unet" / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
            with pytest.raises(ConfigError, match="WanTransformer3DModel"):
                estimate("depthcrafter", pictures(), DepthRequest(depth_path=str(tmp_path / name)))
        else:
            next(Path(tmp_path / name / "unet").glob("*.safetensors")).unlink()
            with pytest.raises(ContractError, match="damaged"):
                estimate("depthcrafter", pictures(), DepthRequest(depth_path=str(tmp_path / name)))


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "depth_nan"), (0.0, "depth_constant")])
def test_broken_weights_are_bad_samples_with_a_reason(weights, monkeypatch, value, reason):
    networks = networks_of(weights)
    last = networks.vae.decoder.time_conv_out
    kept = {name: parameter.clone() for name, parameter in last.named_parameters()}
    try:
        for parameter in last.parameters():
            parameter.data.fill_(value)
        with pytest.raises(BadSample, match=reason):
            estimate("depthcrafter", pictures(), DepthRequest(depth_path=weights))
    finally:
        for name, parameter in last.named_parameters():
            parameter.data.copy_(kept[name])


def test_half_precision_as_on_a_gpu(weights):
    """The same networks in float16: close to float32, the overflowing encoder of the VAE in float32 for its part."""
    import copy

    import torch

    full = networks_of(weights)
    half = dataclasses.replace(
        full, **{name: copy.deepcopy(getattr(full, name)).half() for name in ("unet", "vae", "image_encoder")}
    )
    seen = []
    half.vae.encoder.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    found = []
    for networks in (full, half):
        noise = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            small = depthcrafter.working_pictures(pictures(2))
            latents = depthcrafter.encode(networks, small, noise)
            result = depthcrafter.denoise(networks, latents, depthcrafter.embed(networks, small), noise)
            found.append(depthcrafter.decode(networks, result, (64, 64)))
    assert seen == [torch.float32]
    assert {p.dtype for p in half.vae.parameters()} == {torch.float16}
    assert np.isfinite(found[1]).all()
    assert np.abs(found[0] - found[1]).max() < 0.05
    assert found[0].std() > 0.01
