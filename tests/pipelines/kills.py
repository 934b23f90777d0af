"""Run preprocess with its Ray in separate processes, so that a test can kill any of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from ex4d import config
from ex4d.data.verify import verify
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.preprocess import run as preprocess

VICTIMS = ("worker", "raylet", "driver")
MAIN = """
import sys
from ex4d import config
from pipelines.preprocess import run as preprocess
sections = config.load(sys.argv[1], preprocess.SECTIONS)
result = preprocess.run(sections["preprocess"], sections["ray"], runner_name=sys.argv[2])
print(result.table())
sys.exit(result.exit_code)
"""


@dataclass
class Run:
    """One run of `ex4d preprocess`, started on creation; `seen` holds all processes that it ever had."""

    output: Path
    process: subprocess.Popen[bytes]
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def look(self) -> dict[int, psutil.Process]:
        """Return the current descendants of the driver."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(process.pid, process)
        return {pid: process for pid, process in self.seen.items() if process.is_running()}

    def find(self, kind: str, rng: np.random.Generator) -> psutil.Process | None:
        """Return the raylet, the driver, or any of Ray's workers; None if there is none yet."""
        if kind == "driver":
            return psutil.Process(self.process.pid) if self.process.poll() is None else None
        found = [process for process in self.look().values() if kind == _kind(process)]
        return found[int(rng.integers(len(found)))] if found else None

    def wait(self, limit_s: float = 240.0) -> int:
        """Wait until the driver and all its descendants have ended, and return the exit status."""
        deadline = time.monotonic() + limit_s
        while self.process.poll() is None or any(_alive(process) for process in self.look().values()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"still there: {[_name(process) for process in self.look().values()]}")
            time.sleep(0.1)
        return self.process.returncode

    def staged(self) -> int:
        """Return the number of finished artifacts."""
        staging = self.output / "staging"
        records = sum(path.read_bytes().count(b" videos/") for path in staging.glob("records/*.records"))
        return records + len(list(staging.glob("clips/[!.]*.tar")))


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:200] or process.name()
    except psutil.Error:
        return ""


def _kind(process: psutil.Process) -> str:
    name = _name(process)
    if "raylet/raylet" in name.split(" ")[0]:
        return "raylet"
    return "worker" if name.startswith("ray::") else ""


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Bench:
    """A corpus and the settings of all runs over it; an output folder belongs to one run, or to several in turn."""

    folder: Path
    sections: dict
    ray_folder: str
    num_artifacts: int

    def start(self, name: str, runner_name: str = "ray") -> Run:
        """Return a run into the output folder `name`, just started."""
        path = self.write_config(name)
        environment = os.environ | {"RAY_TMPDIR": self.ray_folder}
        with open(self.folder / f"{name}.log", "ab") as log:
            command = [sys.executable, "-c", MAIN, str(path), runner_name]
            return Run(self.folder / name, subprocess.Popen(command, stdout=log, stderr=log, env=environment))

    def write_config(self, name: str) -> Path:
        """Return the YAML file of runs into the output folder `name`."""
        path = self.folder / f"{name}.yaml"
        choices = {**self.sections["preprocess"], "output": str(self.folder / name)}
        config.dump({**self.sections, "preprocess": choices}, path)
        return path

    def finish(self, name: str, runner_name: str = "ray") -> str:
        """Return the tree hash after an undisturbed run."""
        log = self.folder / f"{name}.log"
        code = self.start(name, runner_name).wait()
        if code == 1 and "timed out during startup" in log.read_text()[-500:]:  # Ray, on a machine that is too busy
            code = self.start(name, runner_name).wait()
        assert code == 0, log.read_text()[-2000:]
        return self.checked(name)

    def finish_here(self, name: str) -> str:
        """Return the tree hash after a run without Ray in this process."""
        sections = config.load(self.write_config(name), preprocess.SECTIONS)
        assert preprocess.run(sections["preprocess"], runner_name="inline").exit_code == 0
        return self.checked(name)

    def checked(self, name: str) -> str:
        """Return the tree hash of a finished folder, and check that it has no leftovers."""
        report = verify(str(self.folder / name), full=False)
        assert report.ok, str(report)
        leftovers = [path.name for path in (self.folder / name).rglob(".tmp-*")]
        assert leftovers == []
        assert list((self.folder / name).glob("staging/attempts*")) == []
        return report.tree_sha256

    def kill(self, name: str, kinds: Sequence[str], rng: np.random.Generator) -> tuple[list[int], int]:
        """Kill processes of a run; return (number of finished artifacts at each kill, exit status).

        Moments are drawn by progress, since seconds mean little on a busy machine: after that many artifacts and
        up to a quarter of a second. With all of them finished, the shards are being packed.
        """
        run, killed = self.start(name), []
        for moment, kind in zip(sorted(rng.integers(0, self.num_artifacts + 1, len(kinds))), kinds, strict=True):
            while run.process.poll() is None and run.staged() < moment:
                time.sleep(0.01)
            time.sleep(float(rng.uniform(0, 0.25)))
            victim = None
            while run.process.poll() is None and (victim := run.find(kind, rng)) is None:
                time.sleep(0.02)
            run.look()
            killed.append(run.staged())
            if victim is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
        return killed, run.wait()


@contextlib.contextmanager
def bench(folder: Path, num_videos: int, clips_per_video: int) -> Iterator[Bench]:
    """Yield a Bench over synthetic videos with sidecar depth, clips of 9 × 64 × 64."""
    num_frames = 9 * clips_per_video
    write_corpus(
        folder / "in", SyntheticConfig(num_videos=num_videos, num_frames=num_frames, size=(64, 64), supersample=1)
    )
    sections = {
        "preprocess": {
            "input": str(folder / "in"),
            "num_workers": 2,
            "num_frames": 9,
            "size": [64, 64],
            "clips_per_shot": clips_per_video,
            "masks": {"num_masks": 1},
            "val_fraction": 0.2,
        },
        "ray": {"object_store_mb": 100},
    }
    ray_folder = tempfile.mkdtemp(prefix="ex4d-")  # its sockets' names must be short
    try:
        yield Bench(folder, sections, ray_folder, num_videos * (1 + clips_per_video))
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
