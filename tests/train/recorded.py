"""Run one rank of real runs in turn, and record which clip it takes at which position of which step.

    python tests/train/recorded.py RUNS.json      (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)

RUNS.json: [{"start": number of this start, "kill_at": step or null, "model": {…}, "train": {…}}, …]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from ex4d import config as configs
from ex4d.models.backbone import ModelConfig
from ex4d.train import engine
from ex4d.train.config import Place, TrainConfig
from ex4d.train.job import build_job
from ex4d.train.trainer import Trainer


class Recorded(Trainer):
    """A trainer that writes OUTPUT/keys/START-RANK.jsonl: [step, place in the global batch, key]."""

    start = 0
    _seen: tuple[int, int] = (0, 0)

    def accumulate(self, step: int, batch: dict[str, Any], watch: Any) -> Any:
        folder = Path(self.config.output) / "keys"
        folder.mkdir(exist_ok=True)
        with open(folder / f"{self.start}-{self.place.rank}.jsonl", "a", encoding="utf-8") as file:
            for key in batch["keys"]:
                self._seen = (step, self._seen[1] + 1 if self._seen[0] == step else 0)
                place = self.place.rank + self.place.world_size * self._seen[1]
                file.write(json.dumps([step, place, key]) + "\n")
        return super().accumulate(step, batch, watch)


def run(place: Place, chosen: dict[str, Any]) -> int:
    """Execute one run on a started engine; return its exit status."""
    config = configs.validate(TrainConfig, chosen["train"], "train")
    model = configs.validate(ModelConfig, chosen["model"], "model")
    Path(config.output).mkdir(parents=True, exist_ok=True)

    def show(metrics: dict[str, Any]) -> None:
        if metrics["step"] == chosen.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    device = torch.device("cpu")
    trainer = Recorded(config, build_job(config, model, place, device), place, device, show)
    trainer.start = chosen.get("start", 0)
    code = trainer.run()
    trainer.batches.close()
    return code


def read_keys(output: Path) -> dict[int, list[str]]:
    """Return {step: keys in the order of the global batch}; for a repeated step, those of the last time."""
    steps: dict[int, tuple[int, dict[int, str]]] = {}
    for path in sorted(output.glob("keys/*.jsonl"), key=lambda path: [int(n) for n in path.stem.split("-")]):
        start = int(path.stem.split("-")[0])
        for line in path.read_text(encoding="utf-8").splitlines():
            step, place, key = json.loads(line)
            if steps.get(step, (start - 1, {}))[0] != start:
                steps[step] = (start, {})
            steps[step][1][place] = key
    return {step: [keys[place] for place in sorted(keys)] for step, (_, keys) in sorted(steps.items())}


def main(path: str) -> int:
    place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0)
    engine.start(place, "cpu")
    codes = [run(place, chosen) for chosen in json.loads(Path(path).read_text(encoding="utf-8"))]
    engine.stop()
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
