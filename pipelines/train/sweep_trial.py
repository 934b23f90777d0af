"""One trial of a sweep: the same `ex4d train` that a user runs, in separate processes, followed through its log.

    OUTPUT/trials/NAME/config.yaml, train.log, train/      can be rerun by hand with `ex4d train config.yaml`

The name is derived from the configuration, so that a restarted sweep finds its trials and resumes them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ex4d import config, storage
from ex4d.train import checkpoint, runlog
from pipelines.runtime.cluster import free_address
from pipelines.train.launch import PARENT
from pipelines.train.sweep_config import SweepConfig
from pipelines.train.sweep_space import Space, value_in, with_values

CHECKPOINT_WAIT_S = 120.0


def follow(path: Path, process: subprocess.Popen, poll_s: float = 0.2) -> Iterator[dict[str, Any]]:
    """Yield the record of each step from a growing log, until the process that writes the log has ended.

    A resumed run replaces the log by one without the steps that it repeats; no step is yielded twice.
    """
    offset, inode, last = 0, 0, -1
    while True:
        ended = process.poll() is not None
        if path.exists():
            with open(path, "rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != inode or now.st_size < offset:
                    inode, offset = now.st_ino, 0
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written: read again from here
                    offset += len(line)
                    record = json.loads(line)
                    if record["step"] > last:
                        last = record["step"]
                        yield record
        if ended:
            return
        time.sleep(poll_s)


def trial_folder(sweep: SweepConfig, point: Mapping[str, Any], tree: Mapping[str, Any], trial_id: str) -> Path:
    """Return the folder of a trial, named by the settings that differ from the file's own values, or by its id in PBT.

    Args:
        point: the complete point (Space.whole).
    """
    changed = {key: value for key, value in sorted(point.items()) if value != value_in(tree, key)}
    name = trial_id if sweep.search == "pbt" else config.fingerprint(changed)
    return Path(sweep.output) / "trials" / name


def run_trial(drawn: dict[str, Any], tree: dict[str, Any], sweep: SweepConfig) -> None:
    """Train at one point of the space and report at each rung. Runs inside a Ray worker.

    Reports what `rungs` yields, so that all trials are compared after the same number of steps.
    """
    from ray import tune

    space = Space.of(sweep.space)
    point = space.whole(drawn.get("point", drawn), tree)
    folder = trial_folder(sweep, point, tree, tune.get_context().get_trial_id())
    folder.mkdir(parents=True, exist_ok=True)
    settings = with_values(tree, {**point, "train.output": str(folder / "train")})
    with _alone(folder):
        known = 0  # last step that was already reported
        other = tune.get_checkpoint() if sweep.search == "pbt" else None
        if other is not None:
            with other.as_directory() as source:
                known = adopt(Path(source), folder / "train", settings)
        config.dump(settings, folder / "config.yaml")
        storage.write_bytes(folder / "point.json", json.dumps(point).encode())
        _train(folder, sweep, settings, tune, known)


def _train(folder: Path, sweep: SweepConfig, settings: dict[str, Any], tune: Any, known: int) -> None:
    """Train the missing steps of a trial and report each rung after the step `known`."""
    output, last = folder / "train", int(settings["train"]["num_steps"])
    reached = checkpoint.latest(output)
    step = checkpoint.read_state(reached).step if reached else 0
    # Steps after the checkpoint are repeated, perhaps with other settings, so their old records must not be reported.
    runlog.truncate(output / "metrics.jsonl", step)
    if step >= last and (output / "adapter" / "adapter.safetensors").exists() and sweep.search != "pbt":
        for record in rungs(runlog.read(output / "metrics.jsonl"), sweep, last):  # trained by an earlier start
            tune.report(record | {"folder": str(folder)})
        return
    command, place = _command(folder, settings)
    with open(folder / "train.log", "ab", opener=storage.no_links) as log, _training(command, place, log) as process:
        for record in rungs(follow(output / "metrics.jsonl", process), sweep, last):
            if record["step"] <= known:
                continue
            # Ray ends a trial that reports its last step, so the adapter must be written by then.
            if record["step"] == last and process.wait() != 0:
                break
            start = None
            if sweep.search == "pbt":
                start = tune.Checkpoint.from_directory(str(_wait_for(output, record["step"], process)))
            tune.report(record | {"folder": str(folder)}, checkpoint=start)
    if process.returncode != 0:
        tail = (folder / "train.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"training ended with {process.returncode}; the end of its log:\n{tail}")


def _command(folder: Path, settings: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return a trial's training command, and the environment that makes it a rank; {} if it starts the ranks itself."""
    import ray

    command = [sys.executable, "-m", "pipelines.cli", "train", str(folder / "config.yaml")]
    if settings["train"].get("launcher") == "ray":  # the ranks of one trial may run on several nodes
        return [*command, f"ray.address={ray.get_runtime_context().gcs_address}"], {}
    if settings["train"].get("num_processes") != 1:
        return command, {}
    # Start the only rank directly: a launcher would import PyTorch once more, a fifth of a tiny trial's start-up.
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return command, place | {"MASTER_PORT": str(free_address("127.0.0.1")[1])}


def rungs(records: Iterable[Mapping[str, Any]], sweep: SweepConfig, last: int) -> Iterator[dict[str, Any]]:
    """Yield {"value", "step", and each of sweep.report} at every multiple of `sweep.grace_steps` and at the last step.

    Args:
        records: one per step, from the first, as in metrics.jsonl.
    """
    values: list[float] = []
    for record in records:
        step = record["step"]
        if sweep.metric != "validation_loss":
            values.append(float(record[sweep.metric]))
        if step % sweep.grace_steps and step != last:
            continue
        recent = values[-sweep.window :] or [float(record["validation_loss"])]
        yield {"value": sum(recent) / len(recent), "step": step} | {name: record.get(name) for name in sweep.report}


@contextmanager
def _training(command: list[str], place: Mapping[str, str], log: Any) -> Iterator[subprocess.Popen]:
    """Yield the training process; when the trial ends, stop it, with a checkpoint if time allows."""
    environment = os.environ | {PARENT: str(os.getpid()), **place}  # makes it die with this worker
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock a folder: two trials at the same point take turns, and the second finds the finished work."""
    with open(folder / "lock", "w", opener=storage.no_links) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_for(output: Path, step: int, process: subprocess.Popen) -> Path:
    """Wait for the checkpoint of a step, which is written after the step's line in the log; return its path."""
    path = output / "checkpoints" / f"step-{step:06d}"
    deadline = time.monotonic() + CHECKPOINT_WAIT_S
    while not path.is_dir():
        if process.poll() not in (None, 0) or time.monotonic() > deadline:
            raise RuntimeError(f"{path} was not written; see train.log")
        time.sleep(0.05)
    return path


def adopt(source: Path, output: Path, settings: Mapping[str, Any]) -> int:
    """Copy another trial's checkpoint into this trial and return its step.

    Weights, optimizer moments and the position in the data are copied. The settings stored in the checkpoint's
    identity are replaced by this trial's.
    """
    state = checkpoint.read_state(source)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    shutil.rmtree(output / "adapter", ignore_errors=True)
    target = output / "checkpoints" / f"step-{state.step:06d}"
    shutil.copytree(source, target)
    chosen = {f"train.{key}": value for key, value in settings["train"].items()}
    identity = {key: chosen.get(key, value) for key, value in state.identity.items()}
    checkpoint.rewrite_identity(target, identity)
    return state.step
