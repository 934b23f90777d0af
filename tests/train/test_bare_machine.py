"""The trainer on a machine with only PyTorch, transformers and the wheels of the GPU run book."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu"
# What such an image lacks and wheels.txt does not bring.
MISSING = (
    *("ray", "av", "decord", "wandb", "webdataset", "trimesh", "scenedetect", "optuna", "nvdiffrast", "bitsandbytes"),
    *("moto", "boto3", "s3fs", "datasets", "embreex", "imagehash"),
)
BLOCK = f"""
import importlib.abc, importlib.util, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
find = importlib.util.find_spec  # libraries ask it what there is
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in {MISSING!r} else find(name, package)
)
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment for processes in which the other libraries cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**inherited, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_what_trains_imports_nothing_that_is_missing_there(bare: dict[str, str]) -> None:
    modules = ["pipelines.cli", "ex4d.train.trainer", "ex4d.train.progress", "ex4d.train.estimate", "ex4d.generate"]
    code = f"import importlib; [importlib.import_module(name) for name in {modules}]; import ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare, cwd=ROOT, check=False)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'ray'"


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_rehearsal_of_both_runs(bare: dict[str, str], tmp_path: Path) -> None:
    """Every row at tiny size, with the present Python; the wheels themselves, where collect.py has brought them."""
    rows = {}
    for script in (GPU / "system.py", ROOT / "benchmarks" / "train_14b.py"):
        output = tmp_path / script.stem
        command = [sys.executable, str(script), "--size", "tiny", "--device", "cpu", "--output", str(output)]
        subprocess.run(command, env=bare, cwd=ROOT, check=True, timeout=3000)
        rows |= {row["row"]: row for row in map(json.loads, (output / "rows.jsonl").read_text().splitlines())}
    failed = {name for name, row in rows.items() if "failed" in row}
    of_a_gpu = {"renderer, nvdiffrast", "attention cudnn", "attention efficient", "attention flash"}
    assert failed <= of_a_gpu | {"bf16+compile, fp8 products"}, "torchao is among the wheels alone"
    first, more = rows["trainer, steps 1 to 6"], rows["trainer, steps 7 to 8"]
    assert [step["step"] for step in first["steps"] + more["steps"]] == [*range(1, 9)]
    assert {"forward", "backward", "optimizer", "data"} <= set(first["parts"])
    assert rows["bf16"]["attention_kernel"]
