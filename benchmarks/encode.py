"""Measure what encoding costs and saves: clips per second, each model's share, and batches of pixels and of latents.

    python benchmarks/encode.py [--clips 24] [--pairs 5]

Clips of the synthetic corpus at the size of configs/tiny.yaml, the tiny base, one process with one thread. The
trainer's work on a batch without the transformer (reading, decoding, encoding) is timed on both datasets, interleaved,
in CPU time.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ex4d.data import manifest
from ex4d.data.loader import LoaderConfig, ShardLoader
from ex4d.data.texts import TextStore
from ex4d.models.backbone import ModelConfig, load_base
from ex4d.synthetic import SyntheticConfig, write_corpus
from ex4d.train.objective import Encoder, LatentEncoder, NamedNoise
from pipelines.encode import job as encode
from pipelines.preprocess import run as preprocess

QUIET = LoaderConfig(num_threads=0, prefetch_batches=0)


def batches(data: str, encoder: Encoder, seconds: list[float], count: int) -> None:
    """Append the CPU seconds that each of `count` batches of four takes until it is ready for the transformer."""
    loader = ShardLoader(data, "train", 4, 0, config=QUIET)
    for step in range(count):
        started = time.process_time()
        batch = next(loader)
        encoder.encode(batch, [NamedNoise(0, step, key) for key in batch["keys"]], 3.0, "uniform")
        seconds.append(time.process_time() - started)
    loader.close()


def main() -> None:
    """Print the figures as a Markdown list."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", SyntheticConfig(num_videos=args.clips, num_frames=9, size=(96, 96), fps=8.0))
        pixels, latents = str(folder / "dataset"), str(folder / "latents")
        clips = {"num_frames": 9, "size": (96, 96), "val_fraction": 0.0}
        corpus = {"input": str(folder / "corpus"), "output": pixels}
        preprocess.run(preprocess.PreprocessConfig(**corpus, **clips), runner_name="inline")
        config = encode.EncodeConfig(data=pixels, output=latents, dtype="float32")
        result = encode.run(config, ModelConfig(), runner_name="inline")
        print(f"- machine: {platform.machine()}, {platform.python_version()}, torch {torch.__version__}, one thread")
        print(f"- encode: {encode.throughput(result)}")
        for label, data in (("clips", pixels), ("float32 latents", latents)):
            size = sum(shard["filesize"] for shard in manifest.read_index(data)) / result.counts["samples"]
            print(f"- {label}: {size / 1e3:.0f} kB a sample")
        base, texts = load_base("tiny"), TextStore(latents, manifest.read_dataset(latents))
        spent: dict[str, list[float]] = {pixels: [], latents: []}
        for _ in range(args.pairs):
            batches(pixels, Encoder(base, "unit", ""), spent[pixels], 6)
            batches(latents, LatentEncoder(base, texts, ""), spent[latents], 6)
        before, after = (statistics.median(spent[data]) * 1e3 for data in (pixels, latents))
        print(f"- a batch of 4 until the transformer, CPU: {before:.1f} ms from clips, {after:.1f} ms from latents")


if __name__ == "__main__":
    main()
