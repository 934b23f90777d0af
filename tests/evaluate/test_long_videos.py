"""Videos of several windows by a trained tiny model: joins do not show, and nothing drifts from the first window to the
last.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ex4d import generate, synthetic
from ex4d.evaluate import views
from ex4d.generate_config import GenerateConfig
from ex4d.geometry import masks
from ex4d.models import windows

ROOT = Path(__file__).resolve().parents[2]
WINDOW, OVERLAP, NUM_SCENES = 17, 4, 6
NUM_FRAMES = 4 * WINDOW + 1
LATENTS = (NUM_FRAMES - 1) // 4 + 1
SAMPLER = GenerateConfig(
    num_inference_steps=10, guidance_scale=1.0, shift=3.0, window_frames=WINDOW, window_overlap=OVERLAP
)
WORLD = synthetic.SyntheticConfig(num_videos=1, num_frames=NUM_FRAMES, size=(96, 96), fps=8.0, seed=900_000)

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapter, trained with its recipe, or that of the finished demo in EX4D_DEMO, which saves minutes."""
    if "EX4D_DEMO" in os.environ:
        return Path(os.environ["EX4D_DEMO"]) / "train" / "adapter"
    out = tmp_path_factory.mktemp("long") / "demo"
    command = [sys.executable, "-m", "pipelines.cli", "demo", "--output", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    return out / "train" / "adapter"


def test_joins_do_not_show_and_colours_do_not_drift(adapter: Path) -> None:
    """The path goes to one side and back, then to the other and back, so that first and last window are similar."""
    base, model = generate.load(adapter, device="cpu")
    torch.set_num_threads(1)
    errors, pops, drifts = [], [], []
    for index in range(NUM_SCENES):
        clip = views.scene_clip(index, WORLD)
        view = views.with_truth(views.along(clip, views.Path("full", 30.0, {})), index, WORLD)
        given = (view.cond_video, view.visible, SAMPLER, 0)
        made = generate.generate(base, model, *given, first_frame=clip.frames[0]).astype(float)
        truth, warp = np.asarray(view.truth, float), view.cond_video.astype(float)
        seen = masks.erode(view.visible, SAMPLER.erosion_px)
        errors.append(np.abs(made - truth).mean((1, 2, 3)))
        pops.append(np.abs(np.diff(made, axis=0) - np.diff(truth, axis=0)).mean((1, 2, 3)))
        drifts.append(offset(made, warp, seen, slice(-WINDOW, None)) - offset(made, warp, seen, slice(1, WINDOW)))
    shared = joins()
    error, pop = np.mean(errors, axis=0), np.mean(pops, axis=0)
    at, elsewhere = error[shared].mean(), error[1:][~shared[1:]].mean()
    jump, usual = pop[shared[1:]].mean(), pop[~shared[1:]].mean()
    drift = np.mean(drifts, axis=0)
    print(f"error at joins / elsewhere {at / elsewhere:.3f}, of differences between frames {jump / usual:.3f}")
    print(f"drift of mean and deviation, % of the range: {100 * drift[0]:.2f} {100 * drift[1]:.2f}")
    assert at <= 1.2 * elsewhere
    assert jump <= 1.2 * usual
    assert np.abs(drift).max() <= 0.01


def offset(made: np.ndarray, warp: np.ndarray, seen: np.ndarray, part: slice) -> np.ndarray:
    """Return mean and deviation of the result less those of the warp, over visible pixels, in shares of the range."""
    ours, theirs = made[part][seen[part]], warp[part][seen[part]]
    return np.array([ours.mean() - theirs.mean(), ours.std() - theirs.std()]) / 255


def joins() -> np.ndarray:
    """Return bool [T], True for frames in several windows; frame 0, which is given, counts as in one."""
    parts = windows.parts(LATENTS, (WINDOW - 1) // 4 + 1, OVERLAP // 4)
    makers = torch.zeros(LATENTS)
    for part in parts:
        makers[part[1:]] += 1
    assert len(parts) >= 4
    return np.array([bool(makers[(frame + 3) // 4] > 1) for frame in range(NUM_FRAMES)])
