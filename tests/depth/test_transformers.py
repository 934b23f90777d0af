"""Depth networks through the real `from_pretrained`, offline, on tiny checkpoints written by the real classes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ex4d.depth import DepthRequest, estimate, transformers
from ex4d.depth.transformers import NETWORKS, working_size
from ex4d.errors import BadSample, ConfigError, ContractError

DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
    "reshape_hidden_states": False,
}


def depth_anything(**options):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    values = {key: value for key, value in DINOV2.items() if key != "model_type"}
    backbone = Dinov2Config(image_size=32, out_indices=[1, 2, 3, 4], **values)
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        **options,
    )
    model = DepthAnythingForDepthEstimation(config)
    wake(model)
    for parameter in model.head.conv3.parameters():  # random weights under the last ReLU may give zero everywhere
        parameter.data.abs_()
    return model, {"size": {"height": 32, "width": 32}, "keep_aspect_ratio": True, "ensure_multiple_of": 4}


def depth_pro(**options):
    from transformers import DepthProConfig, DepthProForDepthEstimation

    encoder = {**DINOV2, "image_size": 16}
    config = DepthProConfig(
        patch_size=16,
        fusion_hidden_size=16,
        intermediate_hook_ids=[2, 1],
        intermediate_feature_dims=[8, 8],
        scaled_images_ratios=[0.5, 1.0],
        scaled_images_overlap_ratios=[0.0, 0.2],
        scaled_images_feature_dims=[8, 8],
        image_model_config=dict(encoder),
        patch_model_config=dict(encoder),
        fov_model_config=dict(encoder),
        **{"use_fov_model": True, **options},
    )
    model = DepthProForDepthEstimation(config)
    last = [module for module in model.head.layers if hasattr(module, "weight")][-1]
    last.bias.data.fill_(0.5)
    if config.use_fov_model:
        heads = [module for module in model.fov_model.head.layers if hasattr(module, "weight")]
        heads[-1].bias.data.fill_(50.0)
    return model, {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def zoedepth():
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

    backbone = BeitConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        bin_embedding_dim=8,
        num_relative_features=4,
        num_attractors=[4, 2, 1, 1],
        bin_configurations=[{"n_bins": 8, "min_depth": 0.5, "max_depth": 10.0, "name": "nyu"}],
    )
    settings = {
        "do_pad": True,
        "keep_aspect_ratio": True,
        "ensure_multiple_of": 32,
        "size": {"height": 32, "width": 32},
    }
    model = ZoeDepthForDepthEstimation(config)
    wake(model)
    return model, settings


MAKERS = {"depth-anything-v2": depth_anything, "depth-pro": depth_pro, "zoedepth": zoedepth}


def wake(model) -> None:
    """Scale up convolution weights: with the library's 0.02, a tiny network returns a constant."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)


def save(folder, made) -> str:
    model, settings = made
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    import torch

    paths = {}
    for name, maker in MAKERS.items():
        torch.manual_seed(0)
        paths[name] = save(tmp_path_factory.mktemp(name), maker())
    return paths


def pictures(num_frames: int = 3, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    import cv2

    noise = np.random.default_rng(0).uniform(0, 255, (size[0] // 8, size[1] // 8, 3)).astype(np.float32)
    picture = np.clip(cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, shift, axis=1) for shift in range(num_frames)])


@pytest.mark.parametrize(
    ("name", "kind", "metric"),
    [("depth-anything-v2", "disparity", False), ("depth-pro", "z_depth", True), ("zoedepth", "z_depth", True)],
)
def test_each_network_runs_from_its_own_checkpoint(checkpoints, name: str, kind: str, metric: bool):
    request = DepthRequest(depth_path=checkpoints[name])
    first, second = (estimate(name, pictures(), request) for _ in range(2))
    assert (first.kind, first.metric) == (kind, metric)
    assert first.values.shape == (3, 40, 56)
    assert first.values.tobytes() == second.values.tobytes()
    assert first.provenance["estimator"] == name
    assert len(first.provenance["weights_sha256"]) == 64
    assert first.provenance["licence"]


@pytest.mark.parametrize("name", NETWORKS)
def test_frames_in_batches_have_the_depth_of_frames_alone(checkpoints, name, monkeypatch):
    seen = []
    run = transformers._run
    monkeypatch.setattr(transformers, "_run", lambda *args: seen.append(len(args[2])) or run(*args))
    alone = estimate(name, pictures(5), DepthRequest(depth_path=checkpoints[name]))
    batches = estimate(name, pictures(5), DepthRequest(depth_path=checkpoints[name], batch_size=2))
    assert seen == [1] * 5 + [2, 2, 1]
    np.testing.assert_allclose(batches.values, alone.values, rtol=1e-4, atol=1e-6)


def test_a_gpu_with_a_number_is_a_gpu(checkpoints, monkeypatch):
    """Half precision and batches, on `cuda:1` as on `cuda`; what would go there stays here."""
    import torch

    seen, run = [], transformers._run

    def watched(model, settings, frames, device):
        seen.append((model.dtype, len(frames), device))
        return run(model, settings, frames, "cpu")

    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr(transformers, "_run", watched)
    half = estimate(
        "depth-anything-v2", pictures(9), DepthRequest(depth_path=checkpoints["depth-anything-v2"], device="cuda:1")
    )
    assert seen == [(torch.float16, 8, "cuda:1"), (torch.float16, 1, "cuda:1")]
    monkeypatch.undo()
    exact = estimate("depth-anything-v2", pictures(9), DepthRequest(depth_path=checkpoints["depth-anything-v2"]))
    np.testing.assert_allclose(half.values, exact.values, atol=0.01 * np.ptp(exact.values))


def test_depth_pro_takes_few_frames_at_once_on_a_gpu(checkpoints, monkeypatch):
    """Eight took 17 GB, so that a GPU of 80 GB had no room for the four actors of depth_num_gpus=0.25."""
    import torch

    seen, run = [], transformers._run
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr(transformers, "_run", lambda *args: seen.append(len(args[2])) or run(*args[:3], "cpu"))
    estimate("depth-pro", pictures(5), DepthRequest(depth_path=checkpoints["depth-pro"], device="cuda"))
    assert seen == [2, 2, 1]


def test_depth_pro_gives_intrinsics(checkpoints):
    result = estimate("depth-pro", pictures(), DepthRequest(depth_path=checkpoints["depth-pro"]))
    focal = 0.5 * 56 / np.tan(np.radians(result.provenance["fov_deg"]) / 2)
    np.testing.assert_allclose(result.K, [[focal, 0, 28], [0, focal, 20], [0, 0, 1]])


def test_depth_pro_without_the_head_and_metric_depth_anything(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = save(tmp_path / "a", depth_pro(use_fov_model=False))
    result = estimate("depth-pro", pictures(), DepthRequest(depth_path=plain))
    assert (result.K, result.metric) == (None, False)
    metric = save(tmp_path / "b", depth_anything(depth_estimation_type="metric", max_depth=20))
    result = estimate("depth-anything-v2", pictures(), DepthRequest(depth_path=metric))
    assert (result.kind, result.metric) == ("z_depth", True)
    assert result.values.max() <= 20.001


def test_the_raw_output_equals_the_library_at_its_own_size(checkpoints):
    import torch
    from transformers import DepthAnythingForDepthEstimation

    frames = pictures(1, (32, 32))
    model = DepthAnythingForDepthEstimation.from_pretrained(checkpoints["depth-anything-v2"]).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        pixels = ((torch.from_numpy(frames).float() / 255 - mean) / std).permute(0, 3, 1, 2)
        expected = model(pixels).predicted_depth.numpy()
    request = DepthRequest(depth_path=checkpoints["depth-anything-v2"])
    np.testing.assert_allclose(estimate("depth-anything-v2", frames, request).values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "depth_nan"), (0.0, "depth_constant")])
def test_broken_weights_are_bad_samples_with_a_reason(tmp_path, value: float, reason: str):
    model, settings = depth_anything()
    for parameter in model.head.parameters():
        parameter.data.fill_(value)
    path = save(tmp_path, (model, settings))
    with pytest.raises(BadSample, match=reason):
        estimate("depth-anything-v2", pictures(), DepthRequest(depth_path=path))


def test_weights_that_are_not_here_name_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="hf download apple/DepthPro-hf"):
        estimate("depth-pro", pictures(), DepthRequest())
    with pytest.raises(ConfigError, match="neither an existing folder"):
        estimate("depth-pro", pictures(), DepthRequest(depth_path="no/such/folder/at/all"))


def test_another_family_and_damaged_folders_are_refused(checkpoints, tmp_path):
    with pytest.raises(ConfigError, match="zoedepth is a zoedepth"):
        estimate("zoedepth", pictures(), DepthRequest(depth_path=checkpoints["depth-pro"]))
    (tmp_path / "config.json").write_text('{"model_type": "zoedepth"}')
    with pytest.raises(ContractError):
        estimate("zoedepth", pictures(), DepthRequest(depth_path=str(tmp_path)))


def test_working_sizes():
    settings = {"size": {"height": 518, "width": 518}, "keep_aspect_ratio": True, "ensure_multiple_of": 14}
    assert working_size((720, 1280), settings) == (518, 924)
    assert working_size((512, 512), settings) == (518, 518)
    assert working_size((720, 1280), {"size": {"height": 1536, "width": 1536}}) == (1536, 1536)
