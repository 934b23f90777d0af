"""Training steps on a GPU that is not there: torch's fake tensors know the device and type of each, and no numbers.

    python tests/train/fake_gpu.py BASE      prints, for each of STEPS, on which device and in which type it leaves what

A tensor that stays on the CPU, or an operator that does not take two types, raises what it would on a real GPU. In a
build of PyTorch for CPUs, operators ask for a guard of the device, which a build for GPUs has: that of the meta device,
which does nothing, stands in. Exit status 3: this PyTorch does not let it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ex4d import flow
from ex4d.models import adapter, backbone, quantize, swap
from ex4d.train import objective, report

GPU = torch.device("cuda", 0)
CUDA, META, TYPES = 1, 14, 22  # of c10::DeviceType
# Settings of the base, of the model and of its blocks.
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32 residual": {"residual_fp32": True},
    "source video": {"source_video": True},
    "int8": {"quantize": "int8"},
    "fp8": {"quantize": "fp8"},
    "nf4": {"quantize": "nf4"},
    "swapped": {"swapped": 1},
}


def stand_in() -> None:
    """Give CUDA the meta device's guard. Exits with 3 where that does not work."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        sys.exit(3)
    if torch.cuda.is_available() or guards[CUDA] or not guards[META]:
        sys.exit(3)
    guards[CUDA] = guards[META]


def with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes real numbers on the CPU, from which its caller goes on."""

    @wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return called


def draw_sigma(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Draw as flow.draw_sigma does, with numbers, and return both on the device."""
    name, generator, shift, device, timesteps = arguments
    sigma, weight = with_numbers(REAL_DRAW)(name, generator, shift, "cpu", timesteps)
    return sigma.to(device), weight.to(device)


REAL_DRAW = flow.draw_sigma


class Stream:
    """What block swap calls of a stream and of an event."""

    def __init__(self, device: torch.device | None = None) -> None: ...

    def record_event(self) -> Stream:
        return self

    def wait_event(self, event: Stream) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    """Replace what needs numbers, or CUDA itself."""
    empty = torch.empty

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*size, **options)

    noise = objective.NamedNoise
    with (
        mock.patch.object(flow, "draw_sigma", draw_sigma),
        mock.patch.object(noise, "normal", with_numbers(noise.normal)),
        mock.patch.object(noise, "drops_prompt", with_numbers(noise.drops_prompt)),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(Tensor, "record_stream", return_value=None),
        mock.patch.object(torch, "empty", unpinned),
        mock.patch.multiple(
            torch.cuda,
            Stream=Stream,
            stream=lambda _: contextlib.nullcontext(),
            current_stream=Stream,
            _lazy_init=lambda: None,
        ),
        mock.patch.object(swap, "_disable_current_modes", contextlib.nullcontext),
    ):
        yield


def make_fake(module: nn.Module, device: torch.device) -> None:
    """Replace the tensors of a module by fake ones of their type on a device."""
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, value in list(table.items()):
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                    is_parameter = isinstance(value, nn.Parameter)
                    table[name] = nn.Parameter(fake, value.requires_grad) if is_parameter else fake
        if isinstance(owner, quantize.QuantizedLinear) and owner.levels is not None:
            owner.levels = torch.empty(owner.levels.shape, device=device)


def step(folder: str, quantize: str | None = None, swapped: int = 0, **settings: Any) -> dict[str, str]:
    """Return {name: device and type} of what encoding and the forward pass of a step on clips make."""
    base = backbone.load_base(folder, dtype="bfloat16", quantize=quantize)
    model = adapter.build_model(
        base.transformer, backbone.ModelConfig(base=folder, lora_rank=4, adapter_hidden=16, **settings)
    )
    model.set_gradient_checkpointing(True)
    frames = np.zeros((2, 5, 32, 32, 3), np.uint8)
    batch: dict[str, Any] = {"frames": frames, "visible": np.ones(frames.shape[:-1], bool), "valid": np.ones(2, bool)}
    batch |= {"captions": ["a", "b"], **({"source": frames} if settings.get("source_video") else {})}
    with FakeTensorMode(allow_non_fake_inputs=True), doubles():
        if swapped:
            make_fake(model, torch.device("cpu"))
            swap.swap_blocks(model.transformer, swapped, GPU)
        for component in (model, base.vae, base.text_encoder, base.image_encoder):
            make_fake(component, GPU)
        base.device = GPU
        noises = [objective.NamedNoise(0, 1, key) for key in "ab"]
        inputs = objective.Encoder(base, "unit", None).encode(batch, noises, 5.0, "diffsynth")
        velocity = model(*inputs.model_inputs)
        losses = objective.velocity_losses(velocity, inputs, 2.0)
        made = {f"input {number}": value for number, value in enumerate(inputs.model_inputs) if value is not None}
        made |= {"velocity": velocity, "loss": losses.weighted, "rows": report.rows([0, 1], losses, inputs)}
        return {name: f"{value.device} {value.dtype}" for name, value in made.items()}


if __name__ == "__main__":
    stand_in()
    print(json.dumps({name: step(sys.argv[1], **settings) for name, settings in STEPS.items()}))
