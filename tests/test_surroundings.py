"""Problems outside a command: its environment, its terminal, its disk, or Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from ex4d import storage, video
from pipelines import cli

BASE = """
preprocess: {input: in, output: out, num_workers: 1, num_frames: 5, size: [32, 32]}
model: {base: tiny}
train: {data: set, output: run, num_steps: 1, device: cpu, num_processes: 1}
sweep: {output: sweep, space: {}}
"""
VIEW = ("reconstruct", "in/a.mp4", "--output", "out")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "set"):
        (tmp_path / folder).mkdir()
    (tmp_path / "set/dataset.json").write_text("{}")
    (tmp_path / "c.yaml").write_text(BASE)
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3)).astype(np.uint8)
    depth = np.linspace(1, 3, 5 * 32 * 32).reshape(5, 32, 32).astype(np.float32)
    for name in ("a", "кадр→"):
        video.write(tmp_path / f"in/{name}.mp4", frames, 25)
        np.savez(tmp_path / f"in/{name}.depth.npz", z_depth=depth)
    return tmp_path


ENVIRONMENTS = {
    "a rank that a launcher left": ({"RANK": "1", "WORLD_SIZE": "2"}, "train", "unset RANK"),
    "a rank that is no number": ({"RANK": "x", "WORLD_SIZE": "2"}, "train", "RANK"),
    "a rank beyond the world": ({"RANK": "2", "WORLD_SIZE": "2"}, "train", "RANK"),
    "an unknown mode of W&B": ({"WANDB_MODE": "garbage"}, "train", "offline"),
    "a home that cannot be written": ({"HOME": "/proc/none"}, "preprocess", "HOME"),
    "a space without settings": ({}, "sweep", "sweep.space"),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_wrong_environment_is_one_sentence_before_any_work(place, monkeypatch, capsys, name):
    environment, command, named = ENVIRONMENTS[name]
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert cli.main([command, "c.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert named in lines[0]
    assert not any(
        (place / folder / name).exists() for folder in ("run", "sweep") for name in ("config.yaml", "trials")
    )


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipelines.cli", *argv]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, timeout=300, check=False)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_that_lacks_letters_shows_their_numbers(place, encoding):
    (place / "in/кадр→.depth.npz").unlink()
    done = run(VIEW[0], "in/кадр→.mp4", *VIEW[2:], PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert rb"\u2192.mp4: depth_missing" in done.stderr


def test_a_full_disk_is_named_with_its_remedy_and_leaves_no_half_file(place, monkeypatch, capsys):
    def full(path, data) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(storage, "write_bytes", full)  # a disk cannot be filled without being root
    assert cli.main(VIEW) == 1
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "ex4d reconstruct: the disk is full (out/cond.mp4): free some space, then run the same command again"
    ]
    assert not (place / "out").exists()


@pytest.mark.parametrize("after_s", [0.5, 3.0])
def test_ctrl_c_ends_with_one_line_and_130(place, after_s):
    """At any moment: while the command is parsed, or while it works (here: on the motion of a long clip)."""
    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (256, 500, 3)).astype(np.uint8), (0, 0), 3)
    video.write(place / "in/b.mp4", np.stack([texture[:, 2 * i : 2 * i + 256] for i in range(121)]), 25)
    argv = ["reconstruct", "in/b.mp4", "--output", "out", "--depth", "parallax"]
    command = [sys.executable, "-m", "pipelines.cli", *argv]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit "ignore"
    )
    while not interpreting(process.pid):
        time.sleep(0.01)
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert told.count(b"\n") == 1, told
    assert told.rstrip().endswith(b"interrupted")
    assert not (place / "out").exists()


def test_ctrl_c_after_the_answer_leaves_the_answers_status(place):
    late = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    source = f"{late}; from pipelines import cli; cli.script()"
    done = subprocess.run([sys.executable, "-c", source, *VIEW], capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_inside_of_an_exec_leaves_the_status(tmp_path):
    """For example, while a module with dataclasses is imported."""
    (tmp_path / "interrupted.py").write_text(
        "import os, signal, time\nfrom pipelines import cli\n"
        "def main():\n    try:\n        exec('os.kill(os.getpid(), signal.SIGINT); time.sleep(60)')\n"
        "    except KeyboardInterrupt:\n        return 130\n"
        "cli.main = main\ncli.script()\n"
    )
    places = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(cli.__file__).parents[1]}"}
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"],
        env=places,
        timeout=300,
        check=False,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode == 130


def interpreting(pid: int) -> bool:
    """Return whether a process has started to run our code; before that, nothing can be caught."""
    return b"numpy" in Path(f"/proc/{pid}/maps").read_bytes()
