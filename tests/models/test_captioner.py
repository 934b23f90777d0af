"""Captions from a tiny BLIP of the library's own classes, read back from its folder without a network."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from vision_networks import WORDS, make_blip, make_llava

from ex4d import hub
from ex4d.errors import ConfigError, ContractError
from ex4d.models import captioner


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("llava"))


def test_a_chat_model_is_shown_frames_of_the_whole_clip_and_asked(llava, tmp_path):
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 255, (4, 9, 48, 64, 3), dtype=np.uint8)
    found = [captioner.caption(clip, str(llava), max_new_tokens=6) for clip in clips]
    assert found == [captioner.caption(clip.copy(), str(llava), max_new_tokens=6) for clip in clips]
    assert len({text for text, _ in found}) > 1
    assert set(" ".join(text for text, _ in found).split()) <= set(WORDS)
    assert found[0][1]["weights_sha256"] == hub.fingerprint([llava], ("*.safetensors",))
    ends = clips[0].copy()
    ends[-2:] = 255 - ends[-2:]  # the last of the frames that the model sees, not the middle one
    assert len({captioner.caption(clip, str(llava), max_new_tokens=30)[0] for clip in (clips[0], ends)}) == 2
    asked = captioner.caption(clips[0], str(llava), prompt="the red ball", max_new_tokens=6)[0]
    assert asked != found[0][0]
    mute = tmp_path / "mute"
    shutil.copytree(llava, mute)
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        captioner.caption(clips[0], str(mute))


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
