"""Time packing: with one and with two workers, again with nothing to do, with one changed sample, after `kill -9`.

    python benchmarks/scale/packing.py --samples 20000 --kb 500 --shard-mb 256

Samples are fake; workers of a local Ray build the shards, as in `ex4d preprocess`, each bound to one core, as Ray
reserves one for it: otherwise the threads with which one worker reads would use the second core. Times are wall times
without the start of Ray and of its workers; runs with one and with two workers alternate, so that both see the same
load on the machine. `two bare processes over one` is what the machine allows: the same for processes that only compute
hashes. `--latency-ms 20 --workers` only compares one worker with two on samples that each take that long to fetch, as
from a store; where cores slow each other down, only this shows the benefit of a second worker.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any


def staged(folder: Path) -> list[Any]:
    """Return the samples of a folder."""
    from ex4d.data.shards import Staged

    sizes = json.loads((folder / "samples.json").read_text())
    return [Staged(key, "train", str(folder / f"{key}.1.tar"), *facts) for key, facts in sizes.items()]


def write_sample(folder: Path, key: str, size: int, seed: bytes) -> list[Any]:
    """Write a sample's tar; return [bytes, sha256]."""
    from ex4d.data.tar import sample_tar

    facts = {"key": key, "source_sha256": key.ljust(64, "0"), "source_group": key.ljust(64, "0")}
    facts |= {"source_path": f"{key}.mp4", "start_s": 0.0, "end_s": 3.0, "scores": {"motion": 0.5}}
    body = hashlib.shake_128(seed).digest(size)
    blob = sample_tar(key, {"json": json.dumps(facts).encode(), "mp4": body, "txt": b"a caption"})
    (folder / f"{key}.1.tar").write_bytes(blob)
    return [len(blob), hashlib.sha256(blob).hexdigest()]


def make(folder: Path, count: int, size: int) -> None:
    """Write `count` samples of `size` bytes."""
    folder.mkdir()
    keys = [hashlib.sha256(str(number).encode()).hexdigest()[:16] + "-000000-000048-49" for number in range(count)]
    sizes = {key: write_sample(folder, key, size, key.encode()) for key in keys}
    (folder / "samples.json").write_text(json.dumps(sizes))


def warm(row: dict[str, Any], context: Any) -> dict[str, Any]:
    """Let a worker import the modules that building needs."""
    import pyarrow.parquet  # noqa: F401

    from ex4d.data import building  # noqa: F401

    time.sleep(1.0)
    return {}


def bind(folder: Path) -> None:
    """Bind this process, a worker, to a core that no other worker has; a file in `folder` says that it is taken."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for core in cores:
        with suppress(FileExistsError):
            (folder / f"core-{core}").touch(exist_ok=False)
            os.sched_setaffinity(0, {core})
            return


def build_late(latency_ms: float, row: dict[str, Any], config: Any) -> dict[str, Any]:
    """Run `commit.build_shard` on samples that each take `latency_ms` to fetch."""
    from ex4d import storage
    from pipelines.preprocess.stages import commit

    bind(Path(row["tables"]))
    if latency_ms and not hasattr(storage, "at_once"):
        storage.at_once = storage.read_bytes

        def read_bytes(*args: Any) -> bytes:
            time.sleep(latency_ms / 1000)
            return storage.at_once(*args)

        storage.read_bytes = read_bytes
    return commit.build_shard(row, config)


def pack(
    samples: Path, output: str, workers: int, keep_staging: str, latency_ms: float, shard_mb: int
) -> dict[str, Any]:
    """Pack the samples; return seconds, the number of shards that were built, and the peak disk usage."""
    from ex4d.data import shards
    from pipelines.preprocess.settings import PreprocessConfig
    from pipelines.preprocess.stages.commit import BUILD_SHARD
    from pipelines.runtime.runner import RayConfig, runner, through
    from pipelines.runtime.stage import Counted, Stage, new_row

    stage = replace(BUILD_SHARD, function=partial(build_late, latency_ms))
    items, built = staged(samples), []
    counts = {"videos_in": len(items), "videos_split": len(items), "clips_planned": len(items)}
    facts = {"sample": {"num_frames": 49, "size": [512, 512]}, "counts": counts}
    config = PreprocessConfig(output=output, keep_staging=keep_staging)
    watch = watched(samples, Path(output)) if keep_staging == "none" else nullcontext([0])
    with runner("ray", RayConfig(), workers) as execute, watch as peak:

        def build(plans: Any, output: str, tables: str, work: str | None) -> Iterator[dict[str, Any]]:
            rows = (new_row(plan["name"], plan=plan, output=output, tables=tables, work=work) for plan in plans)
            for row in through(execute, (stage,), Counted(rows, len(plans)), config, ("built",)):
                built.append(row["key"])
                yield row["built"]

        warming = (new_row(f"{n}") for n in range(4 * workers))
        list(through(execute, (Stage("warm", warm, (), ()),), warming, config, ()))
        before, started = read_bytes(), time.monotonic()
        shards.pack(items, output, facts, [], shard_mb << 20, tables=f"{output}/staging/packed", build=build)
        seconds, read = round(time.monotonic() - started, 2), read_bytes() - before
    found = {"seconds": seconds, "shards_built": len(built), "driver_read_mb": round(read / 2**20, 2)}
    return found | {"peak_mb": round(max(peak) / 2**20)}


def read_bytes() -> int:
    """Return the bytes that this process has read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].rpartition(" ")[2])


@contextmanager
def watched(*folders: Path) -> Iterator[list[int]]:
    """Yield a list to which the bytes under some folders are appended several times a second."""
    found, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            with suppress(FileNotFoundError):
                found.append(sum(path.stat().st_size for folder in folders for path in folder.rglob("*")))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def bare(count: int) -> float:
    """Return the seconds that `count` processes take, which each compute the hash of 1.5 GB."""
    processes = [multiprocessing.Process(target=hash_much) for _ in range(count)]
    started = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return time.monotonic() - started


def hash_much() -> None:
    """Compute the hash of 1.5 GB."""
    block = bytes(1 << 25)
    for _ in range(45):
        hashlib.sha256(block).digest()


def tree(output: str) -> str:
    """Return a hash of all files of a dataset."""
    names = sorted(path for path in Path(output).rglob("*") if path.is_file() and "staging" not in path.parts)
    lines = [f"{path.relative_to(output)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in names]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--kb", type=int, default=50)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--shard-mb", type=int, default=32)
    parser.add_argument("--workers", action="store_true", help="compare one worker with two, and nothing else")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(
            json.dumps(
                pack(Path(args.one[0]), args.one[1], int(args.one[2]), args.one[3], args.latency_ms, args.shard_mb)
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples"
        make(samples, args.samples, args.kb * 1000)

        def run(name: str, workers: int, kill_after: int | None = None, keep: str = "all") -> dict[str, Any]:
            output = Path(folder) / name
            command = [sys.executable, __file__, "--latency-ms", str(args.latency_ms), "--shard-mb", str(args.shard_mb)]
            command += ["--one", str(samples), str(output), str(workers), keep]
            os.sync()  # what was written before must not be written to the disk during this run
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            if kill_after is None:
                text, _ = process.communicate()
                return json.loads(text.splitlines()[-1])
            while len(list(output.glob("staging/packed/*.parquet"))) < kill_after or not list(half(output)):
                assert process.poll() is None
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            return {"half a shard": [path.stat().st_size for path in half(output)]}

        def half(output: Path) -> Iterator[Path]:
            return (path for path in output.glob(".tmp-pack/shard-*/*.tar") if path.stat().st_size > 0)

        found: dict[str, Any] = {}
        ratios = []
        for again in ("", " again"):
            for name in ("one", "two"):  # an output takes as much disk as the samples: no more than two at a time
                shutil.rmtree(f"{folder}/{name}", ignore_errors=True)
            found[f"one worker{again}"], found[f"two workers{again}"] = one, two = run("one", 1), run("two", 2)
            ratios.append(round(one["seconds"] / two["seconds"], 2))
        facts = {"samples": args.samples, "kb": args.kb, "latency_ms": args.latency_ms, "load": os.getloadavg()[0]}
        facts["two workers over one"] = ratios
        facts["two bare processes over one"] = [round(2 * bare(1) / bare(2), 2) for _ in range(2)]
        if args.workers:
            print(json.dumps(facts | {"runs": found}))
            return
        whole = tree(f"{folder}/two")
        same = tree(f"{folder}/one") == whole
        shutil.rmtree(f"{folder}/one")
        found["nothing to do"] = run("two", 2)
        found["kill -9"] = run("killed", 2, kill_after=max(1, found["two workers"]["shards_built"] // 3))
        found["after kill -9"] = run("killed", 2)
        same = same and tree(f"{folder}/killed") == whole
        shutil.rmtree(f"{folder}/killed")
        sizes = json.loads((samples / "samples.json").read_text())
        key = sorted(sizes)[len(sizes) // 2]
        sizes[key] = write_sample(samples, key, args.kb * 1000, b"another")
        (samples / "samples.json").write_text(json.dumps(sizes))
        found["one changed sample"] = run("two", 2)
        found["staging dropped"] = run("dropped", 2, keep="none")
        share = found["staging dropped"]["peak_mb"] * 2**20 / sum(size for size, _ in sizes.values())
        facts |= {"same bytes": same, "peak without staging over the samples": round(share, 3)}
        print(json.dumps(facts | {"runs": found}, indent=1))


if __name__ == "__main__":
    main()
