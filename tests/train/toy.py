"""A toy base, model and loader of a few thousand numbers behind the real interfaces, and a process to train them.

    python tests/train/toy.py OUTPUT KEY=VALUE …      (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)

Beside the keys of TrainConfig it takes nan_at=STEP, kill_at=STEP, term_at=STEP: what befalls rank 0 at that step; and
late_s=SECONDS: how much longer rank 1 takes to encode.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from ex4d import config as configs
from ex4d.train import engine, validator
from ex4d.train.config import Place, TrainConfig
from ex4d.train.identity import identity
from ex4d.train.job import Job
from ex4d.train.objective import Encoder
from ex4d.train.stop import stop_signal
from ex4d.train.trainer import Trainer

NUM_CLIPS = 11


@dataclasses.dataclass(frozen=True)
class ToyModelConfig:
    base: str = "toy"


class ToyBase:
    """Every fourth pixel is a latent."""

    device = torch.device("cpu")

    def encode_video(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::4, ::4, ::4]

    def encode_condition(self, pixels: Tensor, visible: Tensor, mask_range: str) -> Tensor:
        mask = visible[:, None].float().expand(-1, 3, -1, -1, -1) * 2 - 1
        return torch.cat([self.encode_video(pixels), self.encode_video(mask)], dim=1)

    def encode_text(self, prompts: list[str]) -> Tensor:
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels.mean(dim=(2, 3))

    def first_frame_condition(self, pixels: Tensor, num_frames: int) -> Tensor:
        return pixels[:, :, None, ::4, ::4].expand(-1, -1, (num_frames - 1) // 4 + 1, -1, -1)


class ToyModel(nn.Module):
    """Frozen convolutions with a low-rank and a condition path beside them; sizes that no rank count divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen = nn.Conv3d(6, 13, 3, padding=1).requires_grad_(False)
        self.condition = nn.Conv3d(6, 13, 1)
        self.down, self.up = nn.Linear(13, 5, bias=False), nn.Linear(5, 13, bias=False)
        self.head = nn.Conv3d(13, 3, 3, padding=1).requires_grad_(False)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def forward(self, latents, timestep, prompt, image, first_frame, cond_latents, source=None):  # type: ignore[no-untyped-def]
        hidden = self.frozen(torch.cat([latents, first_frame], dim=1)) + self.condition(cond_latents)
        hidden = torch.tanh(hidden + (timestep / 1000 + prompt[:, 0] + image.mean(1))[:, None, None, None, None])
        hidden = hidden + self.up(self.down(hidden.movedim(1, -1))).movedim(-1, 1)
        return self.head(hidden)


def clips(seed: int, place: Place, micro: int, samples: int, nan_at: int | None, per_step: int) -> Iterator[dict]:
    """Yield endless micro batches of one rank: sample g of the endless shuffled stream goes to rank g mod W."""
    index = samples + place.rank
    while True:
        batch: dict = {"keys": [], "frames": [], "visible": [], "captions": [], "valid": []}
        for _ in range(micro):
            epoch, position = divmod(index, NUM_CLIPS)
            clip = int(np.random.default_rng([seed, epoch]).permutation(NUM_CLIPS)[position])
            rng = np.random.default_rng([7, clip])
            frames = rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
            batch["keys"].append(f"clip-{clip}" + ("-nan" if nan_at and index // per_step + 1 == nan_at else ""))
            batch["frames"].append(frames)
            batch["visible"].append(rng.random((9, 16, 16)) > 0.3)
            batch["captions"].append("x" * (clip % 3))
            batch["valid"].append(clip != 4)
            index += place.world_size
        yield {key: np.stack(value) if key in ("frames", "visible", "valid") else value for key, value in batch.items()}


class ToyEncoder(Encoder):
    """Damages the clips whose key says so, may be slow, and can request a stop of its process at a micro batch."""

    late_s, term_in, calls = 0.0, None, 0

    def encode(self, batch, noises, shift, sampling):  # type: ignore[no-untyped-def]
        time.sleep(self.late_s)
        self.calls += 1
        if self.calls == self.term_in:
            os.kill(os.getpid(), signal.SIGTERM)
        inputs = super().encode(batch, noises, shift, sampling)
        for index, key in enumerate(batch["keys"]):
            if key.endswith("-nan"):
                inputs.target[index] = float("nan")
        return inputs


def train_toy(output: str, place: Place, fate: dict | None = None, **values: object) -> int:
    """Train on a started engine and return the exit code."""
    fate = fate or {}
    defaults = {"num_steps": 20, "save_every": 10, "lr": 1e-2, "wandb_mode": "disabled", "prompt": None}
    config = configs.validate(TrainConfig, defaults | {"output": output} | values, "train")
    per_step = config.micro_batch_size * config.grad_accum_steps * place.world_size

    def open_loader(split: str, samples: int, micro: int, accum_steps: int) -> Iterator[dict]:
        return clips(config.seed + (split == "val"), place, micro, samples, fate.get("nan_at"), per_step)

    def write_adapter(folder: Path, tensors: dict, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter.safetensors")

    def show(metrics: dict) -> None:
        time.sleep(fate.get("pause_s") or 0.0)
        if metrics["step"] == fate.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if metrics["step"] == fate.get("term_at"):
            os.kill(os.getpid(), signal.SIGTERM)

    encoder = ToyEncoder(ToyBase(), "unit", config.prompt)
    if place.rank == 1:
        encoder.late_s = fate.get("late_s") or 0.0
    if place.rank == place.world_size - 1:
        encoder.term_in = fate.get("term_in")
    who = identity(config, ToyModelConfig(), "toy")
    job = Job(encoder, ToyModel(), open_loader, who, write_adapter, {"versions": {}})
    device, start_validation = torch.device("cpu"), fate.get("validator", validator.Child)
    with stop_signal() as stop_asked:
        return Trainer(config, job, place, device, show, start_validation).run(stop_asked)


def main(output: str, settings: list[str]) -> int:
    values = {key: yaml.safe_load(text) for key, text in (setting.split("=", 1) for setting in settings)}
    fate = {key: values.pop(key, None) for key in ("nan_at", "kill_at", "term_at", "term_in", "late_s")}
    place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0)
    engine.start(place, "cpu")
    code = train_toy(output, place, fate, **values)
    engine.stop()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
