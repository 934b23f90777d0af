"""Validate in a separate process: evaluate one set of weights on held-out clips while the ranks continue to train.

    OUTPUT/validation/step-000010/job.json              the settings of the run
    OUTPUT/validation/step-000010/adapter.safetensors   the weights to evaluate; removed afterwards
    OUTPUT/validation/step-000010/clip-0.mp4            side by side: condition, generated, real
    OUTPUT/validation/step-000010/result.json           written last
    OUTPUT/validation/step-000010/log.txt

The process does not belong to the process group. It has a deadline and the lowest priority, and the kernel kills it
first when memory runs out. Success or failure is a line in validation.jsonl and does not affect the training. At most
one runs at a time.

    python -m ex4d.train.validation OUTPUT/validation/step-000010
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ex4d import config as configs
from ex4d import flow, generate, storage, video
from ex4d.isolation.child import die_with
from ex4d.models.backbone import ModelConfig, load_base
from ex4d.redact import shown_output
from ex4d.train import checkpoint, report
from ex4d.train.config import BatchPlan, Place, TrainConfig
from ex4d.train.job import Job, build_job
from ex4d.train.objective import NamedNoise, velocity_losses
from ex4d.train.validator import PARENT

FPS = 8.0
# Fixed, not the run's: runs with another seed or noise schedule are evaluated on the same clips, noise and sigmas.
SEED, SHIFT = 0, 5.0
# ---------------------------------------------------------------- the loss, in the ranks and in the separate process


@torch.no_grad()
def measure(
    config: TrainConfig,
    encoder: Any,
    forward: Callable[..., Tensor],
    batches: list[dict],
    plan: BatchPlan,
    place: Place,
) -> Tensor:
    """Return `report.rows` for a rank's share of the validation clips.

    Noise and sigmas are the same every time and in every run, with any number of ranks.
    """
    rows = []
    for index, batch in enumerate(batches):
        where = report.positions(place, plan, index)
        noises = [NamedNoise(SEED, f"validate {w}", k) for w, k in zip(where, batch["keys"], strict=True)]
        inputs = encoder.encode(batch, noises, SHIFT, "uniform")
        rows.append(report.rows(where, velocity_losses(forward(*inputs.model_inputs), inputs, 1.0), inputs))
    return torch.cat(rows)


def read_share(job: Job, config: TrainConfig, micro_size: int, world_size: int) -> list[dict[str, Any]]:
    """Return this rank's share of the validation clips, which is the same every time."""
    batches = job.open_loader("val", 0, micro_size, 1)
    try:
        return [next(batches) for _ in range(math.ceil(config.validate_samples / (micro_size * world_size)))]
    finally:
        batches.close()


# ---------------------------------------------------------------- the separate process


def evaluate_weights(folder: Path) -> None:
    """Evaluate the weights in a step's folder: write its videos, then result.json."""
    chosen = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = configs.validate(TrainConfig, chosen["train"], "train")
    model_config = configs.validate(ModelConfig, chosen["model"], "model")
    # The dtype of the ranks: "auto" would be float32 on a CPU, 65 GB for 14B.
    model_config = dataclasses.replace(model_config, dtype=chosen.get("dtype") or model_config.dtype)
    place, device = Place(0, 1, 0), torch.device(config.validate_device)
    if device.type == "cpu":  # what serves the ranks' GPUs
        config = dataclasses.replace(config, attention="auto", compile=False, block_swap=0)
    elif device.index is not None:
        torch.cuda.set_device(device)  # pinned memory, for one, opens the current GPU, which is a rank's
    job = build_job(config, model_config, place, device)
    checkpoint.load_weights(job.model, checkpoint.read_tensors(folder / "adapter.safetensors"))
    job.model.eval()
    result: dict[str, Any] = {"validation_loss": None, "videos": []}
    if config.validate_apart:
        micro = config.micro_batch_size
        plan = BatchPlan(micro, micro, 1, 1)
        batches = read_share(job, config, micro, 1)
        rows = measure(config, job.encoder, job.model, batches, plan, place)
        result["validation_loss"] = report.mean(report.in_order(rows, config.validate_samples), report.MSE)
    if config.validate_videos:
        result["videos"] = write_videos(job, config, chosen["model"], folder)
    storage.write_bytes(folder / "result.json", json.dumps(result).encode())


@torch.no_grad()
def write_videos(job: Job, config: TrainConfig, model_config: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the first held-out clips as clip-N.mp4: condition, generated and real side by side; return the names.

    Clips, masks and noise are the same at every step; there is no guidance. Clips that cannot be read are skipped.
    """
    base = job.encoder.base
    if getattr(base, "vae", base) is None:  # a training on latents loads no VAE
        name, revision = model_config["base"], model_config["revision"]
        base = load_base(name, revision, device=base.device, components=("vae",))
    batches, names = job.open_loader("val", 0, 1, 1), []
    for index in range(config.validate_videos):
        batch = next(batches)
        if not batch["valid"][0]:
            continue
        noise = NamedNoise(config.seed, "validation video", batch["keys"][0])
        inputs = job.encoder.encode(batch, [noise], config.shift, "uniform")
        arguments: tuple[Any, ...] = inputs.model_inputs  # of Ex4dModel.forward
        noisy, cond = arguments[0], arguments[5]
        real = noisy - inputs.sigma.view(-1, 1, 1, 1, 1) * inputs.target  # x0 = x - sigma v
        latents = sample(job.model, arguments, config, real, job.encoder.timesteps)
        panels = [cond[:, : real.shape[1]], latents, real]
        frames = [generate.to_frames(base.decode_latents(panel)) for panel in panels]
        names.append(f"clip-{index}.mp4")
        video.write(folder / names[-1], np.concatenate(frames, axis=2), FPS)
    batches.close()
    return names


def sample(
    model: Callable[..., Tensor],
    model_inputs: tuple[Any, ...],
    config: TrainConfig,
    real: Tensor,
    timesteps: tuple[float, float] = flow.ALL_TIMESTEPS,
) -> Tensor:
    """Return latents [1, z, f, h, w] generated under the conditions of one clip's inputs, from fixed noise.

    Args:
        real: latents of the clip.
        timesteps: [first, end) of the model's. One expert of two samples alone: the high one jumps from its last step
            to the end, the low one starts from the noised clip.
    """
    noisy, _, prompt, *conditions = model_inputs
    noise = torch.randn(noisy.shape, generator=flow.generator_for(config.seed, "validation video")).to(noisy.device)
    *levels, end = flow.sigmas(config.validate_video_steps, config.shift).tolist()
    first, beyond = (limit / flow.NUM_TRAIN_TIMESTEPS for limit in timesteps)
    own = [level for level in levels if first <= level < beyond] or [min(beyond, levels[0])]
    return flow.sample(
        lambda latents, timestep: model(latents, timestep, prompt, *conditions),
        flow.add_noise(real, noise, torch.tensor(own[0])),
        torch.tensor([*own, end]),
    )


def main(folder: str) -> int:
    """Run one validation in this process."""
    die_with(int(os.environ.get(PARENT, 0)))  # a killed rank cannot stop its child
    torch.set_num_threads(1)
    with shown_output():  # keys of samples may come from strangers
        evaluate_weights(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
