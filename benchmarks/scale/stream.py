"""Measure how busy the stream keeps a pretended cluster; stages sleep, so that two cores can stand for sixteen.

    python benchmarks/scale/stream.py utilisation --cpus 8 --rows 160
    python benchmarks/scale/stream.py loads --rows 300
    python benchmarks/scale/stream.py gpu --rows 240
    python benchmarks/scale/stream.py rate --rows 20000

`utilisation`: rows of 0.6 to 1.3 s; share of the workers' time spent working. `loads`: how often the actors of a GPU
load a model. `gpu`: 16 CPUs and one GPU, with the times of decoding, depth and masks for a clip of 49 × 512 × 512,
divided by SPEED; depth holds a lock, like a single GPU. `rate`: rows per second through a stage that does nothing.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPEED = 4.0
DECODE_S, DEPTH_S, MASKS_S = 0.33, 0.25, 6.77  # from before masks became cheaper, for comparable figures
FOLDER = Path(os.environ.get("EX4D_SCALE_FOLDER", "/tmp/ex4d-scale"))


def sleeper(row: dict[str, Any], context: Any) -> dict[str, Any]:
    """Sleep for the row's duration."""
    started = time.monotonic()
    time.sleep(row["sleep_s"])
    return {"worked_s": time.monotonic() - started}


def feed(row: dict[str, Any], context: Any) -> dict[str, Any]:
    """Sleep for the duration of decoding."""
    time.sleep(DECODE_S / SPEED)
    return {"frames": 1}


def on_gpu(row: dict[str, Any], context: Any) -> dict[str, Any]:
    """Sleep for the duration of depth, one call at a time; a process's first call loads the model."""
    if not hasattr(on_gpu, "loaded"):
        on_gpu.loaded = True  # type: ignore[attr-defined]
        with open(FOLDER / "loads", "a") as file:
            file.write("loaded\n")
    with open(FOLDER / "gpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        time.sleep(DEPTH_S / SPEED)
    return {"z_depth": 1}


def masks(row: dict[str, Any], context: Any) -> dict[str, Any]:
    """Sleep for the duration of masks."""
    time.sleep(MASKS_S / SPEED)
    return {"visible": 1}


def nothing(row: dict[str, Any], context: Any) -> dict[str, Any]:
    """Do nothing."""
    return {"done": True}


def utilisation(count: int, cpus: int) -> dict[str, float]:
    """Return the share of the workers' time spent working, over the whole run and over its middle half."""
    from pipelines.runtime import runner
    from pipelines.runtime.stage import Stage, new_row

    stages = (Stage("sleep", sleeper, reads=("sleep_s",), writes=("worked_s",)),)
    draw = random.Random(0)
    rows = [new_row(f"row-{number}", sleep_s=0.6 + 0.7 * draw.random()) for number in range(count)]
    execute = runner.OnRay(runner.RayConfig(), None)
    list(
        runner.through(
            execute, stages, [new_row(f"warm-{number}", sleep_s=0.5) for number in range(4 * cpus)], None, ()
        )
    )
    started, worked = time.monotonic(), 0.0
    for row in runner.through(execute, stages, rows, None, ("worked_s",)):
        worked += row["worked_s"]
    return {"utilisation": worked / cpus / (time.monotonic() - started)}


def gpu(count: int, cpus: int) -> dict[str, float]:
    """Return the steady rate in clips per second of real time, and the utilisation of GPU and CPUs at that rate."""
    done: list[float] = []
    for _ in _through_gpu(count):
        done.append(time.monotonic())
    first, last = len(done) // 4, 3 * len(done) // 4
    rate = (last - first) / (done[last] - done[first]) / SPEED
    return {"clips_per_s": rate, "gpu_busy": rate * DEPTH_S, "cpu_busy": rate * (DECODE_S + MASKS_S) / cpus}


def loads(count: int, cpus: int) -> dict[str, float]:
    """Return how many actors loaded a model."""
    num_rows = sum(1 for _ in _through_gpu(count))
    return {"rows": num_rows, "loads": len((FOLDER / "loads").read_text().split())}


def rate(count: int, cpus: int) -> dict[str, float]:
    """Return rows per second, and the driver's CPU seconds per 1,000 rows."""
    from pipelines.runtime import runner
    from pipelines.runtime.stage import Stage, new_row

    pts = list(range(49))
    rows = (
        new_row(f"row-{number:07d}", pts=pts, caption="a person walks along a street " * 5) for number in range(count)
    )
    execute = runner.OnRay(runner.RayConfig(), None)
    stages = (Stage("nothing", nothing, reads=("pts",), writes=("done",)),)
    started, cpu = time.monotonic(), time.process_time()
    num_rows = sum(1 for _ in runner.through(execute, stages, rows, None, ()))
    used = time.process_time() - cpu
    return {"rows_per_s": num_rows / (time.monotonic() - started), "driver_cpu_s_per_1000": 1000 * used / num_rows}


def _through_gpu(count: int) -> Iterator[dict[str, Any]]:
    from pipelines.runtime import runner
    from pipelines.runtime.stage import Stage, new_row

    stages = (
        Stage("decode", feed, reads=("key",), writes=("frames",)),
        Stage("depth", on_gpu, reads=("frames",), writes=("z_depth",), num_gpus=0.25),
        Stage("masks", masks, reads=("z_depth",), writes=("visible",)),
    )
    execute = runner.OnRay(runner.RayConfig(), None)
    return runner.through(execute, stages, (new_row(f"row-{number}") for number in range(count)), None, ())


def main() -> None:
    """Run one of the measurements and print it as JSON."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {function.__name__: function for function in (utilisation, loads, gpu, rate)}
    parser.add_argument("what", choices=known)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--cpus", type=int, default=16)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "loads").unlink(missing_ok=True)
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=args.cpus, num_gpus=1, object_store_memory=300 << 20, **quiet)
    found = known[args.what](args.rows, args.cpus)
    print(json.dumps({"what": args.what, "rows": args.rows, "cpus": args.cpus} | found))
    ray.shutdown()


if __name__ == "__main__":
    main()
