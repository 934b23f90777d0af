"""Measure the error of `ex4d plan`: compare its wall time and CPU hours with real runs on several kinds of corpora.

    python benchmarks/scale/plan.py                      # the three held-out corpora
    python benchmarks/scale/plan.py calibration          # the corpus that its constants come from

Wall time is that of the whole command, including the start of Ray; CPU hours are those that stages reserved. Two
workers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Corpus:
    """Generated videos, and the settings of `ex4d preprocess` for them."""

    videos: int
    num_frames: int
    size: tuple[int, int]
    settings: dict[str, Any]
    motion: str = "gentle"


CORPORA = {
    "calibration": Corpus(
        24, 24, (128, 128), {"num_frames": 9, "size": [128, 128], "clips_per_shot": 2, "masks": {"num_masks": 1}}
    ),
    "many small clips": Corpus(
        60, 50, (64, 64), {"num_frames": 9, "size": [64, 64], "clips_per_shot": 5, "masks": {"num_masks": 2}}
    ),
    "few long clips": Corpus(
        16, 33, (160, 160), {"num_frames": 33, "size": [160, 160], "clips_per_shot": 1, "masks": {"num_masks": 4}}
    ),
    "depth from motion": Corpus(
        30,
        18,
        (192, 192),
        {"num_frames": 17, "size": [128, 128], "depth": "parallax", "masks": {"num_masks": 1}, "max_bad_fraction": 1.0},
        "strong",
    ),
}


def make(folder: Path, corpus: Corpus) -> None:
    """Write the videos, with depth beside them if the settings read it."""
    from ex4d.synthetic import SyntheticConfig, write_corpus

    config = SyntheticConfig(
        **{"num_videos": corpus.videos, "num_frames": corpus.num_frames, "size": corpus.size, "supersample": 1},
        camera_motion=corpus.motion,
    )
    write_corpus(folder, config)


def ex4d(*arguments: str, state: Path) -> float:
    """Run `ex4d` and return its duration in seconds."""
    environment = os.environ | {"XDG_STATE_HOME": str(state), "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.monotonic() - started


def compare(name: str, corpus: Corpus) -> dict[str, Any]:
    """Return the plan, and the figures of the run."""
    with tempfile.TemporaryDirectory(prefix="ex4d-plan-") as text:
        folder = Path(text)
        make(folder / "in", corpus)
        output = folder / "out"
        chosen = {"input": str(folder / "in"), "output": str(output), "num_workers": 2, **corpus.settings}
        (folder / "plan.yaml").write_text(yaml.safe_dump({"preprocess": chosen, "plan": {"num_cpus": 2}}))
        (folder / "run.yaml").write_text(yaml.safe_dump({"preprocess": chosen}))
        ex4d("plan", str(folder / "plan.yaml"), state=folder / "state")
        planned = json.loads((output / "plan.json").read_text())
        wall_s = ex4d("preprocess", str(folder / "run.yaml"), state=folder / "state")
        line = json.loads((output / "run.jsonl").read_text().splitlines()[-1])
    cpu_s = sum(stage["worker_s"] * stage["num_cpus"] for stage in line["stages"].values())
    found = {"corpus": name, "videos": corpus.videos, "samples": line["counts"]["samples"]}
    found |= {"planned_wall_s": round(planned["wall_h"] * 3600, 1), "wall_s": round(wall_s, 1)}
    found |= {"planned_cpu_s": round(planned["cpu_h"] * 3600, 1), "cpu_s": round(cpu_s, 1)}
    for what in ("wall", "cpu"):
        found[f"{what}_off"] = f"{found[f'planned_{what}_s'] / found[f'{what}_s'] - 1:+.0%}"
    return found | {"load": os.getloadavg()[0]}


def main() -> None:
    """Compare and print a line of JSON for each corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="*", default=[name for name in CORPORA if name != "calibration"])
    for name in parser.parse_args().corpora:
        print(json.dumps(compare(name, CORPORA[name])), flush=True)


if __name__ == "__main__":
    main()
