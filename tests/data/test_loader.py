"""The loader: one global order, resumable anywhere, each sample once per epoch, no bad sample unnoticed."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock, Semaphore
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_data import REJECTS, SPEC, facts, make_sample

from ex4d import storage
from ex4d.data import cache as cache_module
from ex4d.data import decoding, manifest
from ex4d.data import loader as loader_module
from ex4d.data.cache import RangeCache
from ex4d.data.loader import LoaderConfig, ShardLoader, draw_mask, epoch_order
from ex4d.data.shards import pack
from ex4d.errors import ConfigError, ContractError

TRAIN = 12  # of the sixteen samples
QUIET = LoaderConfig(num_threads=0, prefetch_batches=0)


def keys_only(members, draw):
    """The cheapest decode: the caption and the drawn mask."""
    return {"captions": members["txt"].decode(), "mask_index": np.int64(draw(3))}


def take(dataset, count, threads=0, **arguments):
    """(keys, mask indices, states) of `count` micro batches."""
    config = LoaderConfig(num_threads=threads)
    loader = ShardLoader(str(dataset), "train", seed=5, config=config, decode=keys_only, **arguments)
    try:
        batches = list(itertools.islice(loader, count))
    finally:
        loader.close()
    return [(b["keys"], b["mask_index"].tolist(), b["samples_consumed"]) for b in batches]


def slow_stream(dataset, count):
    """The first `count` samples of the stream: the definition, without ranks, batches or threads."""
    table, _ = loader_module._read_split(str(dataset), "train", manifest.read_dataset(str(dataset)))
    keys, stream = table["key"].to_pylist(), []
    for epoch in itertools.count():
        for row in epoch_order(len(keys), 5, epoch):
            stream.append((keys[row], draw_mask(3, 5, epoch, keys[row])))
            if len(stream) == count:
                return stream


@pytest.mark.parametrize("threads", range(5))
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_order_is_one_at_any_world_size_and_thread_count(dataset16, world_size, threads):
    global_batch, steps = 8, 5  # 40 samples of 12: three epochs, batches that span two
    micro = global_batch // world_size
    ranks = [
        take(dataset16, steps, threads, micro_batch_size=micro, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    expected = slow_stream(dataset16, global_batch * steps)
    for step in range(steps):
        merged = [None] * global_batch
        for rank, batches in enumerate(ranks):
            keys, masks, consumed = batches[step]
            assert consumed == (step + 1) * global_batch
            merged[rank::world_size] = zip(keys, masks, strict=True)
        assert merged == expected[step * global_batch : (step + 1) * global_batch]


def test_every_sample_exactly_once_an_epoch(dataset16):
    keys = [key for batch in take(dataset16, 3 * TRAIN // 4, micro_batch_size=4) for key in batch[0]]
    epochs = [keys[start : start + TRAIN] for start in range(0, len(keys), TRAIN)]
    assert all(len(set(epoch)) == TRAIN and set(epoch) == set(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3  # three different orders
    assert keys == [key for batch in take(dataset16, 12, micro_batch_size=3) for key in batch[0]]


@pytest.mark.parametrize("start", [4, 8, 12, 20, 400])
def test_resume_anywhere_goes_on_as_if_never_stopped(dataset16, start):
    expected = slow_stream(dataset16, start + 8)[start:]
    for world_size in (1, 2, 4):
        arguments = {"micro_batch_size": 8 // world_size, "world_size": world_size, "samples_consumed": start}
        ranks = [take(dataset16, 1, rank=rank, **arguments)[0] for rank in range(world_size)]
        merged = [None] * 8
        for rank, (keys, masks, _) in enumerate(ranks):
            merged[rank::world_size] = zip(keys, masks, strict=True)
        assert merged == expected


def test_resume_reads_nothing_of_what_came_before(dataset16, monkeypatch):
    reads = []
    read = storage.read_bytes
    loader = ShardLoader(str(dataset16), "train", 1, 0, samples_consumed=12_000_003, config=QUIET, decode=keys_only)
    monkeypatch.setattr(storage, "read_bytes", lambda *place: reads.append(place) or read(*place))
    assert next(loader)["samples_consumed"] == 12_000_004
    assert (loader.num_samples, loader.samples_consumed) == (12, 12_000_004)
    assert len(reads) == 1  # one ranged read a sample


def test_state_counts_what_was_handed_out_not_what_was_prefetched(dataset16):
    loader = ShardLoader(str(dataset16), "train", 2, 0, config=LoaderConfig(2, 4), decode=keys_only)
    assert loader.samples_consumed == 0
    next(loader)
    assert loader.samples_consumed == 2
    loader.close()


@given(count=st.integers(1, 200), seed=st.integers(0, 2**40), epoch=st.integers(0, 2**30))
@settings(max_examples=40, deadline=None)
def test_an_epoch_is_a_permutation(count, seed, epoch):
    assert sorted(epoch_order(count, seed, epoch).tolist()) == list(range(count))


def test_the_order_is_pinned():
    """A change of the order would silently break resuming existing runs."""
    assert epoch_order(10, 1, 0).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert draw_mask(4, 1, 0, "abc") == 2
    assert epoch_order(10, 1, 0).tolist() != epoch_order(10, 1, 1).tolist()


def test_masks_are_drawn_evenly_and_by_epoch():
    counts = np.bincount([draw_mask(4, 0, epoch, f"key{k}") for epoch in range(10) for k in range(400)], minlength=4)
    assert (np.abs(counts - 1000) < 120).all()


def test_pixels_are_what_was_packed(dataset16):
    loader = ShardLoader(str(dataset16), "val", 2, 3, config=QUIET)
    batch = next(loader)
    frames, (height, width) = SPEC["num_frames"], SPEC["size"]
    assert batch["frames"].shape == (2, frames, height, width, 3)
    assert batch["frames"].dtype == np.uint8
    assert batch["visible"].shape == (2, frames, height, width)
    assert batch["visible"].dtype == bool
    assert batch["valid"].tolist() == [True, True]
    for place, key in enumerate(batch["keys"]):
        sample = make_sample(int(key.rpartition("-")[2]))
        index = draw_mask(3, 3, 0, key)
        assert batch["mask_index"][place] == index
        assert batch["kind"][place] == sample.kind[index]
        assert batch["captions"][place] == sample.caption
        np.testing.assert_array_equal(batch["visible"][place], sample.visible[index])


@pytest.fixture
def damaged(dataset16, tmp_path):
    """A copy of the dataset in which one training sample's mp4 has one byte flipped, and that sample's key."""
    shutil.copytree(dataset16, tmp_path / "damaged")
    fields = [row for row in pq.read_table(dataset16 / "manifest.parquet").to_pylist() if row["split"] == "train"][4]
    with open(tmp_path / "damaged" / fields["shard"], "r+b") as file:
        file.seek(fields["members"][3]["offset"] + fields["members"][3]["length"] // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    return tmp_path / "damaged", fields["key"]


@pytest.mark.parametrize(("world_size", "threads"), [(1, 0), (1, 2), (2, 0)])
def test_a_bad_sample_is_named_counted_and_keeps_its_place(dataset16, damaged, world_size, threads, caplog):
    (folder, bad_key), ranks_that_met = damaged, 0
    for rank in range(world_size):
        arguments = {"micro_batch_size": 4 // world_size, "rank": rank, "world_size": world_size}
        good = take(dataset16, 6, **arguments)
        config = LoaderConfig(num_threads=threads)
        loader = ShardLoader(str(folder), "train", seed=5, config=config, **arguments)
        batches = list(itertools.islice(loader, 6))
        loader.close()
        assert [batch["keys"] for batch in batches] == [keys for keys, _, _ in good]
        for batch in batches:
            assert batch["valid"].tolist() == [key != bad_key for key in batch["keys"]]
            for place in np.flatnonzero(~batch["valid"]):
                assert not batch["frames"][place].any()
        met = any(bad_key in batch["keys"] for batch in batches)
        ranks_that_met += met
        assert list(loader.bad) == ([bad_key] if met else [])
    named = [record for record in caplog.records if bad_key in record.getMessage()]
    assert len(named) == ranks_that_met >= 1  # once a rank, not once an epoch
    assert "sha256" in named[0].getMessage()


def test_a_batch_of_bad_samples_only_still_has_its_shape(damaged):
    folder, bad_key = damaged
    order = slow_stream(folder, TRAIN)
    place = [key for key, _ in order].index(bad_key)
    loader = ShardLoader(str(folder), "train", 1, 5, samples_consumed=place, config=QUIET)
    batch = next(loader)
    assert (batch["keys"], batch["valid"].tolist()) == ([bad_key], [False])
    assert batch["frames"].shape == (1, SPEC["num_frames"], *SPEC["size"], 3)


def test_too_many_bad_samples_stop_the_run(damaged):
    loader = ShardLoader(str(damaged[0]), "train", 12, 5, config=LoaderConfig(0, 0, max_bad_samples=0))
    with pytest.raises(ContractError, match=damaged[1]):
        next(loader)


def test_a_missing_shard_stops_the_run(dataset16, tmp_path):
    shutil.copytree(dataset16, tmp_path / "copy")
    for path in (tmp_path / "copy" / "shards").glob("train-*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="train-0000"):
        next(ShardLoader(str(tmp_path / "copy"), "train", 1, 0, config=LoaderConfig(num_threads=1)))


def test_a_foreign_manifest_is_refused(dataset16, tmp_path):
    shutil.copytree(dataset16, tmp_path / "copy")
    with open(tmp_path / "copy" / "manifest.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(ContractError, match=r"manifest\.parquet"):
        ShardLoader(str(tmp_path / "copy"), "train", 1, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"split": "test"},
        {"micro_batch_size": 0},
        {"rank": 2, "world_size": 2},
        {"samples_consumed": 3, "world_size": 2},
        {"seed": -1},
    ],
)
def test_arguments_out_of_range_are_refused(dataset16, wrong):
    with pytest.raises(ConfigError):
        ShardLoader(**{"dataset": str(dataset16), "split": "train", "micro_batch_size": 1, "seed": 0, **wrong})


def test_an_object_store_with_a_cache_gives_the_same_and_reads_once(staged16, dataset16, tmp_path, monkeypatch):
    pack(staged16, "memory://loaded", facts(16), REJECTS, shard_size_bytes=100_000)
    reads, read = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda *place: reads.append(place) or read(*place))
    config = LoaderConfig(num_threads=0, cache_dir=str(tmp_path / "cache"))
    loader = ShardLoader("memory://loaded", "train", 4, 5, config=config, decode=keys_only)
    keys = [next(loader)["keys"] for _ in range(9)]
    assert len([place for place in reads if str(place[0]).endswith(".tar")]) == TRAIN  # of 36 requests
    assert keys == [batch[0] for batch in take(dataset16, 9, micro_batch_size=4)]


def test_a_damaged_copy_in_the_cache_is_fetched_again(staged16, tmp_path):
    pack(staged16, "memory://healed", facts(16), REJECTS, shard_size_bytes=100_000)
    config = LoaderConfig(0, 0, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        loader = ShardLoader("memory://healed", "train", TRAIN, 5, config=config, decode=keys_only)
        assert next(loader)["valid"].all()
        for path in (tmp_path / "cache").iterdir():
            path.write_bytes(b"\0" + path.read_bytes()[1:])
    assert not loader.bad


def test_the_cache_stays_within_its_bound(tmp_path):
    (tmp_path / "source").write_bytes(bytes(range(250)) * 40)
    cache = RangeCache(tmp_path / "cache", max_bytes=1000, identity="d")
    for offset in range(0, 5000, 100):
        assert cache.read(str(tmp_path / "source"), offset, 100)[0] == offset % 250
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 1000 + 100
    assert cache.read(str(tmp_path / "source"), 0, 2000) == (bytes(range(250)) * 8)  # too large to keep, still read


def test_a_range_that_is_under_way_is_not_asked_for_again(tmp_path, monkeypatch):
    asked, go_on, waiting = [], Event(), Semaphore(0)

    def slow(*place):
        asked.append(place)
        assert go_on.wait(60)
        return b"range"

    class Watched:
        """A lock that signals when a thread is about to wait for it."""

        def __init__(self):
            self.lock = Lock()

        def __enter__(self):
            waiting.release()
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()

    monkeypatch.setattr(storage, "read_bytes", slow)
    cache = RangeCache(tmp_path / "cache", max_bytes=1000, identity="d")
    monkeypatch.setattr(cache_module, "threading", SimpleNamespace(Lock=Watched))
    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(cache.read, "s3://somewhere", 0, 5) for _ in range(3)]
        all_there = all([waiting.acquire(timeout=30) for _ in range(3)])
        go_on.set()
        assert [reader.result(60) for reader in readers] == 3 * [b"range"]
    assert all_there
    assert len(asked) == 1
    assert not cache._under_way, "nothing is kept of a read that ended"


@pytest.mark.parametrize("threads", [0, 2])
def test_frames_are_decoded_to_their_place_in_the_batch(dataset16, threads):
    """The fast path against its slow twin: the same decoder passed explicitly, whose samples are stacked afterwards."""
    config = LoaderConfig(num_threads=threads)
    fast, slow = (
        ShardLoader(str(dataset16), "train", 3, 5, config=config, decode=decode)
        for decode in (None, decoding.decoder_of(manifest.read_dataset(str(dataset16))))
    )
    batches = [(next(fast), next(slow)) for _ in range(5)]
    for ours, twin in batches:
        assert ours["frames"].flags.owndata, "the array that was decoded to, not a copy of it"
        assert ours.keys() == twin.keys()
        for name in ("frames", "visible", "kind", "mask_index", "valid"):
            np.testing.assert_array_equal(ours[name], twin[name])
            assert ours[name].dtype == twin[name].dtype
    # Later batches do not change an earlier one.
    assert not np.shares_memory(batches[0][0]["frames"], batches[1][0]["frames"])
    fast.close()
    slow.close()


def test_frames_that_are_not_the_datasets_are_a_bad_sample(dataset16):
    loader = ShardLoader(str(dataset16), "train", 2, 5, config=QUIET)
    loader._frame_shape = (SPEC["num_frames"] + 4, *SPEC["size"], 3)
    assert next(loader)["valid"].tolist() == [False, False]
    assert all("where 9 are expected" in why for why in loader.bad.values())
