"""Every benchmark runs in its smallest size, from a copy, so that measured results are not overwritten."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = {
    "encode.py": "--clips 2 --pairs 1",
    "loader.py": "--hardware here --num-frames 9 --size 64 --samples 4 --pairs 1 --batches 2",
    "masks.py": "--num-clips 1",
    "parallax.py": "--num-clips 1",
    "persistence.py": "--num-clips 1",
    "preprocess.py": "--hardware here --clips 8 --pairs 1 --large-clips 1",
    "source_cameras.py": "--num-clips 1",
    "source_video.py": "--steps 2 --scenes 1",
    "train_step.py": "2 1",
    "warp_truth.py": "--sizes 64 --num-scenes 1",
    "scale/driver.py": "300 500",
    "scale/packing.py": "--samples 200 --kb 50 --shard-mb 1",
    "scale/store.py": "run --videos 2",
    "scale/stream.py": "rate --rows 20 --cpus 2",
}


@pytest.mark.heavy
@pytest.mark.parametrize("script", SMALLEST)
def test_benchmark_runs(script: str, tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, copy / script, *SMALLEST[script].split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout or done.stderr
