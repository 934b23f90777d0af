"""A run's prompt is embedded once: restarts and other ranks load no text encoder, and get the same numbers."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import torch
from recorded import run
from test_exact import chosen, losses

from ex4d.models import backbone
from ex4d.train import prompts
from ex4d.train.config import TrainConfig


def test_a_restart_loads_no_text_encoder(folder: Path, alone, caplog) -> None:
    caplog.set_level(logging.INFO, logger="ex4d.models.backbone")

    def loaded() -> int:
        count = sum("loaded text_encoder" in record.message for record in caplog.records)
        caplog.clear()
        return count

    common = {"save_every": 2, "prompt": "a blue box", "zero_stage": 0}
    assert run(alone, chosen(folder, "whole", **common, num_steps=4)) == 0
    assert loaded() == 1
    assert run(alone, chosen(folder, "broken", **common, num_steps=2)) == 0
    assert loaded() == 1
    assert run(alone, chosen(folder, "broken", **common, num_steps=4)) == 0
    assert loaded() == 0
    assert losses(folder, "broken") == losses(folder, "whole")


def test_another_prompt_or_encoder_is_embedded_anew(folder: Path, alone, tmp_path: Path) -> None:
    model = backbone.ModelConfig(base=str(folder / "base"))
    device = torch.device("cpu")
    base = backbone.load_base(model.base, components=("text_encoder",))
    for text in ("a", "b"):
        found = prompts.fixed(TrainConfig(output=str(tmp_path), prompt=text), model, alone, device)
        assert set(found) == {"", text}
        assert all(torch.equal(embeds, base.encode_text([key])) for key, embeds in found.items())
    assert len(list(tmp_path.glob("prompts/*"))) == 2
    weights = next((folder / "base" / "text_encoder").glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    next(iter(tmp_path.glob("prompts/*"))).write_bytes(b"cut off")
    prompts.fixed(TrainConfig(output=str(tmp_path), prompt="a"), model, alone, device)
    assert len(list(tmp_path.glob("prompts/*"))) == 3


ALONE = """
import gc, sys, weakref
import torch
from ex4d.models import backbone
from ex4d.train import prompts
from ex4d.train.config import Place, TrainConfig

load, kept = backbone.load_base, []

def watched(*arguments, **options):
    base = load(*arguments, **options)
    kept.append(weakref.ref(base.text_encoder))
    return base

backbone.load_base = watched
gc.disable()
chosen = TrainConfig(output=sys.argv[2], prompt="a"), backbone.ModelConfig(base=sys.argv[1])
prompts.fixed(*chosen, Place(0, 1, 0), torch.device("cpu"))
print([reference() is None for reference in kept])
"""


def test_the_text_encoder_is_gone_before_the_transformer_is_loaded(folder: Path, tmp_path: Path) -> None:
    """11 GB of a GPU for 14B, which no later chance collection may be left to free. The first load of a process."""
    command = [sys.executable, "-c", ALONE, str(folder / "base"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[True]"
