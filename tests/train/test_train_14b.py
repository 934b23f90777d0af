"""The benchmark of the 14B step, at the size of the tiny base: its rows run and match their names."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "train_14b.py"
    spec = importlib.util.spec_from_file_location("train_14b", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["train_14b"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TRIED = ["bf16", "nf4+swap", "bf16+compile, attention kept", "bf16+compile, 30 of 40 recomputed"]


@pytest.mark.parametrize("name", [*TRIED, "bf16+compile, fp8 products"])
def test_a_row_steps_and_holds_what_it_says(benchmark: Any, name: str) -> None:
    if benchmark.ROWS[name].fp8_products:
        pytest.importorskip("torchao", reason="torchao comes with the GPU run book alone")
    found = benchmark.measure(name, "tiny", CPU, warm_up=0, steps=1)
    row = benchmark.ROWS[name]
    assert len(found["seconds"]) == 1
    assert found["blocks_swapped"] == round(row.swapped * 4)
    model, _ = benchmark.random_model(benchmark.size_of("tiny"), row, CPU)
    assert not [n for n, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    assert model.transformer.patch_embedding.weight.dtype == torch.bfloat16
    plain = benchmark.random_model(benchmark.size_of("tiny"), benchmark.Setting(), CPU)[0]
    held = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (model, plain)]
    assert held[0] < held[1] if not name.startswith("bf16") else held[0] == held[1]
    assert held[0] / 1e9 == pytest.approx(found["weights_gb"])


def test_the_published_size_is_within_its_targets_by_estimate(benchmark: Any) -> None:
    lines = benchmark.expectations()
    rows = [line for line in lines if line.startswith("|") and "yes" in line]
    assert len(rows) == len(benchmark.ROWS) - 2, "those that fill the memory have no target"
    facts = {"size": "14b", "date": "today", "hardware": "a GPU", "torch": "2", "latents": (13, 64, 64)}
    facts |= {"tokens": 13312, "steps": 3, "expected": lines}
    product = {"row": "product", "tflops": 790.2, "ms": 1.4, "kernel": "8192³"}
    page = benchmark.markdown(facts | {"rows": [{"row": "bf16", "failed": "CUDA out of memory"}, product]})
    assert "| bf16 | CUDA out of memory |" in page
    assert "| product | 790 | 1.40 | 8192³ |" in page


def test_rows_above_the_gpu_s_memory_are_skipped(benchmark: Any) -> None:
    chosen = {"size": "14b", "device": "cuda", "steps": 3, "warm_up": 1, "only": ["product", "bf16", "nf4+swap"]}
    planned = {row.name: row.skip for row in benchmark.plan(argparse.Namespace(**chosen), 40e9)}
    assert planned["product"] is None
    assert planned["nf4+swap"] is None
    assert planned["bf16"].startswith("skipped: 4")


def test_a_row_as_a_process_of_its_own_is_on_disk(benchmark: Any, tmp_path: Path) -> None:
    command = [sys.executable, benchmark.__file__, "--size", "tiny", "--device", "cpu", "--output", str(tmp_path)]
    subprocess.run([*command, "--only", "product", "attention"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = {row["row"]: row for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert rows["product"]["tflops"] > 0
    assert "attention" in rows["attention auto"]["kernel"]
    assert "| product |" in (tmp_path / "train_14b_tiny.md").read_text()


def test_profile_names_the_kernel_of_attention_and_shares_add_up(benchmark: Any) -> None:
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    weight = torch.randn(64, 64)

    def step() -> None:
        (torch.nn.functional.scaled_dot_product_attention(q, q, q).flatten() @ torch.ones(2 * 64 * 16)).backward()
        weight @ weight

    found = benchmark.profile(step, CPU)
    assert "attention" in found["attention_kernel"]
    assert sum(value for name, value in found.items() if name.startswith("share_")) == pytest.approx(1)
    assert found["share_attention"] > 0
    assert found["share_products"] > 0
