"""Captions by a tiny BLIP made of the library's own classes and read back from its folder, without a network."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from ex4d import hub
from ex4d.errors import ConfigError, ContractError
from ex4d.models import captioner

WORDS = ["a", "an", "the", "man", "woman", "dog", "room", "walks", "sits", "red", "blue", "box", "ball", "in", "on"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("blip"))


def make_blip(folder):
    """Write a BLIP of about 40,000 parameters with its tokenizer and image processor; return its folder."""
    import torch
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 5, "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    text = {**shape, **ids, "vocab_size": len(vocabulary), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = BlipForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_equal_frames_get_equal_words_that_depend_on_the_picture(blip):
    rng = np.random.default_rng(0)
    clips = np.stack([np.full((3, 48, 64, 3), rng.integers(0, 255, 3), np.uint8) for _ in range(6)])
    found = [captioner.caption(clip, str(blip), max_new_tokens=8) for clip in clips]
    again = [captioner.caption(clip.copy(), str(blip), max_new_tokens=8) for clip in clips]
    assert found == again
    text, facts = found[0]
    assert text
    assert set(text.split()) <= {*WORDS, "[UNK]"}
    assert len({text for text, _ in found}) > 1
    assert facts == {"model": blip.name, "revision": "", "weights_sha256": hub.fingerprint([blip], ("*.safetensors",))}


def test_a_prompt_begins_the_caption(blip):
    frames = np.zeros((1, 32, 32, 3), np.uint8)
    assert captioner.caption(frames, str(blip), prompt="the red", max_new_tokens=4)[0].startswith("the red")


def test_the_same_weights_in_two_places_are_the_same(blip, tmp_path):
    shutil.copytree(blip, tmp_path / "elsewhere")
    assert hub.fingerprint([blip]) == hub.fingerprint([tmp_path / "elsewhere"])
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    assert hub.fingerprint([blip]) != hub.fingerprint([tmp_path / "elsewhere"])


def test_what_is_missing_or_foreign_is_an_invalid_choice_that_says_what_to_get(blip, tmp_path):
    with pytest.raises(ConfigError, match="Salesforce/blip-image-captioning-base"):
        captioner.folder_of("nobody/has-this")
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        captioner.folder_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="holds a gpt2"):
        captioner.folder_of(str(tmp_path))
    broken = tmp_path / "broken"
    shutil.copytree(blip, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ContractError, match="cannot be loaded"):
        captioner.caption(np.zeros((1, 32, 32, 3), np.uint8), str(broken))
