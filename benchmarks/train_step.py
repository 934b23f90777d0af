"""Measure the overhead of the trainer over a bare PyTorch loop: same model, clips and noise, steps in turns.

    python benchmarks/train_step.py [NUM_PAIRS] [MICRO_BATCH_SIZE]

One rank on the CPU, the tiny base, 9 frames of 96 × 96. Each pair is one step of each, in alternating order; both
encode, draw noise, run forward and backward, clip and step AdamW. The trainer adds DeepSpeed (ZeRO-2), the check for
non-finite values and the report. Writes benchmarks/results/train_step.json.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29655")

import numpy as np
import torch
from torch import nn

from ex4d.config import installed_versions
from ex4d.models import adapter, backbone
from ex4d.train import engine
from ex4d.train.config import Place, TrainConfig
from ex4d.train.job import PACKAGES, Job
from ex4d.train.objective import Encoder, NamedNoise, velocity_losses
from ex4d.train.trainer import Trainer

CLIP = (9, 96, 96)
MODEL = backbone.ModelConfig(base="tiny", adapter_hidden=128)


class Clips(Iterator[dict]):
    """Endless batches of noise, the same for both loops."""

    def __init__(self, size: int):
        rng = np.random.default_rng(0)
        self.batch = {
            "keys": [f"clip-{i}" for i in range(size)],
            "frames": rng.integers(0, 256, (size, *CLIP, 3), dtype=np.uint8),
            "visible": rng.random((size, *CLIP)) > 0.5,
            "captions": [""] * size,
            "valid": np.ones(size, dtype=bool),
        }

    def __next__(self) -> dict:
        return self.batch

    def close(self) -> None:
        """Do nothing: no resource is open."""


def new_model() -> tuple[backbone.Base, nn.Module]:
    base = backbone.load_base(MODEL.base)
    return base, adapter.build_model(base.transformer, MODEL)


def bare_step(base: backbone.Base, model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict, config, step: int):
    encoder = Encoder(base, "unit", "")
    noises = [NamedNoise(config.seed, step, key) for key in batch["keys"]]
    inputs = encoder.encode(batch, noises, config.shift, config.timestep_sampling)
    loss = velocity_losses(model(*inputs.model_inputs), inputs, 1.0).weighted.mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.trainable_parameters().values(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def main(num_pairs: int = 12, micro: int = 40) -> None:
    place = Place(0, 1, 0)
    device = engine.start(place, "cpu")
    clips = Clips(micro)
    with tempfile.TemporaryDirectory() as output:
        config = TrainConfig(output=output, num_steps=10**6, micro_batch_size=micro, wandb_mode="disabled")
        base, model = new_model()
        job = Job(Encoder(base, "unit", ""), model, lambda *_: clips, {}, lambda *_: None, {})
        trainer = Trainer(config, job, place, device, lambda _: None)
        bare_base, bare = new_model()
        options = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
        optimizer = torch.optim.AdamW(bare.trainable_parameters().values(), **options)

        def ours(step: int) -> float:
            return trainer.step(step, lambda: False)[0]["loss"]

        def theirs(step: int) -> float:
            return bare_step(bare_base, bare, optimizer, clips.batch, config, step)

        ratios, seconds = [], {"trainer": [], "bare": []}
        cpu: dict[str, list[float]] = {"trainer": [], "bare": []}  # less disturbed by other programs
        for step in range(1, num_pairs + 2):
            pair, values = {"trainer": ours, "bare": theirs}, {}
            for name in sorted(pair, reverse=step % 2 == 0):
                start, start_cpu = time.perf_counter(), time.process_time()
                values[name] = pair[name](step)
                elapsed, elapsed_cpu = time.perf_counter() - start, time.process_time() - start_cpu
                if step > 1:  # the first step of each allocates
                    seconds[name].append(elapsed)
                    cpu[name].append(elapsed_cpu)
            if abs(values["trainer"] - values["bare"]) > 1e-5:
                sys.exit(f"step {step}: the loops differ: {values}")
            if step > 1:
                ratios.append(seconds["trainer"][-1] / seconds["bare"][-1])
    engine.stop()
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread",
        "versions": installed_versions(PACKAGES),
        "pairs": num_pairs,
        "micro_batch_size": micro,
        "ratio_median": statistics.median(ratios),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "cpu_ratio_median": statistics.median(a / b for a, b in zip(cpu["trainer"], cpu["bare"], strict=True)),
        "trainer_s_median": statistics.median(seconds["trainer"]),
        "bare_s_median": statistics.median(seconds["bare"]),
        "load_average": os.getloadavg()[0],
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / "train_step.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]))
