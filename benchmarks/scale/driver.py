"""Measure memory and time of the driver of `ex4d preprocess`, with stages that do nothing.

    python benchmarks/scale/driver.py 30000 100000 300000 --fresh inline

For each number of videos (two clips each, from an OpenVid-like list in a store, samples only in shards) there are two
runs, each in its own process: a fresh one, and a second one, which finds everything done. The figures are CPU seconds
of all threads of the driver, and its peak memory, with the pages of libraries and of Ray's object store that it has
touched; one worker of a local Ray does the rest. Videos, samples and their records are fake; Ray, ledger, tables and
dataset tables are real. A fresh run with Ray takes 8 ms a video; with
`--fresh inline` it does the worker's part itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

CAPTION = (
    "A person walks along a street, the camera follows; trees and parked cars pass by in the evening light {}, and "
    "somebody waves at a window."
)
SCORES = {"source_side": 720.0} | {
    name: 0.5 for name in ("motion", "camera_motion", "sharpness", "exposure", "texture", "text")
}
SAMPLE_BYTES, SHARD_MB = 1_000_000, 1024
# Columns that each faked track adds, by the name of its first stage.
WRITES = {
    "identify": ("size_bytes", "depth_file", "depth_place", "caption", "pair", "sha256", "fetched"),
    "probe": ("record", "clips"),
    "decode": ("scores", "staged"),
    "unchanged": ("videos", "videos_ends", "changed", "contents", "record_hashes", "refusal_hashes"),
    "build_shard": ("built",),
}


def write_list(path: Path, count: int) -> None:
    """Write a list of `count` videos with captions."""
    with open(path, "w") as file:
        file.write("video,caption,fps,seconds\n")
        for index in range(count):
            name = hashlib.md5(str(index).encode()).hexdigest()
            file.write(f'{name}_{index}.mp4,"{CAPTION.format(index)}",25.0,12.0\n')


def record_of(key: str) -> dict[str, Any]:
    """Return the record of a fake video of 300 frames and two shots."""
    seed = hashlib.sha256(key.encode()).digest()
    hashes = [f"{int.from_bytes(seed[4 * n : 4 * n + 4], 'big') * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in range(8)]
    info = {"size": [720, 1280], "duration_s": 12.0, "time_base": [1, 12800], "fps": 25.0, "codec": "h264"}
    shot = {"box": [0, 0, 720, 1280], "bars": 0.0, "logo": 0.0}
    found = {"info": info, "pts_runs": [0, [512, 299]], "cuts": [150], "shots": [shot] * 2, "hashes": hashes}
    return {**found, "refusal": None}


def work(name: str, row: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return the columns that the stages of a track would write, of which `name` is the first; runs on a worker."""
    from pipelines.preprocess import fetch, units
    from pipelines.preprocess.unchanged import check_group

    digest = hashlib.sha256(row["key"].encode()).hexdigest()
    if name == "identify":
        facts = {"size_bytes": 5_000_000, "depth_file": "", "depth_place": "", "caption": "", "pair": None}
        note = {"url": row["path"], "tag": f"{digest[:32]} 5000000", "sha256": digest, "size_bytes": 5_000_000}
        return {**facts, "sha256": digest, "fetched": {"video": note}}
    if name == "probe":
        found = {"record": record_of(row["key"])}
        return found | units.FIRST_CLIPS.function(row | found, config)
    if name == "decode":
        return {"scores": SCORES, "staged": {"size": SAMPLE_BYTES, "sha256": digest, "scores": SCORES}}
    if name == "unchanged":
        fetch.storage.beside = beside
        return check_group(row, config)
    return {"built": build(row["plan"], row["output"], row["tables"])}


@dataclass(frozen=True)
class Faked:
    """A runner that does not read or make videos, samples and shards, and leaves everything else to Ray."""

    execute: Any

    @property
    def problems(self) -> Sequence[str]:
        """Sentences about failures of machines."""
        return self.execute.problems

    def __call__(
        self, tracks: Sequence[Any], rows: Iterable[dict[str, Any]], config: Any, added: deque[Any]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (track, finished row), in any order."""
        return self.execute([replace(track, stages=faked(track.stages)) for track in tracks], rows, config, added)


def faked(stages: Sequence[Any]) -> Sequence[Any]:
    """Return one stage that returns what these stages would; or these stages, if they need no video."""
    name = stages[0].name
    if name not in WRITES:
        return stages
    reads = stages[0].reads
    if name == "probe":  # the last stage needs what is in the row and what the others write
        reads = tuple(column for column in stages[-1].reads if column not in ("key", "refusal", "record"))
    return (
        replace(stages[0], function=partial(work, name), reads=("key", *reads), writes=WRITES[name], memory_mb=None),
    )


def beside(url: str) -> dict[str, tuple[int, str]]:
    """Return what a store would list beside a fake video: only the video."""
    sha256 = hashlib.sha256(url.rpartition("/")[2].encode()).hexdigest()
    return {url.rpartition("/")[2]: (5_000_000, f"{sha256[:32]} 5000000")}


def build(plan: dict[str, Any], output: str, tables: str) -> dict[str, Any]:
    """Write an empty shard with the manifest rows of fake samples."""
    import pyarrow.parquet as pq

    from ex4d import storage
    from ex4d.data import building, manifest

    names = ("json", "mp4", "mask.npz", "txt")
    members = [{"name": name, "offset": 512, "length": 1000, "sha256": "ab" * 32} for name in names]
    rows = [
        {
            **{"key": key, "split": plan["split"], "shard": plan["name"], "offset": number * size, "length": size},
            **{"sha256": sha256, "members": members, "scores": SCORES, "start_s": 0.0, "end_s": 3.0},
            **{"source_sha256": key.ljust(64, "0"), "source_group": key.ljust(64, "0"), "source_path": f"{key}.mp4"},
        }
        for number, (key, _, size, sha256) in enumerate(plan["items"])
    ]
    storage.write_bytes(storage.join(output, plan["name"]), b"")
    facts = {"url": plan["name"], "nsamples": len(rows), "filesize": 0, "sha256": "ab" * 32, "digest": plan["digest"]}
    facts |= {"stamp": building.stamp(storage.join(output, plan["name"])), "types": {}, "members": list(names)}
    table = manifest.table(rows, SCORES).replace_schema_metadata({building.FACTS: json.dumps(facts)})
    place = storage.local_path(building.table_url(tables, plan["name"]))
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, place, compression="zstd")
    return facts


def measure(folder: Path, how: str) -> dict[str, Any]:
    """Return CPU seconds of each part of a run, and its peak memory."""
    from pipelines.preprocess import run as preprocess
    from pipelines.preprocess.job import Job
    from pipelines.preprocess.packing import Packing
    from pipelines.preprocess.settings import PreprocessConfig
    from pipelines.runtime.passes import Passes
    from pipelines.runtime.progress import Progress
    from pipelines.runtime.runner import RayConfig, runner

    config = PreprocessConfig(
        **{"output": str(folder / "out"), "input": str(folder / "list.csv"), "list_root": "s3://bucket/video"},
        **{"fps": 16.0, "clips_per_video": 2, "min_shot_s": 3.1, "depth": "parallax", "shard_size_mb": SHARD_MB},
        keep_staging="none",
    )
    parts: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*args)
            finally:
                parts[name] = round(parts.get(name, 0.0) + time.process_time() - begun, 2)
                peaks[name] = peak_mb()

        return call

    for name in ("_rows_to_hash", "_stream", "_compare", "_find_shots", "_plan", "_clips"):
        setattr(Job, name, timed(name.strip("_"), getattr(Job, name)))
    Packing.pack = timed("pack", Packing.pack)
    with runner(how, RayConfig(), 1) as execute:
        start_mb = peak_mb()
        begun, clock = time.process_time(), time.monotonic()
        sources = timed("sources", preprocess.find_sources)(config, None)
        passes = Passes("preprocess", Faked(execute), Progress(config.output), 10)
        job = Job(config, passes, preprocess.stages_of(config), sources)
        timed("ledger", lambda: job.ledger.records)()
        job.tables.decide = timed("decide", job.tables.decide)
        job.work()
        planned_s = time.process_time() - begun
        job.judge()
        result = job.finish()
        job.ledger.flush()
    assert result.committed, result.problems
    facts = {"videos": len(sources), "samples": result.counts["samples"], "worked": dict(result.worked)}
    facts |= {"until_pack_s": round(planned_s, 2), "cpu_s": round(time.process_time() - begun, 2)}
    return facts | {
        "wall_s": round(time.monotonic() - clock, 1),
        "start_mb": start_mb,
        "peak_mb": peak_mb(),
        "parts": parts,
        "peak_mb_after": peaks,
    }


def peak_mb() -> int:
    """Return the peak memory of this process, MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def fitted(sizes: list[int], values: list[float], wanted: int) -> tuple[float, float, float]:
    """Fit a line to the measured points by least squares; return (a, b, a + b × wanted)."""
    slope, constant = np.polyfit(sizes, values, 1)
    return float(constant), float(slope), float(constant + slope * wanted)


def main() -> None:
    """Measure, fit, extrapolate; print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=int, nargs="+")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--fresh", choices=("ray", "inline"), default="ray", help="runner of the fresh runs")
    parser.add_argument("--one", choices=("ray", "inline"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.folder, args.one)))
        return
    found: dict[str, list[dict[str, Any]]] = {"fresh": [], "resumed": []}
    for count in args.videos:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            write_list(Path(folder) / "list.csv", count)
            for name, how in (("fresh", args.fresh), ("resumed", "ray")):
                command = [sys.executable, __file__, str(count), "--folder", folder, "--one", how]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    laws = {}
    for name, runs in found.items():
        for figure in ("until_pack_s", "cpu_s", "peak_mb"):
            values = [run[figure] for run in runs]
            if len(args.videos) > 1:
                laws[f"{name} {figure}"] = [round(fitted(args.videos, values, n)[2]) for n in (10**6, 10**7)]
    print(json.dumps({"runs": found, "extrapolated to 1M and 10M videos": laws}, indent=1))


if __name__ == "__main__":
    main()
