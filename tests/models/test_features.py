"""Features from a tiny DINOv2 and a tiny VideoMAE of the library's own classes, read back without a network."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from vision_networks import make_dinov2, make_videomae

from ex4d.errors import ConfigError, ContractError
from ex4d.models import features

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (6, 40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return make_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def videomae(tmp_path_factory):
    return make_videomae(tmp_path_factory.mktemp("videomae"))


def test_pictures_get_their_class_token_alone_or_together(dinov2):
    from transformers import Dinov2Model

    found = features.image_features(FRAMES, str(dinov2))
    assert (found.shape, found.dtype) == ((6, 32), np.float32)
    np.testing.assert_allclose(features.image_features(FRAMES[2:3], str(dinov2)), found[2:3], atol=1e-5)
    settings = json.loads((dinov2 / "preprocessor_config.json").read_text())
    grey = np.full((1, 28, 28, 3), 128, np.uint8)  # of the network's own size: nothing is scaled
    mean, std = (np.array(settings[name]) for name in ("image_mean", "image_std"))
    pixels = torch.from_numpy(((grey / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        token = Dinov2Model.from_pretrained(dinov2)(pixels).pooler_output
    np.testing.assert_allclose(features.image_features(grey, str(dinov2)), token.numpy(), atol=1e-5)


def test_a_video_gets_one_row_that_depends_on_its_order(videomae):
    found = features.video_features(FRAMES, str(videomae))
    assert found.shape == (1, 32)
    backwards = features.video_features(FRAMES[::-1], str(videomae))
    assert np.abs(found - backwards).max() > 1e-4
    assert features.video_features(FRAMES[:1], str(videomae)).shape == (1, 32), "a clip shorter than the network's"


def test_weights_of_another_kind_or_none_are_a_choice_to_correct(dinov2, videomae, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate\.image_features.*holds a videomae.*dinov2-large"):
        features.image_features(FRAMES, str(videomae))
    with pytest.raises(ConfigError, match=r"evaluate\.video_features.*holds a dinov2"):
        features.video_features(FRAMES, str(dinov2))
    with pytest.raises(ConfigError, match=r"evaluate\.image_features.*holds no model"):
        features.image_features(FRAMES, str(tmp_path))
    with pytest.raises(ConfigError, match=r"hf download.*dinov2-large"):
        features.image_features(FRAMES, "facebook/dinov2-large")


def test_a_damaged_file_is_a_broken_contract(dinov2, tmp_path):
    shutil.copytree(dinov2, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ContractError, match="cannot be loaded as Dinov2Model"):
        features.image_features(FRAMES, str(tmp_path / "cut"))
