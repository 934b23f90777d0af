"""A score computed by the user's Python file: `load(weights, device)` once, `score(model, frames, fps)` per clip."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import hub
from ex4d.errors import BadSample, ConfigError

OWN = "own"  # the score's name
KEY = "preprocess.scorer.file"


def measure(frames: np.ndarray, fps: float, file: str, weights: str | None, device: str) -> float:
    """Score a clip.

    Args:
        frames: uint8 [T,H,W,3] RGB.
        fps: frames per second.
        file: the Python file. weights: passed to its `load`.
        device: "cuda" or "cpu".

    Raises:
        BadSample: own_score: `score` returned a value that is not finite. ConfigError: the file cannot be used.
    """
    score, model = _loaded(os.path.abspath(file), weights, device)
    value = float(score(model, frames, fps))
    if not math.isfinite(value):
        raise BadSample("own_score", f"{Path(file).name} returned {value}, which is not a finite number")
    return value


def identity(file: str, weights: str | None) -> str:
    """Return a hash of the file and its weights, which identifies their scores. Raises ConfigError."""
    _functions(os.path.abspath(file))
    whole = hashlib.sha256(Path(file).read_bytes())
    path = Path(weights or "")
    if weights and path.is_dir():
        whole.update(hub.fingerprint([path], ["**/*"]).encode())
    elif weights and path.is_file():
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    else:
        whole.update((weights or "").encode())
    return whole.hexdigest()


def _functions(file: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """Import (`score`, `load` or None) from a Python file. Raises ConfigError."""
    if not file.endswith(".py") or not os.path.isfile(file):
        raise ConfigError(KEY, file, "must be a Python file NAME.py")
    spec = importlib.util.spec_from_file_location("ex4d_own_score", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(KEY, file, f"cannot be imported: {error}"[:300]) from error
    score, load = (getattr(module, name, None) for name in ("score", "load"))
    if not callable(score):
        raise ConfigError(KEY, file, "must have a function score(model, frames, fps)")
    return score, load


@lru_cache(maxsize=1)
def _loaded(file: str, weights: str | None, device: str) -> tuple[Callable[..., Any], Any]:
    score, load = _functions(file)
    return score, None if load is None else load(weights, device)
