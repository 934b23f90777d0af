"""The benchmark of the 14B step at the size of the tiny base: its rows run, and hold what their names say."""

from __future__ import annotations

import importlib.util
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


@pytest.mark.parametrize("name", ["bf16", "fp8", "nf4+swap"])
def test_a_row_steps_and_holds_what_it_says(benchmark: Any, name: str) -> None:
    found = benchmark.measure(name, "tiny", CPU, warm_up=0, steps=1)
    row = benchmark.ROWS[name]
    assert len(found["seconds"]) == 1
    assert found["blocks_swapped"] == round(row.swapped * 4)
    model, _ = benchmark.random_model(benchmark.size_of("tiny"), row, CPU)
    assert not [n for n, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    assert model.transformer.patch_embedding.weight.dtype == torch.bfloat16
    plain = benchmark.random_model(benchmark.size_of("tiny"), benchmark.Row(), CPU)[0]
    held = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (model, plain)]
    assert held[0] < held[1] if name != "bf16" else held[0] == held[1]
    assert held[0] / 1e9 == pytest.approx(found["weights_gb"])


def test_the_published_size_is_within_its_targets_by_estimate(benchmark: Any) -> None:
    lines = benchmark.expectations()
    rows = [line for line in lines if line.startswith("|") and "yes" in line]
    assert len(rows) == len(benchmark.ROWS)
    page = benchmark.markdown(
        {
            **{
                "size": "14b",
                "date": "today",
                "hardware": "a GPU",
                "device": "H200",
                "torch": "2",
                "latents": (13, 64, 64),
            },
            **{"tokens": 13312, "steps": 3, "expected": lines},
            "rows": [{"row": "bf16", "failed": "CUDA out of memory"}],
        }
    )
    assert "| bf16 | | CUDA out of memory |" in page
