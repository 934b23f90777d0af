"""`python watched_run.py CONFIG.yaml [NUM_GPUS]`: run preprocess on Ray and print its peak memory as JSON.

Peaks, MB: `driver_mb` and `worker_mb` (the largest Ray worker, its decoding child included) are resident memory without
shared pages; `store_mb` is what the object store ever held at once. With NUM_GPUS Ray believes in so many GPUs, so that
stages which ask for one run in its actors; `actors` are how many processes those were.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections import Counter

import psutil

from ex4d import config
from pipelines.preprocess import run as preprocess


class Watch(threading.Thread):
    """Samples memory every fifth of a second, from the start of Ray to its end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: Counter[str] = Counter()
        self.actors: set[int] = set()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.2):
            here = psutil.Process()
            self._peak("driver_mb", _own_mb(here))
            for process in here.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    command = process.cmdline()[:1]
                    if command and command[0].endswith("raylet/raylet"):
                        self._store(process)
                    elif command and command[0].startswith(("ray::Worker", "ray::run_batch")):
                        if "Worker" in command[0]:
                            self.actors.add(process.pid)
                        children = process.children(recursive=True)
                        self._peak("worker_mb", _own_mb(process) + sum(_own_mb(child) for child in children))

    def _store(self, process: psutil.Process) -> None:
        """The object store is one file of shared memory in the raylet; its pages are taken when first written to."""
        folder = f"/proc/{process.pid}/fd"
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                if "plasma" in os.readlink(f"{folder}/{name}"):
                    self._peak("store_mb", os.stat(f"{folder}/{name}").st_blocks * 512 / 2**20)

    def _peak(self, name: str, value: float) -> None:
        self.peaks[name] = max(self.peaks[name], value)


def _own_mb(process: psutil.Process) -> float:
    memory = process.memory_info()
    return (memory.rss - memory.shared) / 2**20


def main(path: str, num_gpus: int = 0) -> int:
    sections = config.load(path, preprocess.SECTIONS)
    if num_gpus:
        import ray

        store = {"object_store_memory": 500 << 20}
        ray.init(address="local", num_cpus=2, num_gpus=num_gpus, include_dashboard=False, log_to_driver=False, **store)
    watch = Watch()
    watch.start()
    started = time.monotonic()
    result = preprocess.run(sections["preprocess"], sections["ray"])
    watch.done.set()
    watch.join()
    facts = {name: round(value, 1) for name, value in watch.peaks.items()}
    facts |= {
        "actors": len(watch.actors),
        "wall_s": round(time.monotonic() - started, 1),
        "counts": dict(result.counts),
    }
    facts["stage_s"] = {name: round(tally.worker_s, 1) for name, tally in result.stages.items()}
    print(json.dumps(facts))
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
