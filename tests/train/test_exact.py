"""Exactness with the real classes and loader: every ZeRO stage, rank count and recomputation; every kind of resume."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from make_run import SPEC, make_base, make_sample
from recorded import read_keys, run

from ex4d.data.sample import encode
from ex4d.data.shards import Staged, pack
from ex4d.data.tar import sample_tar
from ex4d.train import checkpoint, runlog

HERE = Path(__file__).parent
NUM_CLIPS = 23
GLOBAL_BATCH = 4  # an epoch is five steps and three quarters


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, and a dataset in shards of unequal length."""
    path = tmp_path_factory.mktemp("exact")
    staged = []
    for index in range(NUM_CLIPS):
        sample = make_sample(index)
        tar = path / f"{sample.key}.tar"
        tar.write_bytes(sample_tar(sample.key, encode(sample)))
        staged.append(Staged(sample.key, "train", str(tar)))
    counts = {"videos_in": NUM_CLIPS, "videos_split": NUM_CLIPS, "clips_planned": NUM_CLIPS}
    facts = {"sample": SPEC, "counts": counts, "config": {"seed": 0}, "versions": {"ex4d": "0"}}
    pack(
        staged,
        str(path / "dataset"),
        facts,
        [],
        shard_size_bytes=7 * (path / f"{make_sample(0).key}.tar").stat().st_size,
    )
    index = json.loads((path / "dataset" / "index.json").read_text())
    shards = index["shardlist"] if isinstance(index, dict) else index
    assert len({shard["nsamples"] for shard in shards}) > 1, "uneven"
    make_base(path)
    return path


def chosen(folder: Path, name: str, start: int = 0, kill_at: int | None = None, **train: object) -> dict:
    common = {"data": str(folder / "dataset"), "output": str(folder / name), "lr": 1e-2, "wandb_mode": "disabled"}
    model = {"base": str(folder / "base"), "lora_rank": 3, "adapter_hidden": 8}
    return {"start": start, "kill_at": kill_at, "model": model, "train": common | {"device": "cpu"} | train}


def on_two_ranks(folder: Path, runs: list[dict]) -> list[int]:
    """Execute these runs on two ranks and return their exit statuses; if one dies, so does the other."""
    return on_ranks(folder, runs, 2)


def on_ranks(folder: Path, runs: list[dict], count: int, **environment: str) -> list[int]:
    """Execute these runs on that many ranks and return their exit statuses; if one dies, so do the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = folder / f"runs-{port}.json"
    path.write_text(json.dumps(runs))
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(count), "PYTHONPATH": f"{HERE.parents[1]}:{HERE}", **environment}
    command = [sys.executable, str(HERE / "recorded.py"), str(path)]
    ranks = [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(count)]
    deadline = time.monotonic() + 800
    while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    for rank in ranks:
        rank.kill()
    return [rank.wait() for rank in ranks]


def losses(folder: Path, name: str) -> list[float]:
    return [metrics["loss"] for metrics in runlog.read(folder / name / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """Fourteen uninterrupted steps on two ranks at ZeRO-2: two and a half epochs."""
    runs = [chosen(folder, "whole", micro_batch_size=2, num_steps=14, save_every=20, zero_stage=2)]
    assert on_two_ranks(folder, runs) == [0, 0]
    return folder / "whole"


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_losses_do_not_depend_on_stage_ranks_or_recomputation(folder, alone):
    """Sixteen runs: ZeRO 0, 1, 2, 3, on 1 and 2 ranks, with and without recomputation, at one global batch."""
    kinds = list(product((0, 1, 2, 3), (False, True)))

    def runs(ranks: int) -> dict[tuple, dict]:
        common = {"num_steps": 5, "micro_batch_size": 2, "grad_accum_steps": 2 // ranks, "save_every": 9}
        names = {
            (s, c): chosen(folder, f"{ranks}-{s}-{c}", **common, zero_stage=s, activation_checkpointing=c)
            for s, c in kinds
        }
        return names

    assert on_two_ranks(folder, list(runs(2).values())) == [0, 0]
    for each in runs(1).values():
        assert run(alone, each) == 0
    found = {(ranks, *kind): losses(folder, f"{ranks}-{kind[0]}-{kind[1]}") for ranks in (1, 2) for kind in kinds}
    first = found[1, 0, False]
    assert len(first) == 5
    assert len(set(first)) == 5
    spread = max(abs(a - b) for each in found.values() for a, b in zip(each, first, strict=True))
    assert spread < 1e-6, f"{spread:.1e}"
    for stage, checkpointing in kinds:  # recomputing changes nothing at all
        assert found[2, stage, checkpointing] == found[2, stage, False]


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_resumed_twice_in_an_epoch_and_across_its_end_on_other_ranks_and_stages(folder, whole, alone):
    """2 ranks ZeRO-2 → 1 rank ZeRO-3 → 2 ranks ZeRO-3, killed → 2 ranks ZeRO-1, compared with an uninterrupted run."""
    name, common = "broken", {"micro_batch_size": 2, "save_every": 1}
    assert on_two_ranks(folder, [chosen(folder, name, 0, **common, num_steps=2, zero_stage=2)]) == [0, 0]
    assert run(alone, chosen(folder, name, 1, **common, num_steps=4, zero_stage=3)) == 0
    killed = chosen(folder, name, 2, kill_at=8, **common, num_steps=14, zero_stage=3)
    assert -signal.SIGKILL in on_two_ranks(folder, [killed])
    assert checkpoint.read_state(checkpoint.latest(folder / name)).step == 7
    assert on_two_ranks(folder, [chosen(folder, name, 3, **common, num_steps=14, zero_stage=1)]) == [0, 0]
    assert losses(folder, name) == pytest.approx(losses(folder, "whole"), abs=1e-6)
    assert read_keys(folder / name) == read_keys(whole), "the same clips at the same places"


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_resumed_at_equal_size_bit_for_bit(folder, whole):
    name, common = "equal", {"micro_batch_size": 2, "save_every": 1, "zero_stage": 2}
    for start, last in enumerate((2, 4, 8)):  # twice inside the first epoch, once beyond its end
        assert on_two_ranks(folder, [chosen(folder, name, start, **common, num_steps=last)]) == [0, 0]
    assert on_two_ranks(folder, [chosen(folder, name, 3, **common, num_steps=14)]) == [0, 0]
    assert losses(folder, name) == losses(folder, "whole")
    assert read_keys(folder / name) == read_keys(whole)
    ours, theirs = (checkpoint.read_tensors(f / "adapter" / "adapter.safetensors") for f in (folder / name, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_each_clip_is_taken_exactly_once_an_epoch(folder, whole):
    steps = read_keys(whole)
    assert [len(keys) for keys in steps.values()] == [GLOBAL_BATCH] * 14
    stream = [key for keys in steps.values() for key in keys]
    everything = sorted(make_sample(index).key for index in range(NUM_CLIPS))
    first, second, rest = stream[:NUM_CLIPS], stream[NUM_CLIPS : 2 * NUM_CLIPS], stream[2 * NUM_CLIPS :]
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert len(set(rest)) == len(rest) == 14 * GLOBAL_BATCH - 2 * NUM_CLIPS


# Writes checkpoint after checkpoint, each of known contents, and says so when one is done.
WRITER = """
import sys, torch
from pathlib import Path
from ex4d.train import checkpoint
output = Path(sys.argv[1])
step = checkpoint.read_state(checkpoint.latest(output)).step if checkpoint.latest(output) else 0
checkpoint.clean(output)
while True:
    step += 1
    with checkpoint.writing(output, checkpoint.State(step, 4 * step, 4, {}, None, {})) as folder:
        for name in ("adapter", "optimizer"):
            checkpoint.write_tensors(folder / f"{name}.safetensors", {"x": torch.full((2_000_000,), float(step))})
    print(step, flush=True)
    checkpoint.prune(output, keep_last=2)
"""


@pytest.mark.heavy
def test_kill_nine_during_the_write_loses_nothing(tmp_path):
    """Twelve kills at random moments of a process that only writes and prunes checkpoints."""
    chance, said, half_written = random.Random(11), 0, 0
    for _ in range(12):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        said = int(writer.stdout.readline())
        time.sleep(chance.uniform(0, 0.3))
        writer.send_signal(signal.SIGKILL)
        said = max([said, *(int(line) for line in writer.communicate()[0].splitlines())])
        half_written += len(list(checkpoint.folder(tmp_path).glob(".tmp-*")))
        state = checkpoint.read_state(checkpoint.latest(tmp_path))
        assert state.step >= said, "what was said to be written is there"
        for path in checkpoint.complete(tmp_path):
            for name in ("adapter", "optimizer"):
                assert (
                    checkpoint.read_tensors(path / f"{name}.safetensors")["x"]
                    .eq(checkpoint.read_state(path).step)
                    .all()
                )
    assert half_written >= 3, "the kills fell into writes"
    checkpoint.clean(tmp_path)
    assert not list(checkpoint.folder(tmp_path).glob(".tmp-*"))
