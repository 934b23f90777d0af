"""Tensors as bytes, the contract of a latent sample, and deduplicated text embeddings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from make_data import make_sample
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ex4d import storage
from ex4d.data import latents, sample, texts
from ex4d.data.latents import LatentSpec, decode_latents, validate
from ex4d.data.manifest import DATASET
from ex4d.data.tensors import decode_tensors, encode_tensors, store_as, to_bfloat16, to_float32
from ex4d.errors import ContractError

SHAPE, MASKS = (4, 2, 3, 5), 3
SPEC = LatentSpec("bfloat16", SHAPE, (7, 6), True, MASKS)
KEY = make_sample(0).key


def make_tensors(num_first: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    wanted = LatentSpec("float32", SHAPE, (7, 6), True, MASKS).tensors(num_first)
    made = {name: rng.normal(size=shape).astype("float32") for name, (_, shape) in wanted.items()}
    kinds = {"kind": np.array([0, 2, 1], np.uint8), "first_index": np.array([0, num_first - 1, 0], np.uint8)}
    return made | kinds | {"hole": np.abs(made["hole"])}


def make_members(dtype: str = "bfloat16", **tensors) -> dict[str, bytes]:
    pixels = sample.encode(make_sample(0))
    return latents.encode(make_tensors() | tensors, pixels, "f" * 16, dtype)


# ---------------------------------------------------------------- bytes


def test_bfloat16_is_torch_s():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, 1.00390625, 1.01171875, 1e-40], np.float32)  # ties, and below the normal numbers
    values = np.concatenate([values[np.isfinite(values)], special])
    theirs = torch.from_numpy(values).bfloat16()
    np.testing.assert_array_equal(to_bfloat16(values), theirs.view(torch.uint16).numpy())
    np.testing.assert_array_equal(to_float32(to_bfloat16(values)), theirs.float().numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_safetensors_reads_what_we_write_and_we_what_it_writes(dtype):
    stored = store_as(dtype, make_tensors(), latents.EXACT)
    data = encode_tensors(stored)
    assert data == encode_tensors(dict(reversed(stored.items())))
    theirs = load_safetensors(data)
    assert theirs["hole"].dtype == torch.float32
    assert theirs["target"].dtype == getattr(torch, dtype)
    ours = decode_tensors(data)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(to_float32(ours[name]), tensor.float().numpy())
    one = {"target": torch.from_numpy(make_tensors()["target"])}
    np.testing.assert_array_equal(decode_tensors(save_safetensors(one, {"a": "b"}))["target"], one["target"].numpy())


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(data: bytes, edit) -> bytes:
    header, body = header_of(data)
    edit(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "broken",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: with_header(data, lambda h: h["kind"].update(shape=[-3])),
        lambda data: with_header(data, lambda h: h["kind"].update(dtype="F64")),
        lambda data: with_header(data, lambda h: h["kind"].update(data_offsets=[0, 3])),
        lambda data: with_header(data, lambda h: h["target"].update(shape=[10**12])),
        lambda data: with_header(data, lambda h: h.update(kind=[])),
        lambda data: with_header(data, lambda h: h["kind"].update(data_offsets=[0])),
    ],
)
def test_a_damaged_file_is_refused(broken):
    data = encode_tensors(make_tensors())
    with pytest.raises(ContractError):
        decode_tensors(broken(data))


def test_other_types_are_not_stored():
    with pytest.raises(ContractError, match="float64"):
        encode_tensors({"a": np.zeros(3)})


# ---------------------------------------------------------------- a sample


def test_each_mask_has_its_own_condition_and_first_frame():
    tensors, members = make_tensors(), make_members("float32")
    for index, first in enumerate(tensors["first_index"]):
        found = decode_latents(members, lambda count, index=index: index if count == MASKS else -1)
        np.testing.assert_array_equal(found["latents"], tensors["target"])
        for name, array, place in (("cond_latents", "condition", index), ("hole", "hole", index)):
            np.testing.assert_array_equal(found[name], tensors[array][place])
        for name in ("first_frame", "image"):
            np.testing.assert_array_equal(found[name], tensors[name][first])
        assert (found["kind"], found["mask_index"]) == (tensors["kind"][index], index)
        assert found["captions"] == make_sample(0).caption


def test_a_base_without_first_frame_has_none():
    tensors = {name: array for name, array in make_tensors().items() if name not in ("first_frame", "image")}
    members = latents.encode(tensors, sample.encode(make_sample(0)), "f" * 16, "bfloat16")
    assert not {"first_frame", "image"} & decode_latents(members, lambda count: 0).keys()
    spec = LatentSpec("bfloat16", SHAPE, (), False, MASKS)
    assert latents.spec_of(members) == {"dtype": "bfloat16", "shape": [*SHAPE], "image": [], "first_frame": False}
    validate(members, spec, 3, KEY)
    with pytest.raises(ContractError, match="first_frame"):
        validate(members, SPEC, 3, KEY)


def test_a_good_sample_is_valid_and_its_provenance_goes_on():
    members = make_members()
    assert validate(members, SPEC, 3, KEY)["condition"].shape == (MASKS, 8, 2, 3, 5)
    ours, theirs = (json.loads(m["json"]) for m in (members, sample.encode(make_sample(0))))
    assert ours == theirs | {"latents_fingerprint": "f" * 16}


@pytest.mark.parametrize(
    ("member", "broken", "spec", "kinds", "key"),
    [
        ("latents.safetensors", {}, LatentSpec("float32", SHAPE, (7, 6), True, MASKS), 3, KEY),
        ("latents.safetensors", {}, LatentSpec("bfloat16", (5, 2, 3, 5), (7, 6), True, MASKS), 3, KEY),
        ("latents.safetensors", {}, LatentSpec("bfloat16", SHAPE, (), True, MASKS), 3, KEY),
        ("latents.safetensors", {}, LatentSpec("bfloat16", SHAPE, (7, 6), True, 4), 3, KEY),
        ("latents.safetensors", {}, SPEC, 2, KEY),
        ("latents.safetensors", {"hole": np.full((3, 1, 2, 3, 5), np.nan, np.float32)}, SPEC, 3, KEY),
        ("latents.safetensors", {"first_index": np.array([0, 5, 0], np.uint8)}, SPEC, 3, KEY),
        ("json", {}, SPEC, 3, "another"),
    ],
)
def test_each_violation_names_its_member(member, broken, spec, kinds, key):
    with pytest.raises(ContractError, match=member):
        validate(make_members(**broken), spec, kinds, key)


def test_a_mask_that_shows_no_known_first_frame_is_refused_when_read():
    members = make_members(first_index=np.array([9, 9, 9], np.uint8))
    with pytest.raises(ContractError, match="do not fit"):
        decode_latents(members, lambda count: 0)


@pytest.mark.parametrize("facts", [{}, {"latents": {}}, {"latents": {"dtype": "float64"}}])
def test_a_dataset_json_without_a_spec_is_refused(facts):
    with pytest.raises(ContractError, match="LatentSpec"):
        LatentSpec.of(facts)


# ---------------------------------------------------------------- texts


def make_texts(folder, count: int = 9, dtype: str = "float32", order: int = 1):
    """Write a store of texts of one to nine tokens in small files; return it and its contents."""
    staged, made = {}, {}
    for index in [*range(count)][::order]:
        text = "" if index == 0 else f"text number {index}: π"
        embeds = np.zeros((16, 6), np.float32)
        embeds[: index + 1] = np.random.default_rng(index).normal(size=(index + 1, 6))
        tensors = {"embeds": texts.trimmed(embeds), "text": np.frombuffer(text.encode(), np.uint8)}
        made[text], key = embeds, texts.text_key(text)
        staged[key] = str(folder / f"staging-{order}" / key)
        storage.write_bytes(staged[key], encode_tensors(store_as(dtype, tensors)))
    names = texts.write(folder, staged, file_size_bytes=400)
    digests = {name: storage.sha256(folder / name) for name in names}
    facts = {"dtype": dtype, "text_dim": 6, "text_length": 16}
    return made, {"latents": facts, "sha256": digests}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_text_comes_back_from_its_own_range(tmp_path, dtype):
    made, dataset = make_texts(tmp_path, dtype=dtype)
    assert len(dataset["sha256"]) >= 3  # the table and several files
    store = texts.TextStore(str(tmp_path), dataset)
    for text, embeds in made.items():
        assert text in store
        expected = embeds if dtype == "float32" else torch.from_numpy(embeds).bfloat16().float().numpy()
        np.testing.assert_array_equal(store.embeds(text), expected)
    assert "unknown" not in store
    with pytest.raises(ContractError, match="has no text"):
        store.embeds("unknown")


def test_the_files_do_not_depend_on_the_order(tmp_path):
    assert make_texts(tmp_path / "a")[1] == make_texts(tmp_path / "b", order=-1)[1]


def test_damage_is_found_by_range(tmp_path):
    _, dataset = make_texts(tmp_path)
    assert texts.problems(str(tmp_path), dataset, ()) == []
    assert len(texts.problems(str(tmp_path), dataset, ["0" * 64])) == 1
    path = tmp_path / "text" / "000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    (problem,) = texts.problems(str(tmp_path), dataset, ())
    assert "text/000000.safetensors: sha256 of the text" in problem
    with pytest.raises(ContractError, match=DATASET):
        texts.TextStore(str(tmp_path), dataset | {"sha256": {texts.TABLE: "0" * 64}})
