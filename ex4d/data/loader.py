"""Load batches of samples in one global order, the same for any number of ranks, threads and restarts.

The stream of samples is endless: epoch after epoch, each a permutation drawn from (seed, epoch). Sample g of the stream
goes to rank g mod world size. A step takes consecutive samples, possibly from two epochs, so that every rank always
has a full batch. The entire state is the number of samples consumed by all ranks together.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from ex4d import storage
from ex4d.config import checked, setting
from ex4d.data import foreign, manifest
from ex4d.data.cache import RangeCache
from ex4d.data.decoding import Decode
from ex4d.data.tar import read_sample
from ex4d.errors import BadSample, ConfigError, ContractError

log = logging.getLogger(__name__)

Batch = dict[str, Any]
Item = tuple[str, dict[str, Any] | None, str]  # key, values or None, why there are none


@dataclass(frozen=True)
class LoaderConfig:
    """Settings for fetching samples. None of them changes which samples come, or in which order."""

    num_threads: int = setting(2, "Threads that read and decode; 0: the training thread does it.", ge=0)
    prefetch_batches: int = setting(2, "Micro batches prepared ahead of the one in use.", ge=0)
    cache_dir: str | None = setting(None, "Local folder that caches samples of an object store; null: no cache.")
    cache_size_bytes: int = setting(20 * 2**30, "Maximum size of that cache.", ge=0)
    trust: str = setting(
        "auto", "Origin of the dataset: own, foreign or auto; foreign samples are decoded in a sandbox."
    )
    max_bad_samples: int = setting(100, "Stop a rank after more than this many damaged samples.", ge=0)

    def __post_init__(self) -> None:
        checked(self, "train.loader")


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return int64 [num_samples], the permutation of one epoch.

    NumPy guarantees that Philox's raw numbers stay the same in every version, but not Generator.permutation.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(generator.random_raw(num_samples), kind="stable")


def draw_mask(num_masks: int, seed: int, epoch: int, key: str) -> int:
    """Return which of a sample's masks an epoch uses, in [0, num_masks)."""
    digest = hashlib.sha256(f"mask:{seed}:{epoch}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % num_masks


class ShardLoader(Iterator[Batch]):
    """An endless iterator of micro batches of one rank.

    A batch holds the values of `decode`, stacked (numbers and arrays) or listed (text), and `keys` (list), `valid`
    bool [B], `samples_consumed` int: the state after it, for all ranks together. A sample that cannot be read keeps its
    place, zero-filled and with `valid` False, so that all ranks stay in step and the order does not change; its loss
    must have weight 0. It is logged once and recorded in `bad`.

    Args:
        dataset: folder of a finished dataset, local or in an object store.
        split: "train" or "val".
        micro_batch_size: samples per batch on this rank.
        seed: of the order and of the masks.
        rank, world_size: this rank takes sample g of the stream if g mod world_size equals rank.
        samples_consumed: where to start, as a batch's `samples_consumed`; a multiple of world_size.
        decode: ({member: bytes}, draw) -> values of one sample; raises ContractError or BadSample for a bad one. None:
            `decoder_of` the dataset.
        with_source: also load the scene from the other camera, if `decode` is None; see `decoder_of`.

    Raises:
        ConfigError: an argument is out of range, or the split has no samples.
        ContractError: the dataset is not finished, or its manifest differs from the hash in dataset.json.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        samples_consumed: int = 0,
        config: LoaderConfig | None = None,
        decode: Decode | None = None,
        with_source: bool = False,
    ):
        if micro_batch_size < 1 or not 0 <= rank < world_size or seed < 0:
            raise ConfigError(
                "micro_batch_size, rank, world_size, seed",
                (micro_batch_size, rank, world_size, seed),
                "micro_batch_size >= 1, 0 <= rank < world_size, seed >= 0",
            )
        if samples_consumed < 0 or samples_consumed % world_size:
            raise ConfigError("samples_consumed", samples_consumed, f"a multiple of world_size {world_size}")
        facts = manifest.read_dataset(dataset)
        self.dataset, self.seed = dataset, seed
        self.config = config or LoaderConfig()
        self.decode = decode or foreign.decoder_of(dataset, facts, self.config.trust, with_source)
        self.rank, self.world_size, self.micro_batch_size = rank, world_size, micro_batch_size
        # Shape of frames that can be decoded straight into the batch, which saves a copy of nine megabytes per clip.
        spec = facts.get("sample", {}) if decode is None and "latents" not in facts else {}
        self._frame_shape = (spec["num_frames"], *spec["size"], 3) if spec else None
        self.table, identity = _read_split(dataset, split, facts)
        self.num_samples = len(self.table)
        self.samples_consumed = samples_consumed
        self.bad: dict[str, str] = {}
        self._next = samples_consumed  # start of the next batch to submit; ahead of samples_consumed by the prefetch
        self._order = lru_cache(maxsize=2)(lambda epoch: epoch_order(self.num_samples, seed, epoch))
        self._pool = ThreadPoolExecutor(self.config.num_threads, "loader") if self.config.num_threads else None
        self._pending: deque[tuple[int, list[Future]]] = deque()
        self._blank: dict[str, Any] | None = None
        folder = self.config.cache_dir
        self._cache = RangeCache(folder, self.config.cache_size_bytes, identity) if folder else None

    def __next__(self) -> Batch:
        while len(self._pending) <= (self.config.prefetch_batches if self._pool else 0):
            self._submit()
        end, futures = self._pending.popleft()
        batch = self._stack([future.result() for future in futures])
        self.samples_consumed = batch["samples_consumed"] = end
        return batch

    def close(self) -> None:
        """Stop the threads and drop pending batches."""
        self._pending.clear()
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        places = range(self._next + self.rank, self._next + self.micro_batch_size * self.world_size, self.world_size)
        self._next += self.micro_batch_size * self.world_size
        futures = []
        frames = None if self._frame_shape is None else np.empty((len(places), *self._frame_shape), np.uint8)
        for slot, place in enumerate(places):
            epoch, index = divmod(place, self.num_samples)
            what = (int(self._order(epoch)[index]), epoch, None if frames is None else frames[slot])
            futures.append(self._pool.submit(self._load, *what) if self._pool else _now(self._load, *what))
        self._pending.append((self._next, futures))

    def _load(self, row: int, epoch: int, into: np.ndarray | None = None) -> Item:
        """Read and decode one sample, its frames into `into` if that is given."""
        fields = self.table.slice(row, 1).to_pylist()[0]
        key = fields["key"]
        try:
            members = self._read(fields)
            place = {} if into is None else {"into": into}
            return key, self.decode(members, lambda count: draw_mask(count, self.seed, epoch, key), **place), ""
        except (ContractError, BadSample) as error:
            return key, None, str(error)

    def _read(self, fields: dict[str, Any]) -> dict[str, bytes]:
        url = storage.join(self.dataset, fields["shard"])
        place = (url, fields["offset"], fields["length"])
        if self._cache is None:
            return _checked(storage.read_bytes(*place), fields)
        try:
            return _checked(self._cache.read(*place), fields)
        except ContractError:
            self._cache.forget(*place)  # the cached copy may be damaged while the original is intact
            return _checked(storage.read_bytes(*place), fields)

    def _stack(self, items: list[Item]) -> Batch:
        for key, values, why in items:
            if values is None and key not in self.bad:
                self.bad[key] = why
                log.warning("bad sample %s is skipped (%d so far): %s", key, len(self.bad), why)
        if len(self.bad) > self.config.max_bad_samples:
            key, why = list(self.bad.items())[-1]
            raise ContractError(f"{len(self.bad)} bad samples in {self.dataset}; the last: {key}: {why}")
        good = [values if values is not None else self._blank_like(items) for _, values, _ in items]
        batch: Batch = {name: _joined([values[name] for values in good]) for name in good[0]}
        batch["keys"] = [key for key, _, _ in items]
        batch["valid"] = np.array([values is not None for _, values, _ in items])
        return batch

    def _blank_like(self, items: list[Item]) -> dict[str, Any]:
        """Return zeros shaped like a good sample: one of the batch, else the first of the dataset."""
        if self._blank is None:
            near = (values for _, values, _ in items if values is not None)
            far = (self._load(row, 0)[1] for row in range(self.num_samples))
            like = next(near, None) or next((values for values in far if values is not None), None)
            if like is None:
                raise ContractError(f"{self.dataset}: none of the {self.num_samples} samples can be read")
            self._blank = {k: "" if isinstance(v, str) else np.zeros_like(v) for k, v in like.items()}
        return self._blank


def _read_split(dataset: str, split: str, facts: Mapping[str, Any]) -> tuple[pa.Table, str]:
    """Return the manifest rows of one split, in order, and the manifest's sha256, which identifies the dataset."""
    if split not in manifest.SPLITS:
        raise ConfigError("split", split, f"allowed: {', '.join(manifest.SPLITS)}")
    identity = facts["sha256"].get(manifest.MANIFEST)
    columns = ["key", "split", "shard", "offset", "length", "sha256"]
    table = manifest.read_table(dataset, manifest.MANIFEST, columns, sha256=identity)
    table = table.filter(pa.compute.equal(table["split"], split)).combine_chunks()
    manifest.check_shard_names(table)
    if not len(table):
        raise ConfigError("split", split, f"has no samples in {dataset}")
    return table, identity


def _checked(blob: bytes, fields: dict[str, Any]) -> dict[str, bytes]:
    """Return {member: bytes} after checking the sha256: damaged H.264 may decode without an error."""
    if hashlib.sha256(blob).hexdigest() != fields["sha256"]:
        raise ContractError(f"{fields['shard']}: sha256 of the sample is wrong; `ex4d verify` names the member")
    return read_sample(blob, fields["key"])


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], str):
        return values
    whole = getattr(values[0], "base", None)
    if whole is not None and whole.shape == (len(values), *values[0].shape) and all(v.base is whole for v in values):
        return whole  # they were decoded in place
    return np.stack(values) if len(values) > 1 else np.asarray(values[0])[None]  # a single one needs no copy


def _now(function: Callable[..., Any], *arguments: Any) -> Future:
    future: Future = Future()
    future.set_result(function(*arguments))
    return future
