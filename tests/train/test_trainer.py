"""The loop, the engine and the checkpoints on a toy model, one rank in this process; two ranks where marked heavy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from toy import ToyModel, train_toy

from ex4d.errors import ConfigError, ContractError
from ex4d.train import checkpoint, engine, report, runlog, waits
from ex4d.train.config import EXIT_PREEMPTED, BatchPlan, Place, TrainConfig, place_from_environment, plan_batch
from ex4d.train.deepspeed_config import deepspeed_config
from ex4d.train.engine import Engine
from ex4d.train.trainer import learning_rate

TOY = Path(__file__).parent / "toy.py"
BATCH = {"micro_batch_size": 2, "grad_accum_steps": 2}


def losses(output: Path) -> list[float]:
    return [metrics["loss"] for metrics in runlog.read(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(alone, tmp_path_factory) -> Path:
    """An uninterrupted run of twenty steps at ZeRO-2."""
    output = tmp_path_factory.mktemp("whole")
    assert train_toy(str(output), alone, **BATCH) == 0
    return output


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_run_goes_on_bit_for_bit_at_every_stage(stage, alone, whole, tmp_path):
    assert train_toy(str(tmp_path), alone, **BATCH, num_steps=10, zero_stage=stage) == 0
    # What a kill during a write leaves behind, and steps that were logged but not saved.
    (tmp_path / "checkpoints" / ".tmp-dead-step-000013").mkdir()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 0.5}\n{"step": 12, "lo')
    assert train_toy(str(tmp_path), alone, **BATCH, zero_stage=stage) == 0
    assert losses(tmp_path) == losses(whole)
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    ours, theirs = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_stage_and_micro_batch_may_go_on(alone, whole, tmp_path):
    train_toy(str(tmp_path), alone, **BATCH, num_steps=10, zero_stage=2)
    train_toy(str(tmp_path), alone, micro_batch_size=1, zero_stage=3)
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-6)
    assert runlog.read(tmp_path / "metrics.jsonl")[-1]["samples"] == 80


def test_the_engine_steps_as_plain_pytorch_does(alone, tmp_path):
    """The slow twin: AdamW by hand on the same gradients."""
    torch.manual_seed(0)
    inputs = (torch.randn(2, 3, 3, 4, 4), torch.tensor([300.0, 700.0]), torch.ones(2, 1), torch.ones(2, 3))
    inputs += (torch.randn(2, 3, 3, 4, 4), torch.randn(2, 6, 3, 4, 4))
    config = TrainConfig(micro_batch_size=2, zero_stage=2, lr=1e-2, max_grad_norm=0.5)
    engine, twin = Engine(ToyModel(), config, BatchPlan(2, 2, 1, 1)), ToyModel()
    trainables = list(twin.trainable_parameters().values())
    optimizer = torch.optim.AdamW(trainables, lr=1e-2, betas=config.betas, weight_decay=config.weight_decay)
    for _ in range(3):
        engine.backward(engine.forward(*inputs).square().mean())
        norm = engine.step(1e-2)
        twin(*inputs).square().mean().backward()
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(trainables, 0.5)), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in engine.weights().items():
        torch.testing.assert_close(tensor, twin.trainable_parameters()[name].detach(), atol=1e-6, rtol=1e-5)
    for name, tensor in engine.moments().items():
        key, _, parameter = name.partition(".")
        state = optimizer.state[twin.trainable_parameters()[parameter]]
        torch.testing.assert_close(tensor, state[key], atol=1e-6, rtol=1e-4)


def test_checkpoint_is_adapter_sized_and_only_the_last_stay(whole):
    trainable = sum(p.numel() for p in ToyModel().trainable_parameters().values())
    (path,) = list(checkpoint.folder(whole).iterdir())[1:]
    assert [p.name for p in checkpoint.complete(whole)] == ["step-000010", "step-000020"]
    tensors = sum(p.stat().st_size for p in path.glob("*.safetensors"))
    assert tensors <= 12 * trainable + 4096  # names and shapes, which weigh nothing beside a real adapter


def test_prune_keeps_the_best(tmp_path):
    for step, loss in ((1, 0.5), (2, 0.1), (3, None), (4, 0.3), (5, 0.2)):
        with checkpoint.writing(tmp_path, checkpoint.State(step, step, 1, {}, loss, {})):
            pass
    checkpoint.prune(tmp_path, keep_last=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000002", "step-000004", "step-000005"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    state = checkpoint.State(1, 4, 4, {}, None, {})
    with checkpoint.writing(tmp_path, state) as folder:
        (folder / "x").write_text("first")

    def write_half() -> None:
        with checkpoint.writing(tmp_path, state) as folder:
            (folder / "x").write_text("second")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert (checkpoint.latest(tmp_path) / "x").read_text() == "first"
    assert checkpoint.read_state(checkpoint.latest(tmp_path)) == state
    assert len(list(checkpoint.folder(tmp_path).iterdir())) == 1


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path):
    """The system refuses to write more than a megabyte to a file, in a process of its own."""
    code = (
        "import resource, signal, sys, torch; from ex4d.train import checkpoint as c\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "state = lambda step: c.State(step, 1, 1, {}, None, {})\n"
        "with c.writing(sys.argv[1], state(1)) as folder:\n"
        "    c.write_tensors(folder / 'a.safetensors', {'x': torch.ones(9)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n"
        "try:\n"
        "    with c.writing(sys.argv[1], state(2)) as folder:\n"
        "        c.write_tensors(folder / 'a.safetensors', {'x': torch.ones(2**20)})\n"
        "except OSError as error: print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.count("\n") == 1
    assert f"OSError {tmp_path}/checkpoints/step-000002 cannot be written (" in done.stdout
    assert done.stdout.endswith("; the earlier checkpoints are complete\n")
    assert [path.name for path in checkpoint.folder(tmp_path).iterdir()] == ["step-000001"]


def test_nan_names_the_clip_and_updates_nothing(alone, tmp_path):
    with pytest.raises(report.NonFinite, match=r"step 13: .*clip-\d+-nan"):
        train_toy(str(tmp_path), alone, {"nan_at": 13})
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000010"]
    assert len(losses(tmp_path)) == 12


def test_gradient_that_is_not_finite_is_seen_where_the_loss_is(alone):
    model = ToyModel()
    engine = Engine(model, TrainConfig(), BatchPlan(1, 1, 1, 1))
    inputs = (torch.zeros(1, 3, 1, 2, 2), torch.zeros(1), torch.zeros(1, 1), torch.zeros(1, 3))
    output = engine.forward(*inputs, torch.zeros(1, 3, 1, 2, 2), torch.zeros(1, 6, 1, 2, 2))
    assert engine.gradients_finite()
    engine.backward((output.mean() * 0).sqrt())  # 0, whose root has an infinite slope
    assert not engine.gradients_finite()
    assert engine.gradients_finite(), "asked once, forgotten"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sigterm_within_a_step_saves_the_one_before_and_the_run_goes_on(stage, alone, whole, tmp_path):
    """In micro batch 1 of 2 of step 8: the accumulated gradients are dropped, and the step is repeated on resume."""
    assert train_toy(str(tmp_path), alone, {"term_in": 15}, **BATCH, zero_stage=stage) == EXIT_PREEMPTED
    assert checkpoint.read_state(checkpoint.latest(tmp_path)).step == 7
    assert len(losses(tmp_path)) == 7
    assert train_toy(str(tmp_path), alone, **BATCH, zero_stage=stage) == 0
    assert losses(tmp_path) == losses(whole)


def test_a_stop_within_a_step_keeps_what_validation_found(alone, tmp_path):
    settings = BATCH | {"validate_every": 7, "validate_samples": 4}
    assert train_toy(str(tmp_path), alone, {"term_in": 17}, **settings) == EXIT_PREEMPTED  # two of them validated
    state = checkpoint.read_state(checkpoint.latest(tmp_path))
    assert (state.step, state.validation_loss) == (7, runlog.read(tmp_path / "metrics.jsonl")[6]["validation_loss"])
    assert state.validation_loss > 0


def test_sigterm_before_the_end_of_a_step_saves_that_step(alone, whole, tmp_path):
    """During its last micro batch: the step is finished first."""
    assert train_toy(str(tmp_path), alone, {"term_in": 16}, **BATCH) == EXIT_PREEMPTED
    assert checkpoint.read_state(checkpoint.latest(tmp_path)).step == 8
    assert train_toy(str(tmp_path), alone, **BATCH) == 0
    assert losses(tmp_path) == losses(whole)


def test_sigterm_right_after_a_checkpoint_or_before_the_first_step_writes_none(alone, tmp_path):
    assert train_toy(str(tmp_path), alone, {"term_in": 1}, **BATCH) == EXIT_PREEMPTED
    assert checkpoint.latest(tmp_path) is None
    assert train_toy(str(tmp_path), alone, {"term_in": 21}, **BATCH) == EXIT_PREEMPTED  # in step 11
    written = checkpoint.latest(tmp_path)
    assert checkpoint.read_state(written).step == 10
    stamp = written.stat().st_mtime_ns
    assert train_toy(str(tmp_path), alone, {"term_in": 1}, **BATCH) == EXIT_PREEMPTED
    assert checkpoint.latest(tmp_path).stat().st_mtime_ns == stamp


def test_average_goes_on_and_becomes_the_adapter(alone, tmp_path):
    def adapter(folder: Path) -> dict:
        return load_file(folder / "adapter" / "adapter.safetensors")

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train_toy(str(whole), alone, ema_decay=0.9, num_steps=8, save_every=4, validate_every=4, validate_samples=3)
    train_toy(str(broken), alone, ema_decay=0.9, num_steps=4, save_every=4)
    train_toy(str(broken), alone, ema_decay=0.9, num_steps=8, save_every=4)
    raw = load_file(checkpoint.latest(whole) / "adapter.safetensors")
    assert all(torch.equal(adapter(whole)[name], adapter(broken)[name]) for name in raw)
    assert not torch.equal(adapter(whole)["up.weight"], raw["up.weight"])
    steps = runlog.read(whole / "metrics.jsonl")
    assert ["validation_loss" in step for step in steps] == [False, False, False, True] * 2


@pytest.mark.parametrize("change", [{"seed": 1}, {"shift": 3.0}, {"hole_weight": 2.0}, {"lr": 1e-3}])
def test_other_settings_are_refused_by_name(change, alone, whole):
    with pytest.raises(ConfigError, match=f"train.{next(iter(change))}="):
        train_toy(str(whole), alone, **(BATCH | change))


def test_checkpoint_of_another_model_is_refused(alone, whole, tmp_path):
    moments = checkpoint.read_tensors(checkpoint.latest(whole) / "optimizer.safetensors")
    moments.pop("exp_avg.up.weight")
    with pytest.raises(ContractError, match="another model"):
        Engine(ToyModel(), TrainConfig(), BatchPlan(1, 1, 1, 1), moments, 20)


def test_dtypes_are_audited(alone):
    model = ToyModel()
    model.up.to(torch.bfloat16)
    with pytest.raises(ContractError, match=r"DeepSpeed turned up.weight from torch.bfloat16"):
        Engine(model, TrainConfig(), BatchPlan(1, 1, 1, 1))


def test_deepspeed_tries_none_of_its_ops(alone, monkeypatch):
    """On a GPU machine that would be compilers in every rank, and a warning for each op where there is no nvcc."""
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op

    vars(deepspeed.ops).pop("__compatible_ops__")
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: pytest.fail("ops are tried"))
    engine._deepspeed()
    assert build_shm_op() is None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bfloat16_base_stays_so_under_float32_trainables(stage, alone):
    mixed = ToyModel()
    mixed.frozen.to(torch.bfloat16)
    engine = Engine(mixed, TrainConfig(zero_stage=stage), BatchPlan(1, 1, 1, 1))
    assert mixed.frozen.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in engine.weights().values()} == {torch.float32}


def test_deepspeed_dict_is_derived_and_never_casts():
    plan = plan_batch(TrainConfig(micro_batch_size=4, grad_accum_steps=2), world_size=3)
    made = deepspeed_config(TrainConfig(zero_stage=3, max_grad_norm=None, cpu_offload=True), plan)
    assert made["train_batch_size"] == 24
    assert not made.keys() & {"bf16", "fp16", "optimizer", "scheduler"}
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_global_batch_survives_another_number_of_ranks():
    config = TrainConfig(micro_batch_size=4, grad_accum_steps=1)
    assert plan_batch(config, 2) == BatchPlan(8, 4, 1, 2)
    assert plan_batch(config, 1, 8) == BatchPlan(8, 4, 2, 1)
    assert plan_batch(config, 8, 8) == BatchPlan(8, 1, 1, 8)
    with pytest.raises(ConfigError, match=r"train.num_processes=3: .*8 samples"):
        plan_batch(config, 3, 8)


def test_place_is_read_from_each_launcher():
    assert place_from_environment({}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert place_from_environment(torchrun) == Place(3, 8, 1)
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5"}
    assert place_from_environment(srun) is None, "a shell in a step"
    srun |= {"MASTER_ADDR": "node-1"}
    assert place_from_environment(srun) == Place(5, 16, 5)
    assert place_from_environment({"SLURM_PROCID": "0", "SLURM_JOB_ID": "9"}) is None, "the batch script itself"


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(lr=1.0, warmup_steps=4, num_steps=14, lr_decay="cosine")
    assert [learning_rate(config, step) for step in (1, 4)] == [0.25, 1.0]
    assert learning_rate(config, 9) == pytest.approx(0.55)
    assert learning_rate(config, 14) == pytest.approx(0.1)


def test_step_time_is_split_into_all_its_parts(whole):
    parts = runlog.read(whole / "metrics.jsonl")[-1]["step_s"]
    total = parts.pop("total")
    assert list(parts) == ["data", "communication", "encode", "forward", "backward", "optimizer"]
    assert sum(parts.values()) == pytest.approx(total, rel=0.05)
    assert all(seconds >= 0 for seconds in parts.values())
    assert 0 < parts["communication"] < total


class SlowBackend:
    """DeepSpeed's backend as far as `waits` knows it: every collective takes a twentieth of a second."""

    def __getattr__(self, name):
        if name not in waits.COLLECTIVES:
            raise AttributeError(name)
        return lambda **_: time.sleep(0.05)

    def all_reduce(self, async_op=False):
        time.sleep(0.05)
        return SimpleNamespace(wait=lambda: time.sleep(0.1), done=True) if async_op else None

    def all_gather_into_tensor(self):
        self.all_gather()  # as DeepSpeed does where there is no such op


def test_time_in_collectives_is_counted_once_and_while_waiting():
    backend = SlowBackend()
    for _ in range(2):
        waits.time_collectives(backend, on_gpu=False)  # a second engine in one process
    waits.waited()
    watch = report.Stopwatch(torch.device("cpu"), waits.waited)
    time.sleep(0.1)
    backend.all_gather_into_tensor()
    watch.lap("forward")
    handle = backend.all_reduce(async_op=True)
    time.sleep(0.2)  # computing beside it costs nothing
    assert handle.done
    handle.wait()
    watch.lap("backward")
    parts = watch.times()
    assert parts["communication"] == pytest.approx(0.05 + 0.05 + 0.1, abs=0.04)
    assert parts["forward"] == pytest.approx(0.1, abs=0.04)
    assert parts["backward"] == pytest.approx(0.2, abs=0.04)
    assert waits.waited() == 0


def start_ranks(count: int, output: Path, *settings: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["PYTHONPATH"] = str(TOY.parents[2])
    command = [sys.executable, str(TOY), str(output), *settings]
    return [subprocess.Popen(command, env=common | {"RANK": str(rank)}) for rank in range(count)]


def finish(processes: list[subprocess.Popen]) -> list[int]:
    try:
        return [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.heavy
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_learn_what_one_does_and_go_on_after_a_kill(stage, whole, tmp_path):
    settings = ("micro_batch_size=2", f"zero_stage={stage}")
    assert finish(start_ranks(2, tmp_path / "whole", *settings)) == [0, 0]
    assert losses(tmp_path / "whole") == pytest.approx(losses(whole), abs=1e-6)
    ranks = start_ranks(2, tmp_path / "killed", *settings, "kill_at=13")
    assert ranks[0].wait(timeout=120) == -9
    ranks[1].kill()
    ranks[1].wait()
    assert finish(start_ranks(2, tmp_path / "killed", *settings)) == [0, 0]
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.heavy
@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_of_two_is_asked_to_stop_within_a_step(stage, whole, tmp_path):
    settings = ("micro_batch_size=1", "grad_accum_steps=2", f"zero_stage={stage}")
    assert finish(start_ranks(2, tmp_path, *settings, "term_in=15")) == [EXIT_PREEMPTED] * 2
    assert checkpoint.read_state(checkpoint.latest(tmp_path)).step == 7
    assert finish(start_ranks(2, tmp_path, *settings)) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize(("stage", "accum"), [(2, 1), (3, 1), (0, 2), (1, 2), (2, 2)])
def test_waiting_for_a_slow_rank_is_communication(stage, accum, tmp_path):
    settings = ("num_steps=6", "micro_batch_size=2", "late_s=0.4", f"zero_stage={stage}", f"grad_accum_steps={accum}")
    assert finish(start_ranks(2, tmp_path, *settings)) == [0, 0]
    for metrics in runlog.read(tmp_path / "metrics.jsonl")[1:]:
        parts = metrics["step_s"]
        assert parts["communication"] > 0.3 * accum, "rank 0 waits for rank 1"
        assert parts["total"] - parts["communication"] < 0.3


@pytest.mark.heavy
def test_two_then_one_then_two_ranks(alone, whole, tmp_path):
    assert finish(start_ranks(2, tmp_path, "micro_batch_size=2", "num_steps=7", "zero_stage=2")) == [0, 0]
    train_toy(str(tmp_path), alone, micro_batch_size=2, num_steps=12, zero_stage=3)
    assert finish(start_ranks(2, tmp_path, "micro_batch_size=2", "zero_stage=1")) == [0, 0]
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-6)


def test_every_rank_goes_on_from_the_checkpoint_of_rank_0(tmp_path, monkeypatch):
    """As if a file system showed two machines different states of a folder for a while."""
    mine, theirs = tmp_path / "checkpoints" / "step-10", tmp_path / "checkpoints" / "step-20"
    mine.mkdir(parents=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    word = {}
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda said, src: said.__setitem__(0, word["is"]))
    for word["is"], found in (("checkpoints/step-10", mine), (None, None)):
        assert engine.agreed(mine, str(tmp_path)) == found
    word["is"] = "checkpoints/step-20"
    with pytest.raises(ContractError, match="one file system"):
        engine.agreed(mine, str(tmp_path))
    theirs.mkdir()
    assert engine.agreed(mine, str(tmp_path)) == theirs
