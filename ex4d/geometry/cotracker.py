"""Point tracking by CoTracker3 (Karaev et al. 2024). Users supply its code and weights, which we may not distribute.

It is not on a package index. `FETCH` says what `folder` must hold. Its licence forbids commercial use.
"""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import hub
from ex4d.errors import ConfigError

CHECKPOINT = "scaled_offline.pth"
LICENCE = "CC-BY-NC 4.0: code and weights are not for commercial use"
FETCH = (
    "a folder with CoTracker3: `git clone https://github.com/facebookresearch/co-tracker` and in it, or in its "
    f"`checkpoints`, https://huggingface.co/facebook/cotracker3/resolve/main/{CHECKPOINT}"
)
WINDOW = 60  # frames; the offline checkpoint was trained with this


def track(
    frames: np.ndarray, points: np.ndarray, folder: str | None, device: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Track points of the first frame; return (xy float32 [T, N, 2] px, visible bool [T, N]).

    Args:
        frames: uint8 [T, H, W, 3].
        points: float [N, 2] px (x, y) in frame 0, pixel centres at +0.5 (CoTracker's own are at integers).
        folder: see FETCH. device: cpu, cuda or cuda:N; None is a GPU if there is one.

    Raises:
        ConfigError: masks.tracker_path: code or weights are missing, or the weights are of another model.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    predictor = _predictor(checkpoint_of(folder), device)
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)[None].float().to(device)  # 0 … 255
    points = np.asarray(points, np.float32).reshape(-1, 2)
    queries = np.concatenate([np.zeros((len(points), 1), np.float32), points - 0.5], axis=1)  # (frame, x, y)
    with torch.no_grad():
        xy, seen = predictor(video, queries=torch.from_numpy(queries)[None].to(device))
    xy = xy[0].float().cpu().numpy() + np.float32(0.5)
    height, width = frames.shape[1:3]
    inside = ((xy >= 0) & (xy < (width, height))).all(axis=-1)
    return xy, seen[0].bool().cpu().numpy() & inside


def checkpoint_of(folder: str | None) -> Path:
    """Return the file of the weights in a folder. Raises ConfigError if there is none."""
    places = [Path(folder, place, CHECKPOINT) for place in (".", "checkpoints")] if folder else []
    checkpoint = next((path for path in places if path.is_file()), None)
    if checkpoint is None:
        raise ConfigError("masks.tracker_path", folder, FETCH)
    return checkpoint


@lru_cache(maxsize=1)
def _predictor(checkpoint: Path, device: str) -> Any:
    """Load the predictor with the checkpoint's weights; its code is imported from the environment or their folder."""
    import pickle

    import torch

    root = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        module = importlib.import_module("cotracker.predictor")
    except ImportError as error:
        raise ConfigError("masks.tracker_path", str(root), f"{FETCH} ({error})") from error
    predictor = module.CoTrackerPredictor(checkpoint=None, offline=True, window_len=WINDOW)
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        predictor.model.load_state_dict(state.get("model", state))
    except (pickle.UnpicklingError, RuntimeError, AttributeError) as error:
        raise ConfigError("masks.tracker_path", str(checkpoint), f"weights of CoTracker3 offline: {error}") from error
    hub.say_licence("cotracker3", checkpoint.name, LICENCE)
    return predictor.to(device).eval()
