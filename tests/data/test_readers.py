"""The shards are plain WebDataset: three independent readers open them offline."""

from __future__ import annotations

import numpy as np
import pytest
from make_data import SPEC, make_sample

from ex4d.data.members import decode_frames, unpack_bits
from ex4d.data.sample import MEMBERS, SampleSpec, validate

DATASET_SPEC = SampleSpec(SPEC["num_frames"], tuple(SPEC["size"]), SPEC["num_masks"], tuple(SPEC["mask_kinds"]))
KEYS = sorted(make_sample(index).key for index in range(16) if index // 2 % 4 != 3)


def shards(dataset):
    return sorted(str(path) for path in (dataset / "shards").glob("train-*.tar"))


def check(key, members):
    sample = validate(members, DATASET_SPEC, key)
    np.testing.assert_array_equal(sample.visible, make_sample(int(key.rpartition("-")[2])).visible)


def test_webdataset_reads_every_sample(dataset16):
    import webdataset

    found = list(webdataset.WebDataset(shards(dataset16), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == KEYS
    for sample in found:
        check(sample["__key__"], {name: sample[name] for name in MEMBERS})


@pytest.mark.ray
def test_ray_reads_every_sample(dataset16, ray_local):
    import ray

    rows = ray.data.read_webdataset(shards(dataset16), decoder=None).take_all()
    assert sorted(row["__key__"] for row in rows) == KEYS
    for row in rows:
        check(row["__key__"], {name: row[name] for name in MEMBERS})


@pytest.mark.ray
def test_ray_with_its_own_decoder_gives_json_text_and_our_npz_bytes(dataset16, ray_local):
    import ray

    row = ray.data.read_webdataset(shards(dataset16)[:1]).take(1)[0]
    assert row["json"]["scores"].keys() == {"motion", "sharpness"}
    assert row["camera.json"]["axes"] == "opencv"
    assert isinstance(row["masks.npz"], bytes)


def test_hugging_face_datasets_reads_every_sample(dataset16, tmp_path):
    import datasets

    found = datasets.load_dataset(
        "webdataset", data_files={"train": shards(dataset16)}, split="train", cache_dir=str(tmp_path)
    )
    assert found.features["mp4"] == datasets.Video()
    found = found.cast_column("mp4", datasets.Video(decode=False))
    assert [row["__key__"] for row in found] == KEYS
    for row in found:
        expected = make_sample(int(row["__key__"].rpartition("-")[2]))
        assert row["json"]["key"] == expected.key
        assert row["json"]["scores"] == expected.provenance["scores"]
        assert [path is None for path in row["camera.json"]["w2c"]] == [False, False, True]
        assert row["txt"] == expected.caption
        # its reader turns npz into nested lists; our code unpacks the bits
        packed = np.array(row["masks.npz"]["visible_packed"], dtype=np.uint8)
        np.testing.assert_array_equal(unpack_bits(packed, SPEC["size"][1]), expected.visible)
        assert len(decode_frames(row["mp4"]["bytes"])) == SPEC["num_frames"]
