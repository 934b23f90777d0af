"""Run the separate validation (`validation`) from rank 0: start it, wait for it, read its result."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from ex4d import storage
from ex4d.train.config import TrainConfig
from ex4d.train.job import Job

logger = logging.getLogger(__name__)

PARENT = "EX4D_VALIDATION_PARENT"  # process id of the rank whose child this is
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CHECK_S = 0.2


class Handle(Protocol):
    """A running validation."""

    def poll(self) -> int | None:
        """Return its exit status, or None while it runs."""

    def kill(self) -> None:
        """End it."""


class Child:
    """A validation in a process of this machine. Raises OSError if it cannot be started."""

    def __init__(self, folder: Path, device: str):
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        environment |= {PARENT: str(os.getpid()), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "ex4d.train.validation", str(folder)]
        with open(folder / "log.txt", "wb", opener=storage.no_links) as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
        Path(f"/proc/{self._process.pid}/oom_score_adj").write_text("1000")

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Kill the process and its children."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Validator:
    """Evaluates weights, one set at a time, on rank 0. No method except `wait` blocks, and none raises.

    Args:
        config: settings of the run.
        job: the run's job; its facts and `write_adapter` are used.
        start: (folder of a step, device) -> handle of the running validation.
    """

    def __init__(self, config: TrainConfig, job: Job, start: Callable[[Path, str], Handle] = Child):
        self.config, self.job, self.start = config, job, start
        self._running: tuple[int, Handle, float] | None = None
        self._next: int | None = None  # the last step, if it waits for an earlier validation to end
        self._results: list[dict[str, Any]] = []

    def submit(self, step: int, weights: Mapping[str, Tensor]) -> list[str]:
        """Start the validation of a step; return the future paths of its videos, relative to the run's folder.

        If the previous validation is still running, this one is skipped; that of the last step waits instead.
        """
        self._collect()
        last = step >= self.config.num_steps
        if self._running and not last:
            self._fail(step, f"skipped: the validation of step {self._running[0]} was still running")
            return []
        folder = step_folder(self.config.output, step)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            self.job.write_adapter(folder, weights, step)
            chosen = {name: self.job.facts.get(name) for name in ("train", "model", "dtype")}
            (folder / "job.json").write_text(json.dumps(chosen), encoding="utf-8")
        except (OSError, SafetensorError) as error:  # no space
            self._fail(step, str(error))
            return []
        if self._running:
            self._next = step
        elif not self._start(step):
            return []
        return [f"validation/{folder.name}/clip-{index}.mp4" for index in range(self.config.validate_videos)]

    def _start(self, step: int) -> bool:
        try:
            handle = self.start(step_folder(self.config.output, step), self.config.validate_device)
        except OSError as error:  # no memory, no more processes
            self._fail(step, str(error))
            return False
        self._running = (step, handle, time.monotonic())
        return True

    def results(self) -> list[dict[str, Any]]:
        """Return the results since the last call.

        Each is {"step", "validation_loss", "videos": paths, "seconds"} or {"step", "failed": reason}.
        """
        self._collect()
        results, self._results = self._results, []
        return results

    def wait(self, stop_asked: Callable[[], bool]) -> list[dict[str, Any]]:
        """Wait for the last results, until the deadline or a request to stop, and return them."""
        self._collect()
        while self._running and not stop_asked():
            time.sleep(CHECK_S)
            self._collect()
        self.close()
        return self.results()

    def close(self) -> None:
        """Stop the running validation."""
        if self._running:
            self._running[1].kill()
            self._fail(self._running[0], "the training ended before it")
            self._running = None
        if self._next is not None:
            self._fail(self._next, "the training ended before it")
            self._next = None

    def _collect(self) -> None:
        if self._running is None:
            return
        step, handle, start = self._running
        seconds, status = time.monotonic() - start, handle.poll()
        if status is None and seconds <= self.config.validate_timeout_s:
            return
        self._running = None
        folder = step_folder(self.config.output, step)
        if status is None:
            handle.kill()
            self._fail(step, f"abandoned after {self.config.validate_timeout_s:g} s (train.validate_timeout_s)")
        elif status:
            self._fail(step, f"ended with exit status {status}; see {folder}/log.txt")
        else:
            self._read(folder, step, seconds)
        (folder / "adapter.safetensors").unlink(missing_ok=True)
        if self._next is not None:
            following, self._next = self._next, None
            self._start(following)

    def _read(self, folder: Path, step: int, seconds: float) -> None:
        try:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            loss, names = result["validation_loss"], result["videos"]
            if not (loss is None or math.isfinite(loss)) or not all((folder / name).is_file() for name in names):
                raise ValueError("the loss is not a finite number, or a video is missing")
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._fail(step, f"its result cannot be read: {error}")
            return
        videos = [f"validation/{folder.name}/{name}" for name in names]
        self._results.append({"step": step, "validation_loss": loss, "videos": videos, "seconds": round(seconds, 3)})

    def _fail(self, step: int, why: str) -> None:
        logger.warning("validation of step %d: %s; the training continues", step, why)
        self._results.append({"step": step, "failed": why})


def step_folder(output: str | Path, step: int) -> Path:
    """Return the folder of a step's validation."""
    return Path(output) / "validation" / f"step-{step:06d}"
