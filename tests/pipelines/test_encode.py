"""From clips to latents: nothing is lost, any runner gives equal bytes, and training sees no difference."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load as load_safetensors

from ex4d import storage
from ex4d.data import latents, manifest
from ex4d.data.loader import ShardLoader
from ex4d.data.tar import read_sample
from ex4d.data.texts import TextStore
from ex4d.data.verify import verify
from ex4d.errors import ConfigError
from ex4d.models import backbone
from ex4d.models.backbone import ModelConfig
from ex4d.models.encoders import to_pixels
from pipelines.encode import job as encode
from pipelines.encode import stages
from pipelines.encode.job import EncodeConfig
from pipelines.runtime.runner import RayConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
from make_run import make_base, make_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of nine clips, a base, and the dataset's latents by that base, as float32."""
    path = tmp_path_factory.mktemp("encode")
    make_dataset(path)
    make_base(path)
    config = EncodeConfig(str(path / "dataset"), str(path / "latents"), dtype="float32", prompts=("a room",))
    result = encode.run(config, model_of(path), runner_name="inline")
    assert (result.exit_code, result.counts["samples"], result.worked) == (0, 9, {"samples": 9, "texts": 11})
    return path


def model_of(folder: Path, **changes) -> ModelConfig:
    return ModelConfig(base=str(folder / "base"), lora_rank=3, adapter_hidden=8, **changes)


def inline(folder: Path, output: Path, model: ModelConfig | None = None, **changes):
    config = EncodeConfig(
        str(folder / "dataset"), str(output), **{"dtype": "float32", "prompts": ("a room",), **changes}
    )
    return encode.run(config, model or model_of(folder), runner_name="inline")


def tree(output: Path | str) -> str:
    report = verify(str(output), full=True)
    assert report.problems == ()
    return report.tree_sha256


def test_a_sample_is_what_the_base_makes_of_each_mask(folder):
    """The slow twin: every tensor from the base's own methods, a mask at a time."""
    base = backbone.load_base(str(folder / "base"))
    pixels = ShardLoader(str(folder / "dataset"), "val", 2, 0)
    encoded = ShardLoader(str(folder / "latents"), "val", 2, 0)
    batch, found = next(pixels), next(encoded)
    assert found["keys"] == batch["keys"]
    for name in ("mask_index", "kind"):
        np.testing.assert_array_equal(found[name], batch[name])
    assert found["captions"] == batch["captions"]
    frames, visible = torch.from_numpy(batch["frames"]), torch.from_numpy(batch["visible"])
    shown = to_pixels(frames * visible[..., None])
    wanted = {
        "latents": base.encode_video(to_pixels(frames)),
        "cond_latents": base.encode_condition(shown, visible, "unit"),
        "image": base.encode_image(shown[:, :, 0]),
        "first_frame": base.first_frame_condition(shown[:, :, 0], frames.shape[1])[:, 4:],
    }
    for name, tensor in wanted.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), tensor, atol=2e-6, rtol=1e-5)
    pixels.close()
    encoded.close()


def test_bfloat16_is_half_and_texts_are_there_once(folder, tmp_path):
    assert inline(folder, tmp_path / "half", dtype="bfloat16").exit_code == 0
    tree(tmp_path / "half")
    whole, half = (next(ShardLoader(str(path), "val", 1, 0)) for path in (folder / "latents", tmp_path / "half"))
    for name in ("latents", "cond_latents", "image", "first_frame"):
        np.testing.assert_allclose(half[name], whole[name], rtol=2**-8)
        assert half[name].dtype == np.float32
    np.testing.assert_array_equal(half["hole"], whole["hole"])
    dataset = manifest.read_dataset(str(folder / "latents"))
    store = TextStore(str(folder / "latents"), dataset)
    base = backbone.load_base(str(folder / "base"), components=("text_encoder",))
    for text in ("", "a room", "clip 3"):
        np.testing.assert_array_equal(store.embeds(text), base.encode_text([text])[0].numpy())
    table = pq.read_table(folder / "latents" / "text.parquet")
    assert sorted(table["text"].to_pylist()) == sorted(["", "a room", *(f"clip {n}" for n in range(9))])


def test_every_safetensors_reader_opens_a_member(folder):
    row = pq.read_table(folder / "latents" / "manifest.parquet").to_pylist()[0]
    blob = (folder / "latents" / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]]
    members = read_sample(blob, row["key"])
    theirs = load_safetensors(members[latents.MEMBER])
    ours = latents.decode_tensors(members[latents.MEMBER])
    assert {name: tensor.numpy().tobytes() for name, tensor in theirs.items()} == {
        n: a.tobytes() for n, a in ours.items()
    }
    assert theirs["condition"].shape == (3, 16, 2, 4, 4)
    assert theirs["first_frame"].shape == (1, 8, 2, 4, 4)  # three masks show one first frame, which is stored once


# ---------------------------------------------------------------- exactly once


@pytest.mark.heavy
@pytest.mark.ray
def test_ray_and_inline_give_the_same_bytes(folder, tmp_path, ray_local):
    config = EncodeConfig(str(folder / "dataset"), str(tmp_path / "ray"), dtype="float32", prompts=("a room",))
    assert encode.run(config, model_of(folder), RayConfig()).exit_code == 0
    assert tree(tmp_path / "ray") == tree(folder / "latents")


def test_running_again_does_what_is_missing_alone(folder, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(folder / "latents", output)
    before = tree(output)
    assert inline(folder, output).worked == {"samples": 0, "texts": 0}
    gone = sorted((output / "staging" / "clips").iterdir())[4]
    gone.unlink()
    (output / "dataset.json").unlink()
    assert inline(folder, output).worked == {"samples": 1, "texts": 0}
    assert tree(output) == before
    assert inline(folder, output, prompts=("a room", "a house")).worked == {"samples": 0, "texts": 1}
    assert inline(folder, output, captions=False).worked == {"samples": 0, "texts": 0}
    assert len(pq.read_table(output / "text.parquet")) == 2
    released = inline(folder, output, model_of(folder, mask_range="released"))
    assert released.worked == {"samples": 9, "texts": 0}  # another mask range changes the condition, but not the text
    assert inline(folder, output).worked == {"samples": 0, "texts": 0}
    assert tree(output) == before


def test_an_object_store_in_and_out_gives_the_same_bytes(folder):
    source = folder / "dataset"
    for path in source.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"memory://encode/clips/{path.relative_to(source)}", path.read_bytes())
    config = EncodeConfig("memory://encode/clips", "memory://encode/latents", dtype="float32", prompts=("a room",))
    assert encode.run(config, model_of(folder), runner_name="inline").exit_code == 0
    assert tree(config.output) == tree(folder / "latents")
    first = next(ShardLoader(config.output, "val", 1, 0))
    assert first["valid"].all()


KILLED = """
import json, sys
from pipelines.encode import job as encode
from ex4d.models.backbone import ModelConfig
data, output, base = sys.argv[1:]
config = encode.EncodeConfig(data, output, dtype="float32", prompts=("a room",))
print("ready", flush=True)
encode.run(config, ModelConfig(base=base, lora_rank=3, adapter_hidden=8), runner_name="inline")
"""


def test_kill_9_loses_nothing_and_leaves_no_half_dataset(folder, tmp_path, root):
    output = tmp_path / "killed"
    arguments = [str(folder / "dataset"), str(output), str(folder / "base")]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *arguments], cwd=root, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while len(list(output.glob("staging/clips/[!.]*.tar"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (output / "dataset.json").exists()
    done = len(list(output.glob("staging/clips/[!.]*.tar")))
    assert 2 <= done < 9
    assert inline(folder, output).worked["samples"] == 9 - done
    assert tree(output) == tree(folder / "latents")


RAY = """
import sys
from pipelines import cli
sys.exit(cli.main(["encode", *sys.argv[1:]]))
"""


@pytest.mark.heavy
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_kill_9_of_a_run_on_ray_loses_nothing(folder, tmp_path, root):
    """Run as by a user, killed and started again, it ends like an undisturbed run."""
    output, config = tmp_path / "killed", tmp_path / "encode.yaml"
    places = {"data": str(folder / "dataset"), "output": str(output)}
    model = {"base": str(folder / "base"), "lora_rank": 3, "adapter_hidden": 8}
    chosen = {"encode": {**places, "dtype": "float32", "prompts": ["a room"], "num_workers": 1}, "model": model}
    config.write_text(json.dumps(chosen))
    process = subprocess.Popen([sys.executable, "-c", RAY, str(config)], cwd=root)
    deadline = time.monotonic() + 400
    while len(list(output.glob("staging/clips/[!.]*.tar"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (output / "dataset.json").exists()
    done = subprocess.run([sys.executable, "-c", RAY, str(config)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "clips/s for each worker" in done.stdout
    assert tree(output) == tree(folder / "latents")


def test_a_damaged_sample_is_a_counted_reject(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder / "dataset", source)
    row = next(row for row in pq.read_table(source / "manifest.parquet").to_pylist() if row["split"] == "train")
    with open(source / row["shard"], "r+b") as file:
        file.seek(row["offset"] + row["length"] // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    config = EncodeConfig(str(source), str(tmp_path / "out"), captions=False, max_bad_fraction=0.2)
    result = encode.run(config, model_of(folder), runner_name="inline")
    assert (result.exit_code, result.counts["samples"], result.counts["clips_bad"]) == (0, 8, 1)
    assert [(row["key"], row["reason"]) for row in result.rejects] == [(row["key"], "damaged_sample")]
    assert str(tmp_path) not in json.dumps(result.rejects)
    tree(tmp_path / "out")
    strict = encode.run(replace(config, max_bad_fraction=0.1), model_of(folder), runner_name="inline")
    assert (strict.exit_code, strict.committed) == (1, False)


@pytest.mark.parametrize("name", ["text.parquet", "text/000000.safetensors", "shards/train-000000.tar"])
def test_verify_names_what_is_damaged(folder, tmp_path, name):
    shutil.copytree(folder / "latents", tmp_path / "damaged", ignore=shutil.ignore_patterns("staging"))
    path = tmp_path / "damaged" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    report = verify(str(tmp_path / "damaged"), full=True)
    assert any(name in problem for problem in report.problems)
    path.unlink()
    assert any(name in problem for problem in verify(str(tmp_path / "damaged")).problems)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"output": ""}, "output"), ({"num_gpus": -1.0}, "num_gpus"), ({"max_bad_fraction": 2.0}, "max_bad_fraction")],
)
def test_an_invalid_choice_is_refused(change, key):
    with pytest.raises(ConfigError, match=f"encode.{key}"):
        EncodeConfig(**change)


def test_a_base_of_another_family_is_refused(folder, tmp_path):
    config = EncodeConfig(str(folder / "dataset"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"model\.family"):
        encode.run(config, model_of(folder, family="wan2.1-i2v-14b"), runner_name="inline")
    assert not (tmp_path / "out").exists()


def test_latents_cannot_be_encoded_again(folder, tmp_path):
    config = EncodeConfig(str(folder / "latents"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"encode\.data"):
        encode.run(config, model_of(folder), runner_name="inline")


def test_models_run_on_the_share_of_a_gpu_that_was_asked_for():
    chosen = stages.with_gpu(encode.SAMPLE_STAGES, 0.5)
    assert {stage.name: stage.num_gpus for stage in chosen} == {
        **{"read_sample": 0.0, "load_models": 0.5, "encode_video": 0.5},
        **{"encode_image": 0.5, "write_latents": 0.5},
    }


def test_seconds_of_each_stage_are_logged(folder):
    line = json.loads((folder / "latents" / "run.jsonl").read_text().splitlines()[0])
    assert {"read_sample", "encode_video", "encode_image", "write_latents", "encode_text"} <= line["stages"].keys()
    assert line["stages"]["encode_video"]["done"] == 9
    assert line["stages"]["encode_video"]["worker_s"] > 0
