"""Generation and encoding on a GPU, without one: every tensor is on its device, in a dtype that the next one takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_on_cpu import DEVICE, gpu

from ex4d import generate
from ex4d.generate_config import GenerateConfig
from ex4d.models import adapter, backbone
from pipelines.encode import stages

SAMPLER = GenerateConfig(num_inference_steps=2, prompt="a red ball", negative_prompt="rolls")
FRAMES, VISIBLE = np.zeros((9, 32, 32, 3), np.uint8), np.ones((9, 32, 32), bool)


def on_gpu(base: backbone.Base, placed, whole: adapter.Ex4dModel | None = None) -> backbone.Base:
    """Return the base as `load_base` leaves it on a GPU."""
    for module in (whole, *(getattr(base, name) for name in backbone.COMPONENTS)):
        if module is not None:
            placed(module)
    base.device = DEVICE
    return base


@pytest.mark.parametrize(
    ("settings", "source", "quantize"),
    [
        ({}, None, None),
        ({"residual_fp32": True}, None, None),
        ({}, FRAMES, None),
        *(({}, None, style) for style in ("int8", "fp8", "nf4")),
        ({"offload": True}, FRAMES, "int8"),
    ],
)
@pytest.mark.parametrize("name", ["tiny", "wan"])
def test_a_view_is_sampled_in_bfloat16(wan_folder: Path, monkeypatch, name, settings, source, quantize):
    settings = dict(settings)
    folder = str(wan_folder) if name == "wan" else name
    base = backbone.load_base(folder, dtype="bfloat16", quantize=quantize, offload=settings.pop("offload", False))
    model = adapter.build_model(base.transformer, backbone.ModelConfig(lora_rank=4, adapter_hidden=8, **settings))
    with gpu(monkeypatch) as placed:
        on_gpu(base, placed, model)
        sampled = generate.generate.__wrapped__  # fake tensors know no inference mode
        frames = sampled(base, model, FRAMES, VISIBLE, SAMPLER, 0, first_frame=FRAMES[0], source=source)
    assert (frames.shape, frames.dtype) == (FRAMES.shape, np.uint8)


def test_a_sample_is_encoded(wan_folder: Path, monkeypatch):
    config = backbone.ModelConfig(base=str(wan_folder))
    base = backbone.load_base(config.base, dtype="bfloat16")
    monkeypatch.setattr(stages, "loaded", lambda *_: base)
    context = stages.Encoding("", "", config, "bfloat16", "cuda", ("visibility",))
    row = {"frames": FRAMES, "packed": np.packbits(VISIBLE, axis=-1)[None], "cond": None, "source_frames": FRAMES}
    row |= {"is_visibility": np.ones(1, bool), "first_shown": FRAMES[:1]}
    with gpu(monkeypatch) as placed:
        on_gpu(base, placed)
        made = stages.encode_video(row, context) | stages.encode_image(row, context)
    assert {name: array.dtype for name, array in made.items()} == dict.fromkeys(made, np.float32)
    assert made["condition"].shape[:3] == (1, 32, 3)


def test_what_a_gpu_refuses_is_refused(monkeypatch):
    with gpu(monkeypatch) as placed:
        layer = placed(torch.nn.Linear(4, 4))
        assert layer(torch.ones(2, 4, device=DEVICE)).device == DEVICE
        for wrong in (torch.ones(2, 4), torch.ones(2, 4, device=DEVICE, dtype=torch.bfloat16)):
            with pytest.raises(RuntimeError):
                layer(wrong)
        with pytest.raises(AssertionError, match="no array"):
            layer.weight.numpy()
