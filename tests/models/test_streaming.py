"""The transformer's loader against diffusers': equal weights, errors, which rank reads how much, and peak memory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tiny import quantize_linears

from ex4d.errors import ContractError
from ex4d.models import backbone
from ex4d.models.quantize import STYLES

ROOT = Path(__file__).resolve().parents[2]


def everything(model: Any) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bits_and_dtypes_as_diffusers(wan_folder: Path, dtype: str) -> None:
    theirs = WanTransformer3DModel.from_pretrained(wan_folder / "transformer", torch_dtype=getattr(torch, dtype))
    ours = backbone.load_base(str(wan_folder), dtype=dtype, components=("transformer",)).transformer
    expected, found = everything(theirs), everything(ours)
    assert found.keys() == expected.keys()
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in expected.items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not ours.training


@pytest.mark.parametrize("style", STYLES)
def test_quantised_on_the_way_as_afterwards(wan_folder: Path, style: str) -> None:
    whole = backbone.load_base(str(wan_folder), dtype="bfloat16", components=("transformer",)).transformer
    quantize_linears(whole.blocks, style)
    ours = backbone.load_base(str(wan_folder), dtype="bfloat16", components=("transformer",), quantize=style)
    expected, found = everything(whole), everything(ours.transformer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_shards_are_read_and_impossible_files_named(wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(wan_folder, folder)
    target = folder / "transformer"
    path = target / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    names = sorted(state)
    parts = {"diffusion_pytorch_model-1.safetensors": names[::2], "diffusion_pytorch_model-2.safetensors": names[1::2]}
    for file, of in parts.items():
        save_file({name: state[name] for name in of}, target / file)
    listing = target / "diffusion_pytorch_model.safetensors.index.json"
    where = {name: file for file, of in parts.items() for name in of}
    listing.write_text(json.dumps({"weight_map": where}))
    path.unlink()
    shards = backbone.load_base(str(folder), components=("transformer",)).transformer.state_dict()
    assert all(torch.equal(shards[name], value) for name, value in state.items())
    listing.write_text(json.dumps({"weight_map": where | {names[0]: "../../elsewhere.safetensors"}}))
    with pytest.raises(ContractError, match="not a file of its folder"):
        backbone.load_base(str(folder), components=("transformer",))
    listing.unlink()
    save_file({name: value for name, value in state.items() if name != names[3]}, path)
    with pytest.raises(ContractError, match=f"{names[3]} is missing"):
        backbone.load_base(str(folder), components=("transformer",))
    save_file(state | {names[3]: state[names[3]][..., :1].contiguous()}, path)
    with pytest.raises(ContractError, match=f"{names[3]} has the shape"):
        backbone.load_base(str(folder), components=("transformer",))
    data = bytearray(path.read_bytes())
    data[:8] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ContractError, match="not safetensors"):
        backbone.load_base(str(folder), components=("transformer",))


RANK = """
import json, os, sys, torch
from ex4d.models import backbone
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def read():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("rchar"))
import diffusers, accelerate
from diffusers import WanTransformer3DModel
from ex4d.models import streaming
folder, style, components, shared = sys.argv[1], sys.argv[2] or None, sys.argv[3].split(","), sys.argv[4] == "2"
if shared:
    torch.distributed.init_process_group("gloo")
before, done = status("VmRSS"), read()
open("/proc/self/clear_refs", "w").write("5")
base = backbone.load_base(folder, dtype="bfloat16", components=components, quantize=style, shared=shared)
modules = [getattr(base, name) for name in components]
tensors = [value for module in modules for value in (*module.parameters(), *module.buffers())]
own = sum(value.nbytes for value in tensors)
digest = sum(float(value.flatten()[::997].double().sum()) for value in tensors)
said = {"own": own, "peak": status("VmHWM") - before, "read": read() - done, "digest": digest}
if "vae" in components:
    pixels = torch.linspace(-1, 1, 3 * 5 * 32 * 32).view(1, 3, 5, 32, 32)
    made = base.encode_video(pixels), base.encode_image(pixels[:, :, 0]), base.encode_text(["a red ball"])
    said["outputs"] = [float(value.double().sum()) for value in made]
print(json.dumps(said))
"""


def load_in_processes(
    folder: Path, style: str = "", count: int = 1, components: str = "transformer", others: Path | None = None
) -> list[dict[str, Any]]:
    """Load on that many ranks and return each one's report; ranks other than 0 may get a folder of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    ranks = []
    for rank in range(count):
        place = others if rank and others else folder
        command = [sys.executable, "-c", RANK, str(place), style, components, str(count)]
        ranks.append(subprocess.Popen(command, env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True))
    return [json.loads(rank.communicate(timeout=600)[0].splitlines()[-1]) for rank in ranks]


def test_one_rank_reads_and_the_others_receive(wan_folder: Path) -> None:
    alone = load_in_processes(wan_folder)[0]
    first, second = load_in_processes(wan_folder, count=2)
    size = (wan_folder / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert first["read"] > size > second["read"]
    assert first["digest"] == second["digest"] == alone["digest"]


def test_encoders_are_read_by_one_rank_too(wan_folder: Path, tmp_path: Path) -> None:
    """Rank 1 gets a base without weights. (Memory-mapped files do not count in the bytes that a process reads.)"""
    names = "vae,image_encoder,text_encoder"
    shutil.copytree(wan_folder, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    alone = load_in_processes(wan_folder, components=names)[0]
    first, second = load_in_processes(wan_folder, count=2, components=names, others=tmp_path / "base")
    for what in ("own", "digest", "outputs"):
        assert first[what] == second[what] == alone[what]


@pytest.mark.heavy
@pytest.mark.timeout(1200)
def test_a_gigabyte_is_read_once_and_never_twice_in_memory(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
    import random_run

    shape = dict(backbone.transformer_config("tiny")) | {"num_attention_heads": 12, "attention_head_dim": 128}
    shape |= {"ffn_dim": 8960, "num_layers": 9, "added_kv_proj_dim": 1536, "freq_dim": 256}
    size = random_run.write_base(tmp_path, shape, torch.device("cpu"))
    assert 0.9e9 < size < 1.2e9
    first, second = load_in_processes(tmp_path, count=2)
    assert first["digest"] == second["digest"]
    assert first["read"] >= size
    assert second["read"] < 0.02 * size
    beyond = [(rank["peak"] - rank["own"]) / size for rank in (first, second)]
    plain = load_in_processes(tmp_path)[0]["peak"]
    quantised = {style: load_in_processes(tmp_path, style)[0]["peak"] / plain for style in STYLES}
    print({"size": size, "beyond own copy": beyond, "read by rank 1": second["read"], "quantised": quantised})
    assert max(beyond) <= 0.3
    assert max(quantised.values()) <= 0.6
