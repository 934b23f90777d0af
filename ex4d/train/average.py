"""Keep an exponential moving average of the weights (train.ema_decay), which becomes the final adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ex4d.train import checkpoint
from ex4d.train.engine import Engine

FILE_NAME = "ema.safetensors"


class Average:
    """The average of the trainable parameters, held on rank 0's device. Every rank creates one and updates it.

    Args:
        path: checkpoint to resume; None: start from the current weights.
    """

    def __init__(self, engine: Engine, decay: float, path: Path | None, rank: int, device: torch.device):
        self._engine, self._decay = engine, decay
        self._values: dict[str, Tensor] = {}
        if rank == 0 and path is not None:
            saved = checkpoint.read_tensors(path / FILE_NAME)
            self._values = {name: value.to(device) for name, value in saved.items()}
        elif path is None:
            with engine.full_weights():
                if rank == 0:
                    self._values = {name: value.detach().clone() for name, value in engine.trainables.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights. A collective call."""
        with self._engine.full_weights():
            for name, mean in self._values.items():
                mean.lerp_(self._engine.trainables[name], 1 - self._decay)

    def on_cpu(self) -> dict[str, Tensor]:
        """Return {name: value} on the CPU; empty on all ranks but 0."""
        return {name: value.cpu() for name, value in self._values.items()}
