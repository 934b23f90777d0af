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
from pipelines.preprocess import duplicates, identity
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig
from pipelines.preprocess.stages.shots import find_shots
from pipelines.runtime.scratch import scratch
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


def groups(videos):
    """Return {name: the first name of its group} as `Identity` decides for {name: hashes}."""
    names = {f"{number:064x}": name for number, name in enumerate(sorted(videos), 1)}
    table, collector = identity.Identity(scratch()), identity.Collector()
    for sha256, name in names.items():
        collector.add(sha256, videos[name], (8, 8), 1.0)
    table.extend("", collector.columns())
    found = {names[one.sha256]: names[one.group] for one in table.decide("group")}
    return {name: name for name in videos} | found


def distance(first, second):
    """Return the number of bits within which most frames of two videos agree."""
    frames = [(int(one, 16) ^ int(other, 16)).bit_count() for one, other in zip(first, second, strict=True)]
    return sorted(frames)[duplicates.MAJORITY - 1]


def originals(hashes):
    return sorted(name for name in hashes if name.startswith("synthetic"))


def test_copies_are_near_and_distinct_videos_far(hashes):
    for index, name in enumerate(originals(hashes)[:2]):
        for copy in COPIES:
            assert distance(hashes[name], hashes[f"{copy}-{index}"]) <= duplicates.MAX_BITS
    distances = [distance(hashes[a], hashes[b]) for a, b in itertools.combinations(originals(hashes), 2)]
    assert min(distances) >= 1.5 * duplicates.MAX_BITS


def test_groups_are_those_of_comparing_every_pair_and_know_no_order(hashes):
    found = groups(hashes)
    first, second, *rest = originals(hashes)
    expected = {name: name for name in rest}
    for index, name in enumerate((first, second)):
        members = [name, *(f"{copy}-{index}" for copy in COPIES)]
        expected |= {member: min(members) for member in members}
    assert found == expected
    names = list(hashes)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        assert groups({name: hashes[name] for name in names}) == expected


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
    found = groups(videos)
    every = {(a, b) for a, b in itertools.combinations(sorted(videos), 2) if duplicates.are_near(videos[a], videos[b])}
    assert {(min(name, group), max(name, group)) for name, group in found.items() if name != group} == every
    assert len(every) == 100


def hexadecimal(row):
    return [f"{value:016x}" for value in row]


def test_frames_without_anything_to_see_do_not_make_videos_alike():
    black = np.zeros((90, 160, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 3, (90, 160, 3), dtype=np.uint8)
    assert duplicates.frame_hash(black) is None
    assert duplicates.frame_hash(noise) is None
    flat = duplicates.sampled([None] * 30, range(30))
    assert flat == [""] * 8
    assert groups({"a": flat, "b": flat}) == {"a": "a", "b": "b"}
    half = ["", "", "", "", *["00000000ffffffff"] * 4]  # four of eight agree: no majority
    assert groups({"a": half, "b": half}) == {"a": "a", "b": "b"}
    assert not duplicates.are_near(half, half)
    assert duplicates.are_near(half[3:] + half[:3], half[3:] + half[:3]) is False
    assert duplicates.are_near(half[4:] + half[4:], half[4:] + half[4:])


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
    table, collector = identity.Identity(scratch()), identity.Collector()
    for name, height, duration_s in (("d", 8, 1.0), ("b", 64, 2.0), ("c", 64, 3.0), ("a", 32, 9.0), ("e", 64, 3.0)):
        look = hashes if name != "d" else hashes[::-1]
        collector.add(name * 64, look, [height, 64], duration_s)
    table.extend("", collector.columns())
    group, best = "a" * 64, "c" * 64
    assert list(table.decide("group")) == [(name * 64, group, None) for name in "bce"]
    expected = [("a", None, best), ("b", group, best), ("c", group, None), ("e", group, best)]
    assert list(table.decide("filter")) == [(name * 64, *rest) for name, *rest in expected]
    assert list(table.decide("off")) == []


def test_videos_that_are_all_alike_are_one_group():
    """A fixed camera films the same for weeks: comparing its clips takes no more memory than others."""
    look = np.random.default_rng(5).integers(0, 2**63, 8)
    videos = {f"{number:05d}": hexadecimal(look ^ (1 << number % 60)) for number in range(3000)}
    assert set(groups(videos).values()) == {"00000"}


def test_no_videos_have_no_decisions():
    assert list(identity.Identity(scratch()).decide("filter")) == []


def videos(with_pairs):
    """Return the arguments of `Collector.add` for 60 videos, some of them near duplicates, some flat, some pairs."""
    rng = np.random.default_rng(11)
    looks = [hexadecimal(rng.integers(0, 2**63, 8)) for _ in range(20)]
    sha256s = [f"{rng.integers(1, 2**62):048x}" + "0" * 16 for _ in range(60)]  # numpy strips trailing zeros
    found = []
    for number in range(60):
        look = [""] * 8 if number % 10 == 9 else looks[number % 20]
        other = (f"{number % 7 + 1:064x}", looks[number % 7]) if with_pairs and number % 3 == 0 else None
        if with_pairs and number % 15 == 1:  # the other camera's video is also a video of its own
            other = (sha256s[number - 1], looks[(number - 1) % 20])
        found.append((sha256s[number], look, [int(rng.integers(1, 4)), 8], float(rng.integers(1, 4)), other))
    return found


def decided(every, how):
    """Return the decisions about videos, comparing each with each."""
    looks, best = {}, {}
    for sha256, look, *_, other in every:
        looks |= {sha256: look} | ({other[0]: other[1]} if other else {})
    together = [(sha256, other[0]) for sha256, *_, other in every if other]
    near = [pair for pair in itertools.combinations(looks, 2) if duplicates.are_near(*map(looks.get, pair))]
    near = near if how != "off" else []
    firsts = connected(looks, near + together)
    own = {facts[0]: (-facts[2][0], -facts[3], facts[0]) for facts in every}
    if how == "filter":
        among = connected(own, [pair for pair in near if set(pair) <= set(own)])
        best = {name: min(own[other] for other in own if among[other] == among[name])[2] for name in own}
    found = [(name, firsts[name], best.get(name, name)) for name in sorted(own)]
    return [(name, *(one if one != name else None for one in rest)) for name, *rest in found if {*rest} != {name}]


def connected(names, pairs):
    """Return {name: the smallest name that pairs connect it with}."""
    firsts = {name: name for name in names}
    for one, other in list(pairs) * 2:
        both = {firsts[one], firsts[other]}
        firsts = {name: min(both) if first in both else first for name, first in firsts.items()}
    return firsts


@pytest.mark.parametrize("with_pairs", [False, True])
@pytest.mark.parametrize("how", ["off", "group", "filter"])
def test_what_other_videos_decide_is_what_comparing_each_with_each_finds(with_pairs, how):
    """Whatever the units, and in whatever order they arrive."""
    every = videos(with_pairs)
    expected = decided(every, how)
    for seed in range(3):
        random.Random(seed).shuffle(every)
        table = identity.Identity(scratch())
        for place, unit in (("b", every[:1]), ("c", []), ("a", every[1:25]), ("d", every[25:59]), ("ab", every[59:])):
            part = identity.Collector()
            for video_facts in unit:
                part.add(*video_facts)
            table.extend(place, unpack_row(pack_row(new_row("unit", **part.columns()))))
        assert list(table.decide(how)) == expected
    assert how == "off" or len(expected) > 20
    assert any(stand_in for *_, stand_in in expected) == (how == "filter")


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
