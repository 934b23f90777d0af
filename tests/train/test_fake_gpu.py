"""Every tensor of a training step is on the GPU, in a type that its operators take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fake_gpu
import pytest

SCRIPT = Path(__file__).parent / "fake_gpu.py"


def test_steps_stay_on_the_gpu(folder: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, folder / "base"], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("this PyTorch has GPUs, or does not let the meta device's guard stand in")
    assert done.returncode == 0, done.stderr[-2000:]
    steps = json.loads(done.stdout.splitlines()[-1])
    assert list(steps) == list(fake_gpu.STEPS)
    for name, made in steps.items():
        assert made.pop("rows") == "cuda:0 torch.float64", name
        assert set(made.values()) == {"cuda:0 torch.float32"}, name
        assert len(made) == (9 if name == "source video" else 8), name
