"""The contract of one sample: exact round trips, equal bytes every time, and named violations."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_data import SPEC, make_sample

from ex4d import video
from ex4d.data.members import (
    MAX_CAPTION_BYTES,
    caption_of,
    decode_masks,
    encode_npz,
    hole_share,
    pack_bits,
    type_tree,
    unpack_bits,
)
from ex4d.data.sample import MEMBERS, SampleSpec, decode, encode, validate
from ex4d.errors import ContractError

DATASET_SPEC = SampleSpec(**{**SPEC, "size": tuple(SPEC["size"]), "mask_kinds": tuple(SPEC["mask_kinds"])})


def slow_pack(mask: np.ndarray) -> np.ndarray:
    """pack_bits for one row, bit by bit."""
    row = np.zeros(-(-len(mask) // 8), dtype=np.uint8)
    for x, seen in enumerate(mask):
        row[x // 8] |= int(seen) << (7 - x % 8)
    return row


@given(width=st.integers(1, 70), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_bits_round_trip_at_any_width(width, seed):
    mask = np.random.default_rng(seed).random((2, 3, 2, width)) > 0.5
    packed = pack_bits(mask)
    assert packed.shape == (2, 3, 2, -(-width // 8))
    np.testing.assert_array_equal(packed[1, 2, 1], slow_pack(mask[1, 2, 1]))
    np.testing.assert_array_equal(unpack_bits(packed, width), mask)


def test_a_sample_comes_back_as_it_went_in():
    sample = make_sample(1)
    members = encode(sample)
    assert tuple(sorted(members)) == MEMBERS
    back = validate(members, DATASET_SPEC, sample.key)
    np.testing.assert_array_equal(back.visible, sample.visible)
    np.testing.assert_array_equal(back.K, sample.K)
    assert back.hole_share.tolist() == sample.hole_share.tolist()
    assert [path is None for path in back.w2c] == [False, False, True]
    assert (back.key, back.fps, back.caption, back.provenance) == (
        sample.key,
        sample.fps,
        sample.caption,
        sample.provenance,
    )
    assert np.abs(back.frames.astype(float) - sample.frames).mean() < 20  # noise in 4:2:0: chroma is halved


def test_equal_samples_give_equal_bytes_and_no_date(monkeypatch):
    first = encode(make_sample(2))
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *_: (2033, 5, 18, 5, 33, 20, 2, 138, 0))
    assert encode(make_sample(2)) == first
    with zipfile.ZipFile(io.BytesIO(first["masks.npz"])) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_every_number_keeps_its_type():
    sample = make_sample(3)
    whole = dataclasses.replace(
        sample,
        K=sample.K.astype(int),
        provenance={**sample.provenance, "scores": {"motion": np.float32(1), "sharpness": 2.0}},
    )
    first, second = (json.loads(encode(s)["json"]) for s in (sample, whole))
    assert type_tree(first) == type_tree(second)
    assert '"K":[[40.0,' in encode(whole)["camera.json"].decode()


def with_json(name, edit):
    """The members of a good sample with one JSON member changed by `edit`."""
    members = encode(make_sample(0))
    value = json.loads(members[name])
    edit(value)
    return {**members, name: json.dumps(value).encode()}


def with_masks(**change):
    """The members of a good sample with arrays of masks.npz changed by functions."""
    members = encode(make_sample(0))
    names = ("visible_packed", "kind", "hole_share")
    arrays = dict(zip(names, decode_masks(members["masks.npz"], (SPEC["num_frames"], *SPEC["size"])), strict=True))
    return {**members, "masks.npz": encode_npz(arrays | {name: edit(arrays[name]) for name, edit in change.items()})}


def with_bytes(name, edit):
    members = encode(make_sample(0))
    return {**members, name: edit(members.get(name))}


def with_pickle():
    buffer = io.BytesIO()
    np.savez(buffer, visible_packed=np.zeros(1), kind=np.array([{}], dtype=object), hole_share=np.zeros(1))
    return with_bytes("masks.npz", lambda _: buffer.getvalue())


def set_last_bit(packed):
    return packed | np.eye(1, packed.shape[-1], packed.shape[-1] - 1, dtype=np.uint8)[0]


@pytest.mark.parametrize(
    ("member", "broken"),
    [
        ("txt", lambda: {name: data for name, data in encode(make_sample(0)).items() if name != "txt"}),
        ("depth.npz", lambda: with_bytes("depth.npz", lambda _: b"")),
        ("mp4", lambda: with_bytes("mp4", lambda data: data[: len(data) // 2])),
        ("txt", lambda: with_bytes("txt", lambda _: b"\xff\xfe")),
        ("json", lambda: with_bytes("json", lambda _: b"{")),
        ("json", lambda: with_json("json", lambda facts: facts.pop("source_sha256"))),
        ("json", lambda: with_json("json", lambda facts: facts.update(key="another"))),
        ("camera.json", lambda: with_json("camera.json", lambda camera: camera.update(K=[[float("nan")] * 3] * 3))),
        ("camera.json", lambda: with_json("camera.json", lambda camera: camera["w2c"][0][1].__setitem__(0, [1.5] * 4))),
        ("camera.json", lambda: with_json("camera.json", lambda camera: camera.update(w2c=[camera["w2c"][0]] * 3))),
        ("camera.json", lambda: with_json("camera.json", lambda camera: camera.update(size=[36, 32]))),
        ("masks.npz", lambda: with_masks(visible_packed=set_last_bit)),
        ("masks.npz", lambda: with_masks(hole_share=lambda share: share + np.float32(0.01))),
        ("masks.npz", lambda: with_masks(kind=lambda kind: kind + np.uint8(1))),
        ("masks.npz", lambda: with_masks(kind=lambda kind: kind.astype(np.int32))),
        ("masks.npz", lambda: with_bytes("masks.npz", lambda data: data[:-30])),
        ("masks.npz", with_pickle),
    ],
)
def test_each_violation_names_its_member(member, broken):
    with pytest.raises(ContractError, match=member.replace(".", r"\.")):
        validate(broken(), DATASET_SPEC, make_sample(0).key)


def test_a_dataset_of_another_shape_is_refused():
    members = encode(make_sample(0))
    with pytest.raises(ContractError, match="mp4"):
        validate(members, dataclasses.replace(DATASET_SPEC, num_frames=9))
    with pytest.raises(ContractError, match="kind"):
        validate(members, dataclasses.replace(DATASET_SPEC, num_masks=2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "a.b"},
        {"key": "../x"},
        {"fps": 0.0},
        {"visible": np.ones((3, 5, 32, 32), dtype=bool)},
        {"frames": np.zeros((5, 32, 36), dtype=np.uint8)},
        {"w2c": [None]},
        {"provenance": {}},
    ],
)
def test_a_wrong_sample_is_never_encoded(wrong):
    with pytest.raises(ContractError):
        encode(dataclasses.replace(make_sample(0), **wrong))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, 2**63, object()])
def test_provenance_takes_no_value_that_readers_cannot_type(value):
    sample = make_sample(0)
    with pytest.raises(ContractError, match="json"):
        encode(dataclasses.replace(sample, provenance={**sample.provenance, "extra": value}))


def test_a_caption_has_a_longest_length():
    members = encode(make_sample(4)) | {"txt": b"x" * MAX_CAPTION_BYTES}
    assert len(caption_of(members)) == MAX_CAPTION_BYTES
    with pytest.raises(ContractError, match="txt: has more than"):
        caption_of(members | {"txt": members["txt"] + b"x"})


def test_hole_share_counts_holes():
    visible = np.ones((1, 2, 4, 4), dtype=bool)
    visible[0, 1, :2] = False
    assert hole_share(visible).tolist() == [[0.0, 0.5]]


def test_decode_needs_no_spec():
    assert decode(encode(make_sample(4))).key == make_sample(4).key


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def as_sample(frames):
    visible = np.ones((3, *frames.shape[:3]), dtype=bool)
    w2c = [np.tile(np.eye(4), (len(frames), 1, 1))] * 2 + [None]
    changes = {"frames": frames, "visible": visible, "hole_share": hole_share(visible), "w2c": w2c}
    return dataclasses.replace(make_sample(0), **changes)


def test_a_smooth_clip_loses_little():
    y, x, t = np.mgrid[:64, :64, :9]
    waves = [np.sin(x / 19 + t / 3), np.sin(y / 17 - t / 4), np.sin((x + y) / 31)]
    frames = np.round(127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8).transpose(2, 0, 1, 3)
    assert psnr(decode(encode(as_sample(frames))).frames, frames) > 36


def test_a_real_clip_loses_little(media):
    path = media / "ex4d_flower" / "input.mp4"
    pts, _ = video.frame_pts(str(path))
    frames = video.decode(str(path), pts[:9], size=(128, 128))
    assert psnr(decode(encode(as_sample(frames))).frames, frames) > 36
