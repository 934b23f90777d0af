"""`ex4d train` as a user runs it: real classes, real shards, two local ranks; killed, stopped, resumed."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from make_run import make_config, make_sample
from run_command import ROOT, finish, losses, start, steps, wait_for

from ex4d.errors import ConfigError
from ex4d.models import encoders, weights
from ex4d.models.backbone import load_base
from ex4d.train import checkpoint, objective
from ex4d.train.config import EXIT_PREEMPTED, TrainConfig
from ex4d.train.estimate import count_parameters
from pipelines import cli
from pipelines.train import launch as train

TWO_RANKS = {"num_steps": 20, "save_every": 10, "micro_batch_size": 2, "num_processes": 2}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_step(output: Path, step: int) -> None:
    wait_for(lambda: len(steps(output)) >= step, f"step {step}")


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """An uninterrupted run of twenty steps on two ranks; the path of its configuration."""
    config = make_config(folder, **TWO_RANKS, output=str(folder / "whole"))
    code, text = finish(start(config))
    assert code == 0, text
    assert "step 20/20" in text
    assert f"adapter: {folder}/whole/adapter" in text.splitlines()[-1]
    return config


def test_twenty_steps_killed_after_ten_and_resumed_are_the_same_bit_for_bit(folder, whole):
    output = folder / "killed"
    process = start(whole, f"train.output={output}")
    wait_for_step(output, 12)
    process.send_signal(signal.SIGKILL)  # the launcher; its ranks must go with it
    finish(process)
    code, text = finish(start(whole, f"train.output={output}"))
    assert code == 0, text
    assert losses(output) == losses(folder / "whole")
    assert [metrics["step"] for metrics in steps(output)] == list(range(1, 21))


def test_one_rank_at_stage_three_with_recomputation_learns_the_same(folder, whole):
    output = folder / "one"
    changes = ("train.num_processes=1", "train.grad_accum_steps=2", "train.zero_stage=3")
    code, text = finish(start(whole, f"train.output={output}", *changes, "train.activation_checkpointing=true"))
    assert code == 0, text
    assert losses(output) == pytest.approx(losses(folder / "whole"), abs=1e-6)


def test_finished_run_says_so_and_other_settings_are_refused(folder, whole, capsys):
    assert cli.main(["train", str(whole)]) == 0
    assert "already finished: 20 steps" in capsys.readouterr().out
    assert cli.main(["train", str(whole), "train.num_steps=10"]) == 0
    assert "already finished: 20 steps" in capsys.readouterr().out
    assert cli.main(["train", str(whole), "ray.address=auto"]) == 0
    assert "ray.address is not used" in capsys.readouterr().err
    for change in ("train.seed=1", "model.lora_rank=4"):
        assert cli.main(["train", str(whole), change]) == 2
        assert change.partition("=")[0] in capsys.readouterr().err


def test_ray_train_within_another_launcher_is_refused(whole, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", str(whole), "train.launcher=ray"]) == 2
    assert "train.launcher" in capsys.readouterr().err


def test_checkpoint_is_an_adapter_of_adapter_size(folder, whole):
    path = checkpoint.latest(folder / "whole")
    state, metadata = weights.read_adapter(folder / "whole" / "adapter")
    assert (metadata.step, metadata.num_frames, tuple(metadata.size)) == (20, 5, (32, 32))
    again, _ = weights.read_adapter(path)
    assert all(torch.equal(again[name], state[name]) for name in state)
    trainable = sum(tensor.numel() for tensor in state.values())
    size = sum(file.stat().st_size for file in path.iterdir())
    assert size <= 20 * trainable * 1.05
    shape = load_base(str(folder / "base"), components=("transformer",)).shape
    from ex4d.models.backbone import ModelConfig

    counted = count_parameters(shape, ModelConfig(lora_rank=3, adapter_hidden=8))
    assert trainable == counted["lora"] + counted["geometry_adapter"]


def test_encoder_puts_each_thing_where_it_belongs(folder, whole):
    """The slow twin: one clip by hand, without the batch."""
    base = load_base(str(folder / "base"))
    sample = make_sample(0)
    batch = {
        "keys": [sample.key],
        "frames": sample.frames[None],
        "visible": sample.visible[:1],
        "captions": ["red sphere"],
        "valid": np.array([True]),
    }
    encoder = objective.Encoder(base, "unit", prompt=None)
    made = encoder.encode(batch, [objective.NamedNoise(0, 3, sample.key)], 5.0, "diffsynth")
    noisy, timestep, prompt, image, first, cond, source = made.model_inputs
    assert source is None
    pixels = torch.from_numpy(sample.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    seen = torch.from_numpy(sample.visible[:1])
    black = torch.where(seen[:, None], pixels, torch.tensor(-1.0))
    torch.testing.assert_close(cond, base.encode_condition(black, seen, "unit"))
    torch.testing.assert_close(first, base.first_frame_condition(pixels[:, :, 0], 5))  # frame 0 is seen whole
    torch.testing.assert_close(image, base.encode_image(pixels[:, :, 0]))
    torch.testing.assert_close(prompt, base.encode_text(["red sphere"]))
    torch.testing.assert_close(timestep, made.sigma * 1000)
    clean = noisy - made.sigma * made.target  # x_sigma = x0 + sigma (eps - x0)
    torch.testing.assert_close(clean, base.encode_video(pixels), atol=1e-5, rtol=1e-4)


def test_hole_share_counts_pixels():
    visible = torch.ones(1, 5, 16, 16, dtype=torch.bool)
    visible[0, 0, :8, :8] = False
    visible[0, 3, 8:, :8] = False
    share = encoders.holes_in_latents(visible, (2, 2, 2))
    assert share[0, 0].tolist() == [[[1, 0], [0, 0]], [[0, 0], [0.25, 0]]]


def test_hole_weight_moves_weight_and_keeps_scale():
    hole = torch.zeros(1, 1, 1, 1, 4)
    hole[..., 0] = 1
    ones = torch.ones(1)
    inputs = objective.Inputs((), torch.zeros(1, 2, 1, 1, 4), ones, 2 * ones, hole, ones)
    flat = objective.velocity_losses(torch.full((1, 2, 1, 1, 4), 3.0), inputs, 5.0)
    assert float(flat.weighted) == pytest.approx(2 * 9)
    in_hole = objective.velocity_losses(3.0 * hole.expand(1, 2, 1, 1, 4), inputs, 5.0)
    assert float(in_hole.weighted) == pytest.approx(2 * 9 * 5 / 8)
    assert float(in_hole.mse) == pytest.approx(9 / 4)


@pytest.mark.heavy
def test_sigterm_gives_its_own_exit_code_and_the_run_goes_on(folder, whole):
    output = folder / "stopped"
    process = start(whole, f"train.output={output}")
    wait_for_step(output, 3)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process)
    assert code == EXIT_PREEMPTED, text
    assert 3 <= checkpoint.read_state(checkpoint.latest(output)).step < 20
    assert finish(start(whole, f"train.output={output}"))[0] == 0
    assert losses(output) == losses(folder / "whole")


@pytest.mark.heavy
def test_torchrun_on_two_nodes_trains_the_same(folder, whole):
    """Two agents of one process each, as on two machines."""
    output, port = folder / "torchrun", str(free_port())
    agent = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1")
    agents = []
    for rank in range(2):
        launcher = (*agent, f"--master-port={port}", f"--node-rank={rank}", "-m", "pipelines.train")
        agents.append(start(whole, f"train.output={output}", launcher=launcher))
    for process in agents:
        code, text = finish(process)
        assert code == 0, text
    assert losses(output) == losses(folder / "whole")


@pytest.mark.heavy
def test_srun_is_known_by_its_environment(folder, whole):
    output, port = folder / "srun", str(free_port())
    ranks = []
    for rank in range(2):
        step = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        place = step | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(start(whole, f"train.output={output}", environment=place))
    for process in ranks:
        code, text = finish(process)
        assert code == 0, text
    assert losses(output) == losses(folder / "whole")


@pytest.mark.heavy
def test_the_deepspeed_launcher_trains_the_same(folder, whole):
    output = folder / "deepspeed"
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port()}")
    launcher += ("--module", "pipelines.train")
    code, text = finish(start(whole, f"train.output={output}", launcher=launcher))
    assert code == 0, text
    assert losses(output) == losses(folder / "whole")


@pytest.mark.heavy
def test_deepspeed_with_a_hostfile_of_two_nodes_trains_the_same(folder, whole):
    """As on two machines without ssh between them: the launcher is started on each, with the same hostfile."""
    output, hostfile, port = folder / "hostfile", folder / "hosts", free_port()
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    nodes = []
    for rank in range(2):
        launcher = ("-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={rank}")
        launcher += ("--master_addr=127.0.0.1", f"--master_port={port}", "--module", "pipelines.train")
        nodes.append(start(whole, f"train.output={output}", launcher=launcher))
    for process in nodes:
        code, text = finish(process)
        assert code == 0, text
    assert losses(output) == losses(folder / "whole")


@pytest.mark.heavy
@pytest.mark.ray
def test_ray_train_goes_on_after_a_rank_is_killed(folder, whole):
    output = folder / "ray"
    process = start(whole, f"train.output={output}", "train.launcher=ray")
    wait_for_step(output, 12)
    below = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in below if child.is_running() and "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(ranks) == 2, [child.cmdline() for child in below]
    ranks[1].kill()
    code, text = finish(process)
    assert code == 0, text
    assert losses(output) == losses(folder / "whole")


@pytest.mark.parametrize("config", sorted(p for p in (ROOT / "configs").glob("*.yaml") if "\ntrain:" in p.read_text()))
def test_every_configuration_dry_runs(config, capsys):
    assert cli.main(["train", str(config), "train.dry_run=true", "train.usd_per_gpu_hour=3"]) == 0
    needs = json.loads(capsys.readouterr().out)
    assert needs["parameters"]["lora"] > 0
    assert needs["usd"] == pytest.approx(3 * needs["gpu_hours"])


@pytest.mark.parametrize(
    ("device", "gpus", "asked", "most"), [("auto", 1, 2, 1), ("cuda", 4, 5, 4), ("cpu", 4, 999, 8)]
)
def test_no_two_ranks_share_a_gpu(monkeypatch, device, gpus, asked, most):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=f"at most {most}"):
        train._num_processes(TrainConfig(device=device, num_processes=asked))
    assert train._num_processes(TrainConfig(device=device, num_processes=most)) == most
    assert train._num_processes(TrainConfig(device=device)) == (2 if device == "cpu" else gpus)
