"""`ex4d train`: start the ranks of a run, or be one of them. The training loop is in ex4d/train/trainer.py.

The same command works everywhere; the environment decides how it starts:

    ex4d train CONFIG.yaml                                    one local process per GPU, or 2 on a CPU
    torchrun --nproc-per-node 8 -m pipelines.train CONFIG.yaml
    deepspeed --module pipelines.train CONFIG.yaml            (with a hostfile for several machines)
    srun ex4d train CONFIG.yaml                               MASTER_ADDR and MASTER_PORT from the batch script
    ex4d train CONFIG.yaml train.launcher=ray                 Ray Train on this machine, or on ray.address

Exit status: 0 success, 1 failure, 2 invalid setting, 75 stopped by SIGTERM or Ctrl-C after writing a checkpoint: run
the same command again to resume. All ranks must see `train.output` on one file system.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ex4d import config as configs
from ex4d import storage
from ex4d.data.manifest import DATASET
from ex4d.errors import ConfigError
from ex4d.isolation.child import die_with
from ex4d.models.backbone import ModelConfig
from ex4d.train import checkpoint
from ex4d.train.config import EXIT_PREEMPTED, Place, TrainConfig, place_from_environment
from ex4d.train.identity import check_identity
from pipelines.runtime.cluster import check_output, free_address
from pipelines.runtime.output import exclusive, outside_datasets
from pipelines.runtime.runner import RayConfig

GRACE_S = 15.0  # after one rank fails, the others have this long to report the same error before they are killed
PARENT = "EX4D_TRAIN_PARENT"  # process id of the launcher or sweep trial that started this process


SECTIONS = {"train": TrainConfig, "model": ModelConfig, "ray": RayConfig}


def command(config_path: str, overrides: Sequence[str]) -> int:
    """Run `ex4d train`; return the exit status."""
    chosen = configs.load(config_path, SECTIONS, overrides)
    check_output("train.output", chosen["train"].output)
    return run(chosen["train"], chosen["model"], config_path, overrides, chosen["ray"])


def run(
    train: TrainConfig, model: ModelConfig, config_path: str, overrides: Sequence[str], ray: RayConfig | None = None
) -> int:
    """Train a run to its last step and return the exit status.

    Args:
        config_path, overrides: source of `train` and `model`; the local processes read them again.

    Raises:
        ConfigError: the output folder holds a run with other settings.
    """
    die_with(int(os.environ.get(PARENT, 0)))  # a killed launcher or sweep trial cannot stop its children
    place = place_from_environment()
    if train.dry_run:
        return _dry_run(train, model, config_path) if place is None or place.rank == 0 else 0
    from ex4d.train.checks import check_run

    if place is not None and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        left_over = "unset RANK and WORLD_SIZE, which a launcher set, or start with torchrun or srun"
        raise ConfigError("MASTER_ADDR", os.environ.get("MASTER_ADDR"), left_over)
    if place is not None and train.launcher == "ray":
        allowed = "must be auto under torchrun, srun or deepspeed; or start `ex4d train` without one of them"
        raise ConfigError("train.launcher", "ray", allowed)
    if place is None and ray is not None and ray.address and train.launcher != "ray":
        print("ray.address is not used: train.launcher=ray would train on that cluster", file=sys.stderr)
    if place is None and train.condition_dropout and train.prompt == "":
        print(
            "train.condition_dropout has no effect: train.prompt is empty, so there is none to leave out",
            file=sys.stderr,
        )
    _check_data(train)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", place.world_size)) if place else 0
    check_run(train, model, here or (0 if train.launcher == "ray" else _num_processes(train)))
    if place is not None:
        # Ranks of our own launcher write under its lock; those of torchrun or srun need a lock here.
        alone = exclusive(train.output) if place.rank == 0 and PARENT not in os.environ else nullcontext()
        with alone:
            return _be_rank(train, model, place)
    with exclusive(train.output):
        return _launch(train, model, config_path, overrides, ray)


def _check_data(train: TrainConfig) -> None:
    """Raise ConfigError if there is no dataset, or if the run would write into one."""
    for path in (data.path for data in train.datasets):
        if not storage.exists(storage.join(path, DATASET)):
            raise ConfigError(
                "train.data", path, f"no dataset there ({DATASET} is missing): `ex4d preprocess` makes one"
            )
    outside_datasets("train.output", train.output)


def _launch(
    train: TrainConfig, model: ModelConfig, config_path: str, overrides: Sequence[str], ray: RayConfig | None
) -> int:
    if step := _finished_step(train, model):
        print(f"already finished: {step} steps. {_where(train)}")
        return 0
    _write_config(train, model)
    if train.launcher == "ray":
        from pipelines.train.ray import on_ray

        code = on_ray(train, model, ray or RayConfig())
    else:
        code = _local_processes([config_path, *overrides], _num_processes(train), Path(train.output))
    if code == 0:
        print(f"done: {train.num_steps} steps. {_where(train)}")
    elif code == EXIT_PREEMPTED:
        path = checkpoint.latest(train.output)
        where = f"stopped, with a checkpoint in {path}" if path else "stopped before the first checkpoint"
        print(f"{where}; run the same command again to resume")
    return code


def _write_config(train: TrainConfig, model: ModelConfig) -> None:
    Path(train.output).mkdir(parents=True, exist_ok=True)
    configs.dump({"train": train, "model": model}, Path(train.output) / "config.yaml")


def _where(train: TrainConfig) -> str:
    return f"adapter: {train.output}/adapter  metrics: {train.output}/metrics.jsonl"


def _finished_step(train: TrainConfig, model: ModelConfig) -> int | None:
    """Return the last step of a finished run, or None. Raises ConfigError if the folder's run has other settings."""
    path = checkpoint.latest(train.output)
    if path is None:
        return None
    from ex4d.train.job import run_identity

    state = checkpoint.read_state(path)
    check_identity(state.identity, run_identity(train, model), train.output)
    ended = state.step >= train.num_steps and (Path(train.output) / "adapter" / "adapter.safetensors").exists()
    return state.step if ended else None


def _num_processes(train: TrainConfig) -> int:
    import torch

    gpus = 0 if train.device == "cpu" else torch.cuda.device_count()
    if train.num_processes is None:
        return gpus or 2
    # Every rank holds the model, so a mistyped number would fill the memory. No two ranks share a GPU.
    most = gpus or max(8, os.cpu_count() or 1)
    if train.num_processes > most and not train.dry_run:
        allowed = f"at most {most} on this machine" + (", one for each GPU, or train.device=cpu" if gpus else "")
        raise ConfigError("train.num_processes", train.num_processes, allowed)
    return train.num_processes


# ---------------------------------------------------------------- one rank


def _be_rank(train: TrainConfig, model: ModelConfig, place: Place) -> int:
    if _finished_step(train, model):
        return 0
    if place.rank == 0:
        _write_config(train, model)
    from ex4d.train import report, trainer
    from ex4d.train.progress import Progress

    try:
        with Progress(train) as show:
            return trainer.train(train, model, place, show)
    except report.NonFinite as error:
        print(f"ex4d train: {error}", file=sys.stderr)
        return 1


# ---------------------------------------------------------------- many local processes


def _local_processes(arguments: list[str], count: int, output: Path) -> int:
    """Start one process per rank, print rank 0's output, and return the exit status of the run.

    The other ranks write to OUTPUT/logs/rank-N.log. If a rank fails, the others are stopped. SIGTERM and Ctrl-C are
    forwarded as one SIGTERM to each rank, and the ranks then write a checkpoint.
    """
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_address("127.0.0.1")[1]),
    }
    common[PARENT] = str(os.getpid())
    common.setdefault("TQDM_DISABLE", "1")  # hides the progress bars of model loading, one per file and rank
    common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    processes: list[subprocess.Popen] = []
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for process in processes:
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(_start(arguments, common | place, logs / f"rank-{rank}.log" if rank else None))
        codes = _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if stopping and set(codes) <= {0, EXIT_PREEMPTED, -signal.SIGTERM}:
        return EXIT_PREEMPTED if any(codes) else 0
    return _explain(codes, logs)


def _start(arguments: list[str], environment: dict[str, str], log: Path | None) -> subprocess.Popen:
    # A separate session, so that Ctrl-C reaches only the launcher, which stops the ranks itself.
    command = [sys.executable, "-m", "pipelines.train", *arguments]
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "start_new_session": True}
    if log is None:
        return subprocess.Popen(command, **options)
    with open(log, "wb", opener=storage.no_links) as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)


def _wait(processes: list[subprocess.Popen]) -> list[int]:
    """Return the exit codes of all ranks; when one fails, the others are killed after GRACE_S."""
    deadline = None
    while any(process.poll() is None for process in processes):
        if deadline is None and any(process.poll() not in (None, 0, EXIT_PREEMPTED) for process in processes):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in processes]


def _explain(codes: list[int], logs: Path) -> int:
    """Return the status of a run from its ranks' exit codes; print which rank failed and the end of its log."""
    failed = {rank: code for rank, code in enumerate(codes) if code}
    if not failed:
        return 0
    # Ranks that ended by SIGKILL, e.g. killed here, sort last: the cause is a real exit code or another signal.
    rank = min(failed, key=lambda r: (failed[r] == -signal.SIGKILL, r))
    code = failed[rank]
    print(f"rank {rank} ended with {code}", file=sys.stderr)
    if rank:
        print((logs / f"rank-{rank}.log").read_text(errors="replace")[-2000:], file=sys.stderr)
    return code if code > 0 else 128 - code


# ---------------------------------------------------------------- before anything is loaded


def _dry_run(train: TrainConfig, model: ModelConfig, config_path: str) -> int:
    """Print what the run would need; only model configurations are loaded."""
    from ex4d.data import manifest
    from ex4d.models import backbone, experts, families
    from ex4d.train import estimate, flops
    from ex4d.train.config import plan_batch

    shape = backbone.transformer_config(model.base, model.revision, model.family)
    experts.timesteps(model.base, model.revision, train.expert)
    there = [data.path for data in train.datasets if storage.exists(storage.join(data.path, manifest.DATASET))]
    known = [manifest.read_dataset(path) for path in there]
    # Of several datasets, the one with the largest clips determines the memory.
    facts = max(known, key=lambda one: one["sample"]["num_frames"] * math.prod(one["sample"]["size"]), default={})
    # If the dataset does not exist yet, use what the same file would produce, or the method's size.
    tree = configs.read_yaml(config_path)
    clip = facts.get("sample", {"num_frames": 49, "size": [512, 512]} | (tree.get("preprocess") or {}))
    precomputed = "latents" in facts if facts else (tree.get("encode") or {}).get("output") == train.datasets[0].path
    family = families.FAMILIES.get(families.family_of(shape) or "")
    stride = family.stride if family else (4, 8, 8)
    latents = flops.latent_size((clip["num_frames"], *clip["size"]), stride)
    batch = plan_batch(train, _num_processes(train))
    needs = estimate.summary(shape, model, train, latents, batch, precomputed)
    print(json.dumps(needs, indent=2))
    return 0
