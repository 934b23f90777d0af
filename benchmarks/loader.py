"""Compare our loader with plain webdataset on the same shards.

    python benchmarks/loader.py --hardware "2 x86-64 cores"

Both decode samples with the same function, stack micro batches of the same size, and are timed after a warm-up, in
interleaved pairs (the order within a pair alternates), so that other load on the machine affects both. Two pairings:
both in the caller's thread, comparing CPU time too, and our loader with two threads against a two-process WebLoader.
Writes benchmarks/results/loader.{json,md}.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ex4d.data.decoding import decode_pixels
from ex4d.data.loader import LoaderConfig, ShardLoader, draw_mask
from ex4d.data.sample import MEMBERS, Sample, encode, hole_share
from ex4d.data.shards import Staged, pack
from ex4d.data.tar import sample_tar

RESULTS = Path(__file__).parent / "results"
KINDS = ("visibility", "novel_view", "tracking")
BATCH = 2
PROVENANCE: dict[str, Any] = {
    "source_path": "made.mp4",
    "licence": "",
    "start_pts": 0,
    "end_pts": 48,
    "time_base": "1/24",
    "start_s": 0.0,
    "end_s": 2.0,
    "scores": {},
    "seeds": {},
    "depth": {"estimator": "none", "weights_sha256": ""},
    "versions": {},
    "config_fingerprint": "",
}


def moving_clip(num_frames: int, size: int, seed: int) -> np.ndarray:
    """Return uint8 [T,H,W,3]: a drifting smooth texture with a little grain, which compresses like real video."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(size // 8 + 2, size // 8 + 2, 3))
    big = np.kron(coarse, np.ones((16, 16, 1)))
    kernel = np.hanning(17) / np.hanning(17).sum()
    for axis in (0, 1):
        big = np.apply_along_axis(np.convolve, axis, big, kernel, "same")
    frames = [big[t : t + size, 2 * t : 2 * t + size] for t in range(num_frames)]
    noisy = 128 + 60 * np.stack(frames) + rng.normal(scale=2, size=(num_frames, size, size, 1))
    return noisy.clip(0, 255).astype(np.uint8)


def make_dataset(folder: Path, num_frames: int, size: int, count: int) -> None:
    """Write a dataset of `count` samples with four masks each under `folder`."""
    (folder / "staging").mkdir()
    staged = []
    rows, columns = np.mgrid[:size, :size]
    for index in range(count):
        frames = moving_clip(num_frames, size, index)
        phase = 3 * np.arange(num_frames)[:, None, None]
        visible = np.stack([(columns + phase + rows * (mask + 1)) % 97 > 40 for mask in range(4)])
        sample = Sample(
            key=f"made-{index:04d}",
            frames=frames,
            fps=24.0,
            visible=visible,
            kind=np.full(4, KINDS.index("tracking"), np.uint8),
            hole_share=hole_share(visible),
            K=np.array([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1.0]]),
            w2c=[None] * 4,
            caption="made",
            provenance={**PROVENANCE, "source_sha256": str(index), "source_group": str(index)},
        )
        path = folder / "staging" / f"{sample.key}.tar"
        path.write_bytes(sample_tar(sample.key, encode(sample)))
        staged.append(Staged(sample.key, "train", str(path)))
    counts = {"videos_in": count, "videos_split": count, "clips_planned": count}
    spec = {"num_frames": num_frames, "size": [size, size], "num_masks": 4, "mask_kinds": KINDS}
    pack(staged, str(folder / "dataset"), {"sample": spec, "counts": counts}, [], shard_size_bytes=8 * 2**20)


def ours(folder: Path, threads: int) -> tuple[Iterator[Any], Any]:
    """Return (batches, function that stops them)."""
    loader = ShardLoader(str(folder / "dataset"), "train", BATCH, seed=0, config=LoaderConfig(num_threads=threads))
    return loader, loader.close


def decode_plain(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode a sample with the same function, as a user of plain webdataset would."""
    members = {name: sample[name] for name in MEMBERS}
    return decode_pixels(members, lambda count: draw_mask(count, 0, 0, sample["__key__"]))


def stack_plain(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples to a micro batch."""
    return {name: np.stack([s[name] for s in samples]) for name in ("frames", "visible", "kind", "mask_index")}


def plain(folder: Path, workers: int) -> tuple[Iterator[Any], Any]:
    """Return (batches, function that stops them): in this process, or from worker processes."""
    import webdataset

    shards = sorted(str(path) for path in (folder / "dataset" / "shards").glob("*.tar"))
    pipeline = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).map(decode_plain).repeat()
    pipeline = pipeline.batched(BATCH, collation_fn=stack_plain)
    if not workers:
        return iter(pipeline), lambda: None
    batches = iter(webdataset.WebLoader(pipeline, num_workers=workers, batch_size=None))
    return batches, lambda: None


def rate(opened: tuple[Iterator[Any], Any], warm_up: int, batches: int) -> tuple[float, float]:
    """Return samples per (second, CPU second of this process) over `batches` micro batches after `warm_up`."""
    iterator, close = opened
    for _ in islice(iterator, warm_up):
        pass
    start, cpu = time.perf_counter(), time.process_time()
    samples = sum(len(batch["frames"]) for batch in islice(iterator, batches))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    close()
    return samples / wall, samples / cpu


def compare(folder: Path, threads: int, pairs: int, batches: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (by wall time, by CPU time) the rates of interleaved pairs, their medians, and the sorted ratios."""
    runs: dict[str, list[tuple[float, float]]] = {"ours": [], "webdataset": []}
    sides = [("ours", lambda: ours(folder, threads)), ("webdataset", lambda: plain(folder, threads))]
    for pair in range(pairs):
        for name, opened in sides if pair % 2 == 0 else sides[::-1]:
            runs[name].append(rate(opened(), 2 + 2 * threads, batches))
    return summary(runs, 0), summary(runs, 1)


def summary(runs: dict[str, list[tuple[float, float]]], column: int) -> dict[str, Any]:
    """Return medians and sorted ratios of one kind of rate."""
    rates = {name: [values[column] for values in pairs] for name, pairs in runs.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["webdataset"], strict=True)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"runs": rates, "medians": medians, "ratio": statistics.median(ratios), "ratios": sorted(ratios)}


def markdown(facts: dict[str, Any]) -> str:
    """Return the results as a page."""
    lines = [
        "# Loader against plain webdataset",
        "",
        f"{facts['date']}, {facts['hardware']}. {facts['samples']} samples of {facts['clip']}, "
        f"{facts['bytes_per_sample'] / 1e6:.2f} MB each, micro batch {BATCH}, {facts['pairs']} interleaved pairs; "
        "samples a second.",
        "",
        "| pairing | ours | webdataset | ratio, median | ratio, range |",
        "|---|---|---|---|---|",
    ]
    for name, result in facts["results"].items():
        low, high = result["ratios"][0], result["ratios"][-1]
        ours_rate, plain_rate = result["medians"]["ours"], result["medians"]["webdataset"]
        lines.append(f"| {name} | {ours_rate:.2f} | {plain_rate:.2f} | {result['ratio']:.2f} | {low:.2f}–{high:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="said in the results")
    parser.add_argument("--num-frames", type=int, default=49)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batches", type=int, default=12, help="timed micro batches a run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_dataset(folder, arguments.num_frames, arguments.size, arguments.samples)
        size = sum(path.stat().st_size for path in (folder / "dataset" / "shards").iterdir())
        clock, cpu = compare(folder, 0, arguments.pairs, arguments.batches)
        workers, _ = compare(folder, 2, arguments.pairs, arguments.batches)
    results = {
        "caller's thread, by the clock": clock,
        "caller's thread, by CPU time": cpu,
        "two threads or processes, by the clock": workers,
    }
    facts = {
        "date": datetime.date.today().isoformat(),
        "hardware": arguments.hardware,
        "samples": arguments.samples,
        "clip": f"{arguments.num_frames} × {arguments.size} × {arguments.size}",
        "bytes_per_sample": size / arguments.samples,
        "pairs": arguments.pairs,
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loader.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "loader.md").write_text(markdown(facts), encoding="utf-8")
    print(markdown(facts))


if __name__ == "__main__":
    main()
