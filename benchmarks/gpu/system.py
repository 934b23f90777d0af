"""Measure the system at full size on one GPU: the real trainer, the renderer, a clip's masks, the VAE, generation.

    python benchmarks/gpu/system.py --output out/system              14B at 49 × 512 × 512
    python benchmarks/gpu/system.py --output out/tiny --size tiny    the same rows of small models, on a CPU too

Run it through measure.py on a machine that lacks packages. Each row runs in its own process and is written to
OUTPUT/rows.jsonl as soon as it is measured; OUTPUT/system.{json,md} come last. The 14B base takes 33 GB of --scratch.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import collect
import rows
import torch

from ex4d.models import backbone, families
from ex4d.train import flops

HERE = Path(__file__).resolve().parent
FAMILY = "wan2.1-i2v-14b"
CLIPS = {"14b": (49, 512, 512), "tiny": (9, 64, 64)}
STEPS, MORE_STEPS = 6, 2


def shape_of(size: str) -> Mapping[str, Any]:
    """Return the transformer's configuration."""
    return families.FAMILIES[FAMILY].transformer if size == "14b" else backbone.transformer_config("tiny")


def write_run(size: str, device: torch.device, scratch: Path) -> None:
    """Write the base and the dataset for the trainer's rows."""
    import random_run

    start = time.perf_counter()
    written = random_run.write_base(scratch / "base", shape_of(size), device)
    base_s = time.perf_counter() - start
    latents = flops.latent_size(CLIPS[size])
    random_run.write_dataset(scratch / "latents", shape_of(size), latents, num_samples=8)
    rows.record("write a base", base_gb=written / 1e9, seconds=base_s)


def train(size: str, device: torch.device, scratch: Path, num_steps: int) -> None:
    """Run `ex4d train` up to `num_steps` in one process, with full checkpointing; record each step of this start."""
    output = scratch / "train"
    log = output / "metrics.jsonl"
    before = len(rows.read(log))
    settings = {
        "model": {"base": str(scratch / "base"), "adapter_hidden": 1024 if size == "14b" else 16},
        "train": {"data": str(scratch / "latents"), "output": str(output), "num_steps": num_steps, "num_processes": 1}
        | {"save_every": 1000, "zero_stage": 0, "activation_checkpointing": True, "device": device.type}
        | {"wandb_mode": "disabled", "log_every": 1},
    }
    config = scratch / "train.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    start, wall = time.perf_counter(), time.time()
    subprocess.run([sys.executable, "-m", "pipelines.cli", "train", str(config)], check=True)
    whole_s = time.perf_counter() - start
    steps = rows.read(log)[before:]
    saved = output / "checkpoints" / f"step-{num_steps:06d}"
    last_line, last_file = log.stat().st_mtime, (output / "adapter" / "adapter.safetensors").stat().st_mtime
    in_steps = sum(step["step_s"]["total"] for step in steps)
    rows.record(
        f"trainer, steps {steps[0]['step']} to {steps[-1]['step']}",
        seconds=min(step["step_s"]["total"] for step in steps),
        parts={part: round(s, 4) for part, s in steps[-1]["step_s"].items()},
        steps=[{key: step.get(key) for key in ("step", "loss", "mfu", "hfu", "step_s")} for step in steps],
        hfu=max((step["hfu"] for step in steps if "hfu" in step), default=None),
        peak_gb=steps[-1]["peak_memory_bytes"] / 1e9,
        start_s=last_line - wall - in_steps,
        save_s=last_file - last_line,
        checkpoint_gb=sum(file.stat().st_size for file in saved.iterdir()) / 1e9,
        whole_s=whole_s,
    )


def train_first(size: str, device: torch.device, scratch: Path) -> None:
    """Train six steps and write a checkpoint."""
    train(size, device, scratch, STEPS)


def train_more(size: str, device: torch.device, scratch: Path) -> None:
    """Resume from the checkpoint and train two more steps."""
    train(size, device, scratch, STEPS + MORE_STEPS)


def renderer(size: str, device: torch.device, scratch: Path) -> None:
    """Build nvdiffrast if its source is there, and compare it with `cpu` on a clip along an orbit."""
    import numpy as np

    from ex4d.geometry import trajectory
    from ex4d.geometry.render import warp_video

    found: dict[str, Any] = {}
    build, start = build_nvdiffrast(device), time.perf_counter()
    frames, z_depth, K = clip(size)  # half a minute with what is compiled next, while the other compiler works
    w2c = trajectory.build("orbit", len(frames), 45.0, trajectory.radius_of(z_depth[0]))

    def warp(backend: str) -> tuple[Any, Any, float]:
        start = time.perf_counter()
        colours, visible = warp_video(frames, z_depth, K, w2c, backend=backend)
        return colours, visible, 1000 * (time.perf_counter() - start) / len(frames)

    warp("cpu")  # compiles
    if build is not None and build.wait() == 0:
        importlib.invalidate_caches()
        found["build_s"] = time.perf_counter() - start
    colours, visible, found["cpu_ms_per_frame"] = warp("cpu")
    rows.record("renderer, cpu", seconds=found["cpu_ms_per_frame"] * len(frames) / 1000)
    if device.type != "cuda" or importlib.util.find_spec("nvdiffrast") is None:
        rows.record("renderer, nvdiffrast", failed="needs a GPU and nvdiffrast, built: collect.py, log.txt")
        return
    warp("nvdiffrast")
    theirs, seen, found["nvdiffrast_ms_per_frame"] = warp("nvdiffrast")
    both = visible & seen
    close = (np.abs(colours.astype(int) - theirs) <= 2).all(-1)
    found |= {"mask_differs": float((visible != seen).mean()), "colour_differs": float(1 - close[both].mean())}
    rows.record("renderer, nvdiffrast", seconds=found["nvdiffrast_ms_per_frame"] * len(frames) / 1000, **found)


def build_nvdiffrast(device: torch.device) -> subprocess.Popen[bytes] | None:
    """Start the build of nvdiffrast and return its process; None where it is installed, or where its source is not."""
    if device.type != "cuda" or importlib.util.find_spec("nvdiffrast") is not None or not collect.NVDIFFRAST.is_dir():
        return None
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    return subprocess.Popen([*command, "--target", os.environ["EX4D_SITE"], str(collect.NVDIFFRAST)])


def clip(size: str) -> tuple[Any, Any, Any]:
    """Return (frames, z_depth, K) of a synthetic clip."""
    from ex4d.synthetic import SyntheticConfig, clip_scene, render_clip

    num_frames, *sides = CLIPS[size]
    config = SyntheticConfig(num_frames=num_frames, size=(sides[0], sides[1]), seed=0, supersample=1)
    scene, cameras = clip_scene(config, 0)
    return *render_clip(scene, cameras, config.fps, config.supersample), cameras[0].K


def masks(size: str, device: torch.device, scratch: Path) -> None:
    """Draw the masks of a clip, as `ex4d preprocess` does: on the CPU, so that no dataset depends on the machine."""
    from ex4d.geometry import masks

    made = clip(size)
    masks.draw(*made, masks.MaskConfig(num_masks=1), 0)  # compiles
    start = time.perf_counter()
    drawn = masks.draw(*made, masks.MaskConfig(), 0)
    rows.record("masks of a clip", seconds=time.perf_counter() - start, masks=len(drawn.kind))


def vae(size: str, device: torch.device, scratch: Path) -> None:
    """Encode a clip's four videos, and decode one, with a VAE of random weights in Wan's published configuration."""
    from diffusers import AutoencoderKLWan

    shape = {} if size == "14b" else {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    num_frames, *sides = CLIPS[size]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        with device:
            model = AutoencoderKLWan(**shape).to(dtype).eval()
        pixels = torch.zeros(1, 3, num_frames, *sides, device=device, dtype=dtype).uniform_(-1, 1)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            encode_s = timed(device, 2, model.encode, pixels)
            decode_s = timed(device, 1, model.decode, model.encode(pixels).latent_dist.mode())
        peak = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}
        name = str(dtype).removeprefix("torch.")
        rows.record(f"VAE, {name}", seconds=4 * encode_s, encode_s=encode_s, decode_s=decode_s, **peak)


def generation(size: str, device: torch.device, scratch: Path) -> None:
    """Time a sampling step of generation, with and without guidance."""
    sys.path.insert(0, str(HERE.parent))
    import train_14b

    from ex4d import flow

    chosen = train_14b.size_of(size)
    model, _ = train_14b.random_model(chosen, train_14b.Setting(), device)
    model.set_gradient_checkpointing(False)
    model.eval()
    noisy, _, *conditions = train_14b.inputs_of(chosen, device)

    def velocity(latents: Any, timestep: Any) -> Any:
        return model(latents, timestep, *conditions)

    for guidance in (1.0, 5.0):
        with torch.inference_mode():
            seconds = timed(device, 1, flow.sample, velocity, noisy, flow.sigmas(4), guidance, velocity) / 4
        peak = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if device.type == "cuda" else {}
        rows.record(f"generation, a step, guidance {guidance:g}", seconds=seconds, **peak)


def timed(device: torch.device, repeats: int, function: Callable[..., object], *arguments: Any) -> float:
    """Return the minimum seconds of a call of `function(*arguments)`, after one warm-up call."""
    least = float("inf")
    for number in range(1 + repeats):
        start = time.perf_counter()
        function(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            least = min(least, time.perf_counter() - start)
    return least


# Most valuable first; the trainer's rows need the base that the first one writes. The seconds that each may take fit
# the run's budget together, so that no row prevents the last ones.
ROWS: dict[str, tuple[Callable[[str, torch.device, Path], None], float]] = {
    "write a base": (write_run, 110),
    "trainer": (train_first, 120),
    "trainer, resumed": (train_more, 80),
    "renderer": (renderer, 100),
    "generation": (generation, 60),
    "VAE": (vae, 40),
    "masks": (masks, 40),
}

COLUMNS = {
    "seconds": "{seconds:.3g}",
    "HFU": "{hfu:.1%}",
    "peak GB": "{peak_gb:.1f}",
    "start, s": "{start_s:.1f}",
    "save, s": "{save_s:.1f}",
    "masks differ": "{mask_differs:.2%}",
}


def page(facts: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    head = f"{facts['date']}, {facts['hardware']}; torch {facts['torch']}, clips {facts['clip']}. "
    notes = (
        "Seconds: of the best step, of a whole clip (VAE: the four videos of a training sample), of a sampling step."
    )
    parts = [
        f"{row['row']}, last step: " + ", ".join(f"{part} {s:.2f} s" for part, s in row["parts"].items())
        for row in facts["rows"]
        if "parts" in row
    ]
    return "\n".join(
        ["# The system on one GPU", "", head + notes, "", *rows.table(facts["rows"], COLUMNS), "", *parts, ""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = shutil.which("nvidia-smi") is not None
    parser.add_argument("--output", type=Path, default=Path("out/system"))
    parser.add_argument("--size", choices=CLIPS, default="14b")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all rows")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--scratch", type=Path, help="for the base and the run; a temporary folder where none is given")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        ROWS[arguments.row][0](arguments.size, torch.device(arguments.device), arguments.scratch)
        return
    if arguments.size == "14b" and arguments.device == "cpu":
        sys.exit("no GPU is here: --size tiny runs the same rows on a CPU")
    scratch = arguments.scratch or Path(tempfile.mkdtemp(prefix="ex4d-system-"))
    command = [sys.executable, __file__, "--size", arguments.size, "--device", arguments.device]
    command += ["--scratch", str(scratch)]
    patience = 1 if arguments.device == "cuda" else 10  # a rehearsal shares its cores with others
    planned = [rows.Row(name, [*command, "--row", name], patience * ROWS[name][1]) for name in arguments.only]
    measured = rows.run_rows(planned, arguments.output, arguments.budget)
    if arguments.scratch is None:
        shutil.rmtree(scratch, ignore_errors=True)
    hardware = f"{os.cpu_count()} CPU cores"
    if on_gpu:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        hardware = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **{"hardware": hardware, "torch": torch.__version__, "size": arguments.size},
        **{"clip": " × ".join(map(str, CLIPS[arguments.size])), "rows": measured},
    }
    (arguments.output / "system.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "system.md").write_text(page(facts), encoding="utf-8")
    print(page(facts))


if __name__ == "__main__":
    main()
