"""An adapter does not choose which base is loaded: users must name untrusted bases themselves."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace

import pytest

from ex4d.errors import ConfigError, ContractError
from ex4d.models import backbone, weights
from ex4d.models.adapter import build_model
from ex4d.models.provenance import base_of
from pipelines import cli

TOLD = weights.AdapterMetadata("tiny", None, "0" * 16, 2, 2.0, 16, num_frames=5, size=(64, 64))


@pytest.fixture(scope="module")
def model():
    """An adapter of the tiny base, untrained."""
    base = backbone.load_base("tiny", components=("transformer",))
    return build_model(base.transformer, backbone.ModelConfig(lora_rank=2, lora_alpha=2.0, adapter_hidden=16))


@pytest.fixture
def write(tmp_path, model):
    """A function that writes an adapter with changed metadata and returns (folder, metadata)."""

    def write(**changes):
        metadata = replace(TOLD, **changes)
        weights.save_adapter(tmp_path / "adapter", model, metadata)
        return tmp_path / "adapter", metadata

    return write


@pytest.mark.parametrize("base", ["tiny", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"])
def test_known_bases_are_followed(write, base):
    assert base_of(*write(base=base, base_revision="abc")) == (base, "abc")


def test_folders_of_this_user_alone_are_followed(write, tmp_path):
    (tmp_path / "base").mkdir()
    told = write(base=str(tmp_path / "base"))
    assert base_of(*told) == (str(tmp_path / "base"), None)
    if os.getuid() == 0:
        os.chown(tmp_path / "base", 12345, 12345)
        with pytest.raises(ConfigError, match="neither a published model nor a folder of yours"):
            base_of(*told)


@pytest.mark.parametrize("base", ["evil/base", "evil/base@main", "/nowhere", "../x", "", "TINY"])
def test_other_bases_must_be_named(write, base):
    told = write(base=base, base_revision="abc")
    with pytest.raises(ConfigError, match="must be set"):
        base_of(*told)
    assert base_of(*told, "mine/base") == ("mine/base", None)
    if base:
        assert base_of(*told, base) == (base, "abc")


def test_a_pull_request_is_no_revision(write):
    """Anybody can open one, with other weights, for a published model."""
    told = write(base="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", base_revision="refs/pr/7")
    for base in (None, told[1].base):
        with pytest.raises(ConfigError, match="refs/pr/7"):
            base_of(*told, base)


def test_an_adapter_of_ours_says_which_weights_it_knows(write, caplog):
    told = write(base_fingerprint=None)
    with pytest.raises(ConfigError, match="does not say which base weights"):
        base_of(*told)
    assert base_of(*told, "tiny") == ("tiny", None)
    released = told[0].parent / "ex4d.ckpt"
    released.touch()
    assert base_of(released, told[1]) == ("tiny", None)
    assert "not verified" in caplog.text


@pytest.mark.parametrize("changes", [{"base": "evil/base"}, {"base_fingerprint": None}])
def test_commands_refuse_before_any_work(write, changes, tmp_path, capsys, monkeypatch):
    adapter, _ = write(**changes)
    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr("ex4d.models.backbone.load_base", lambda *args, **more: pytest.fail("a base was loaded"))
    argv = ["--video", str(tmp_path / "a.mp4"), "--output", str(tmp_path / "out.mp4"), "--device", "cpu"]
    assert cli.main(["generate", "--adapter", str(adapter), *argv]) == 2
    assert "base=None: must be set" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(f"evaluate: {{adapter: {adapter}, output: {tmp_path / 'out'}}}\n")
    assert cli.main(["evaluate", str(tmp_path / "config.yaml")]) == 2
    assert "evaluate.base=None: must be set" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "axes"), [(1, 10**6), (50_001, 1)])
def test_empty_tensors_of_many_axes_are_refused_by_the_header(tmp_path, count, axes):
    """Each axis would become an object of the library; the files have two megabytes."""
    header = {f"t{index}": {"dtype": "F32", "shape": [0] * axes, "data_offsets": [0, 0]} for index in range(count)}
    data = json.dumps(header).encode()
    (tmp_path / "adapter.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    tracemalloc.start()
    with pytest.raises(ContractError, match="axes"):
        weights.read_adapter(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()
