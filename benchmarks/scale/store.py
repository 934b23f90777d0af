"""Measure the cost of the ledger in an object store with a latency of 20 ms.

    python benchmarks/scale/store.py resume --records 20000
    python benchmarks/scale/store.py resume --records 2000 --old
    python benchmarks/scale/store.py run --videos 12

`resume`: seconds until a run knows what is done, for that many videos and as many samples; `--old`: with one file per
record, as before 2026-11-26. `run`: requests per video and per clip for two-clip videos with depth and captions beside
them. The store is moto in a separate process; the figures include its own latency of some milliseconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
DELAY_S = 0.02
RECORD = {
    "info": {"size": [720, 1280], "duration_s": 12.0, "time_base": [1, 12800], "fps": 25.0, "codec": "h264"},
    "pts_runs": [0, [512, 299]],
    "cuts": [150],
    "shots": [{"box": [0, 0, 720, 1280], "bars": 0.0, "logo": 0.0}] * 2,
    "hashes": ["0123456789abcdef"] * 8,
    "refusal": None,
}


def serve(pipe: Any) -> None:
    """Run the store; send its address, then the request counts on demand."""
    import logging

    import flaky_store

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with flaky_store.object_store(share=0.0) as (address, store):
        pipe.send(address)
        while (delay_s := pipe.recv()) is not None:
            store.delay_s = delay_s
            pipe.send((dict(store.asked), list(store.read)))
            store.asked.clear()
            store.read.clear()


def resume(args: argparse.Namespace, ask: Callable[[float], Any]) -> dict[str, Any]:
    """Return the seconds and requests until the rows of all units of the ledger are ready, its parts read elsewhere."""
    import threading
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

    from ex4d import storage
    from pipelines.preprocess.tables import Tables, digits_for
    from pipelines.runtime import records
    from pipelines.runtime.ledger import Ledger

    records.PARTS_AT_ONCE = 2
    ledger = Ledger("s3://bucket/out")
    videos = [f"videos/{hashlib.sha256(str(number).encode()).hexdigest()}.0123.json" for number in range(args.records)]
    samples = [f"clips/{name[7:23]}-000000-000048-49.0123.tar" for name in videos]
    facts = {
        "scores": {name: 0.5 for name in ("motion", "sharpness", "text", "logo", "bars")},
        "size": 1,
        "sha256": "a" * 64,
    }
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write_bytes(ledger.url(name), b"x"), samples))
        if args.old:
            text = json.dumps(RECORD).encode()
            list(pool.map(lambda name: storage.write_bytes(ledger.url(name), text), videos))
    if not args.old:
        for video, sample in zip(videos, samples, strict=True):
            ledger.records.add(video, RECORD)
            ledger.records.add(sample, facts)
        ledger.records.flush()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(read_part, {"parts": [], "digits": 0}).result()  # start it
        ask(DELAY_S)
        started, cpu = time.monotonic(), time.process_time()
        ledger = Ledger("s3://bucket/out", digits_for(args.records), lambda rows, _: pool.map(read_part, rows))
        if args.old:
            ledger.take({name: name for name in videos})
        units = Tables(ledger.database, ledger.digits).units()
        size = sum(len(ledger.unit(prefix)["records"]) for prefix in units)
        took, cpu = time.monotonic() - started, time.process_time() - cpu
        requests, _ = ask(0.0)
    assert len(ledger.names()) == 2 * args.records
    assert size
    assert threading.active_count() < 100
    return {"records": 2 * args.records, "seconds": round(took, 2), "driver_cpu_s": round(cpu, 2), "requests": requests}


def read_part(row: dict[str, Any]) -> dict[str, Any]:
    """Read some parts of the ledger, as a worker does."""
    from pipelines.runtime.parts import read_parts

    return row | read_parts(row, None)


def run(args: argparse.Namespace, ask: Callable[[float], Any]) -> dict[str, Any]:
    """Return the requests per video of two clips, and how often each video and depth file was read."""
    from ex4d import storage
    from ex4d.geometry.masks import MaskConfig
    from ex4d.synthetic import SyntheticConfig, write_corpus
    from pipelines.preprocess import run as preprocess

    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), SyntheticConfig(num_videos=args.videos, num_frames=17, size=(32, 32), supersample=1))
        for path in Path(folder).iterdir():
            storage.write_bytes(f"s3://bucket/in/{path.name}", path.read_bytes())
        config = preprocess.PreprocessConfig(
            input="s3://bucket/in",
            output="s3://bucket/run",
            num_frames=5,
            size=(32, 32),
            clips_per_shot=2,
            masks=MaskConfig(num_masks=1, visibility=0.0, tracking=0.0, novel_view=1.0),
            cache_dir=f"{folder}/cache",
        )
        ask(DELAY_S)
        result = preprocess.run(config, runner_name="inline")
        requests, read = ask(DELAY_S)
        again = preprocess.run(config, runner_name="inline")
        requests_again, _ = ask(0.0)
    media = [path for path in read if path.startswith("/bucket/in/")]
    return {
        "videos": args.videos,
        "samples": result.counts["samples"],
        "requests": requests,
        "requests_per_video": round(sum(requests.values()) / args.videos, 1),
        "reads_per_file": len(media) / len(set(media)),
        "no_op": {"worked": dict(again.worked), "requests": requests_again},
    }


def main() -> None:
    """Start a store, run one of the measurements and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {function.__name__: function for function in (resume, run)}
    parser.add_argument("what", choices=known)
    parser.add_argument("--records", type=int, default=20000)
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--old", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    server = context.Process(target=serve, args=(other,), daemon=True)
    server.start()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update({"AWS_ENDPOINT_URL": pipe.recv(), **keys})
    import boto3

    boto3.client("s3").create_bucket(Bucket="bucket")

    def ask(delay_s: float) -> Any:
        pipe.send(delay_s)
        return pipe.recv()

    print(json.dumps({"what": args.what, "old": args.old} | known[args.what](args, ask)))
    pipe.send(None)
    server.join(10)


if __name__ == "__main__":
    main()
