"""Re-encoded, scaled or cropped copies are found, in any order; distinct videos are not taken for copies."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from ex4d import video
from ex4d.data.verify import verify
from ex4d.geometry.masks import MaskConfig
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.preprocess import duplicates
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig
from pipelines.preprocess.stages.shots import find_shots
from pipelines.runtime.stage import new_row, pack_row, unpack_row

WORLD = SyntheticConfig(num_videos=8, num_frames=17, size=(64, 64), supersample=1, seed=5)


def scaled(frames, height, width):
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])


def brighter(frames):
    return (frames * 1.1 + 4).clip(0, 255).astype(np.uint8)


# What happens to a video on its way through the web; cropped by 2 % of each side.
COPIES = {
    "again": lambda frames: (frames, 38),
    "smaller": lambda frames: (scaled(frames, 44, 44), 20),
    "cropped": lambda frames: (scaled(frames, 100, 100)[:, 2:-2, 2:-2], 20),
    "brighter": lambda frames: (brighter(frames), 25),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Distinct videos, and copies of the first two of them."""
    folder = tmp_path_factory.mktemp("near")
    paths = write_corpus(folder, WORLD)
    for index, path in enumerate(paths[:2]):
        frames, fps = video.read(path)
        for name, change in COPIES.items():
            changed, crf = change(frames)
            video.write(folder / f"{name}-{index}.mp4", changed, fps, crf=crf)
    return folder


@pytest.fixture(scope="module")
def hashes(corpus):
    """{name: hashes} of every file."""
    return {path.stem: find_shots(str(path))[-1] for path in sorted(corpus.glob("*.mp4"))}


def distance(first, second):
    """Return the number of bits within which most frames of two videos agree; None if too many frames are flat."""
    frames = [
        (int(one, 16) ^ int(other, 16)).bit_count() for one, other in zip(first, second, strict=True) if one and other
    ]
    return sorted(frames)[duplicates.MAJORITY - 1] if len(frames) >= duplicates.MAJORITY else None


def originals(hashes):
    return sorted(name for name in hashes if name.startswith("synthetic"))


def test_copies_are_near_and_distinct_videos_far(hashes):
    for index, name in enumerate(originals(hashes)[:2]):
        for copy in COPIES:
            assert distance(hashes[name], hashes[f"{copy}-{index}"]) <= duplicates.MAX_BITS
    distances = [distance(hashes[a], hashes[b]) for a, b in itertools.combinations(originals(hashes), 2)]
    assert min(distances) >= 1.5 * duplicates.MAX_BITS


def test_groups_are_those_of_comparing_every_pair_and_know_no_order(hashes):
    found = duplicates.groups(hashes)
    first, second, *rest = originals(hashes)
    expected = {name: name for name in rest}
    for index, name in enumerate((first, second)):
        members = [name, *(f"{copy}-{index}" for copy in COPIES)]
        expected |= {member: min(members) for member in members}
    assert found == expected
    names = list(hashes)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert duplicates.groups({name: hashes[name] for name in names}) == expected


def test_the_index_finds_what_comparing_every_pair_finds():
    """Random videos, and copies of each with up to MAX_BITS flipped in five of eight frames, the others unlike."""
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**64, (100, 8), dtype=np.uint64)
    copies = rng.integers(0, 2**64, (100, 8), dtype=np.uint64)
    for index in range(100):
        for frame in rng.permutation(8)[:5]:
            flipped = rng.permutation(64)[: rng.integers(0, 5)]
            copies[index, frame] = values[index, frame] ^ np.bitwise_or.reduce(
                np.uint64(1) << flipped.astype(np.uint64)
            )
    videos = {
        f"{i:04d}{kind}": hexadecimal(row)
        for kind, rows in zip("ab", (values, copies), strict=True)
        for i, row in enumerate(rows)
    }
    found = duplicates.groups(videos)
    every = {(a, b) for a, b in itertools.combinations(sorted(videos), 2) if near(videos[a], videos[b])}
    assert {(min(name, group), max(name, group)) for name, group in found.items() if name != group} == every
    assert len(every) == 100


def hexadecimal(row):
    return [f"{value:016x}" for value in row]


def near(first, second):
    found = distance(first, second)
    return found is not None and found <= duplicates.MAX_BITS


def test_frames_without_anything_to_see_do_not_make_videos_alike():
    black = np.zeros((90, 160, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 3, (90, 160, 3), dtype=np.uint8)
    assert duplicates.frame_hash(black) is None
    assert duplicates.frame_hash(noise) is None
    flat = duplicates.sampled([None] * 30, range(30))
    assert flat == [""] * 8
    assert duplicates.groups({"a": flat, "b": flat}) == {"a": "a", "b": "b"}
    half = ["", "", "", "", *["00000000ffffffff"] * 4]  # four of eight agree: no majority
    assert duplicates.groups({"a": half, "b": half}) == {"a": "a", "b": "b"}
    assert distance(half, half) is None


def test_frames_are_taken_at_equal_times_whatever_the_rate():
    wanted = (np.arange(8) + 0.5) / 8 * 99
    for per_frame in (1, 2, 3):
        count = 99 * per_frame + 1
        found = duplicates.sampled(list(range(count)), [10 * index for index in range(count)])
        assert np.abs(np.array([int(text, 16) for text in found]) / per_frame - wanted).max() <= 0.5 / per_frame
    varied = duplicates.sampled(list(range(52)), [*range(0, 50), 1000, 2000])  # two thirds of it are one frame
    assert [int(text, 16) for text in varied] == [49, 49, 50, 50, 50, 50, 51, 51]
    assert duplicates.sampled([7], [0]) == [f"{7:016x}"] * 8


def test_a_hash_is_imagehashs():
    """The same bits as ImageHash's phash of the same small picture, except for values at the median."""
    imagehash = pytest.importorskip("imagehash")
    from PIL import Image

    rng = np.random.default_rng(1)
    image = cv2.resize(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8), (160, 90), interpolation=cv2.INTER_CUBIC)
    theirs = int(str(imagehash.phash(Image.fromarray(image))), 16)
    assert (duplicates.frame_hash(image) ^ theirs).bit_count() <= 6  # they downscale with another filter


def test_of_a_group_the_largest_then_the_longest_is_taken():
    hashes = [f"{value:016x}" for value in np.random.default_rng(0).integers(0, 2**63, 8)]
    identity = duplicates.Identity()
    for name, height, duration_s in (("d", 8, 1.0), ("b", 64, 2.0), ("c", 64, 3.0), ("a", 32, 9.0), ("e", 64, 3.0)):
        look = hashes if name != "d" else hashes[::-1]
        identity.add(name * 64, look, [height, 64], duration_s)
    near = {name * 64: "a" * 64 for name in "bce"}
    assert identity.decide("group") == (near, {})
    assert identity.decide("filter") == (near, {name * 64: "c" * 64 for name in "abe"})
    assert identity.decide("off") == ({}, {})


def test_many_videos_are_compared_as_few_are(monkeypatch):
    """Compiled code finds the same pairs as array code: random videos, and copies with some frames changed."""
    rng = np.random.default_rng(7)
    values = rng.integers(0, 2**64, (3000, 8), dtype=np.uint64)
    values[1500:1600] = values[:100] ^ (np.uint64(1) << rng.integers(0, 64, (100, 8)).astype(np.uint64))
    values[1500:1600, : rng.integers(1, 5)] = 0
    seen = rng.random((3000, 8)) > 0.1
    few = duplicates._pairs(values, seen)
    monkeypatch.setattr(duplicates, "MANY", 0)
    assert duplicates._pairs(values, seen) == few
    assert len(few) > 20


def videos(with_pairs):
    """Return the arguments of `Identity.add` for 60 videos, some of them near duplicates, some flat, some pairs."""
    rng = np.random.default_rng(11)
    looks = [hexadecimal(rng.integers(0, 2**63, 8)) for _ in range(20)]
    found = []
    for number in range(60):
        look = [""] * 8 if number % 10 == 9 else looks[number % 20]
        other = (f"{number % 7:064x}", looks[number % 7]) if with_pairs and number % 3 == 0 else None
        sha256 = f"{rng.integers(1, 2**62):048x}" + "0" * 16  # numpy strips trailing zeros
        found.append((sha256, look, [int(rng.integers(1, 4)), 8], float(rng.integers(1, 4)), other))
    return found


@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize("how", ["off", "group", "filter"])
def test_videos_that_workers_collected_are_decided_like_those_added_one_by_one(with_pairs, how):
    """Whatever the units, and in whatever order they arrive."""
    every = videos(with_pairs)
    single = duplicates.Identity()
    for video_facts in sorted(every):
        single.add(*video_facts)
    expected = single.decide(how)
    for seed in range(3):
        random.Random(seed).shuffle(every)
        joined = duplicates.Identity()
        for unit in (every[:1], [], every[1:25], every[25:59]):
            part = duplicates.Identity()
            for video_facts in unit:
                part.add(*video_facts)
            joined.extend(unpack_row(pack_row(new_row("unit", **part.columns()))))
        joined.add(*every[59])
        assert joined.decide(how) == expected
    assert how == "off" or len(expected[0]) > 20
    assert bool(expected[1]) == (how == "filter")


def config_of(corpus, output, **more):
    return PreprocessConfig(
        output=str(output),
        input=str(corpus),
        num_frames=5,
        size=(32, 32),
        masks=MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0),
        val_fraction=0.5,
        max_bad_fraction=1.0,
        **more,
    )


def test_near_duplicates_share_a_split_or_are_filtered_and_counted(corpus, tmp_path):
    """The copies have no depth, so the planned clips show which video of a group is kept."""
    names = [path.name for path in corpus.glob("*.mp4")]
    outcomes = {}
    for mode in ("group", "filter", "off"):
        result = preprocess.run(config_of(corpus, tmp_path / "out", near_duplicates=mode), runner_name="inline")
        assert result.counts["videos_in"] == len(names) == 16
        assert result.counts["videos_in"] == result.counts["videos_split"] + result.counts["videos_rejected"]
        outcomes[mode] = result
        near = [row for row in result.rejects if row["reason"] == "near_duplicate"]
        assert len(near) == (8 if mode == "filter" else 0)
        assert all(row["fate"] == "filtered" and row["unit"] == "video" for row in near)
    assert outcomes["filter"].worked["split"] == 0  # another setting needs no rereading of the videos
    kept = {row["message"] for row in outcomes["filter"].rejects if row["reason"] == "near_duplicate"}
    assert kept == {f"nearly the same as cropped-{index}.mp4" for index in (0, 1)}  # 96 px: the largest pictures


def test_groups_are_in_the_samples_whatever_came_first(corpus, tmp_path):
    """A folder that gets copies later ends like one that had them from the start."""
    folder = tmp_path / "in"
    folder.mkdir()
    paths = sorted(corpus.glob("synthetic*"))
    for path in paths:
        shutil.copy(path, folder)
    preprocess.run(config_of(folder, tmp_path / "grown"), runner_name="inline")
    assert all(row["source_group"] == row["source_sha256"] for row in told(tmp_path / "grown"))
    depth = next(path for path in paths if path.name.endswith(".depth.npz"))
    for path in corpus.glob("*-0.mp4"):
        shutil.copy(path, folder)
        shutil.copy(depth, folder / f"{path.stem}.depth.npz")
    grown = preprocess.run(config_of(folder, tmp_path / "grown"), runner_name="inline")
    fresh = preprocess.run(config_of(folder, tmp_path / "fresh"), runner_name="inline")
    assert grown.counts == fresh.counts
    assert verify(str(tmp_path / "grown")).tree_sha256 == verify(str(tmp_path / "fresh")).tree_sha256
    rows = told(tmp_path / "grown")
    group = [row for row in rows if "-0.mp4" in row["source_path"] or row["source_path"] == f"{depth.name[:-10]}.mp4"]
    assert len({row["source_sha256"] for row in group}) == 5
    assert {row["source_group"] for row in group} == {min(row["source_sha256"] for row in group)}
    assert len({row["split"] for row in group}) == 1
    assert {row["split"] for row in rows} == {"train", "val"}


def told(output: Path):
    """Provenance of every sample, in order."""
    import pyarrow.parquet as pq

    from ex4d.data.tar import read_sample

    rows = pq.read_table(output / "manifest.parquet").to_pylist()
    for row in rows:
        with open(output / row["shard"], "rb") as file:
            file.seek(row["offset"])
            row |= json.loads(read_sample(file.read(row["length"]), row["key"])["json"])
    return rows
