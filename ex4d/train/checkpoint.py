"""Write and read checkpoints that any number of ranks at any ZeRO stage can resume, and that a kill cannot damage.

    OUTPUT/checkpoints/step-000010/
        adapter.safetensors     trainable weights, float32; an adapter that `ex4d generate` accepts
        optimizer.safetensors   exp_avg.NAME and exp_avg_sq.NAME, float32
        ema.safetensors         only if a moving average is kept
        state.json              step, samples consumed, identity of the run, best validation loss, versions

It takes twelve bytes per trainable parameter (sixteen with an average). A folder is written under a temporary name and
renamed when it is complete, so every step-* folder is complete. The latest checkpoint is the one with the highest step;
there is no pointer file, which could be out of date.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ex4d import storage
from ex4d.errors import ContractError

_NAME = re.compile(r"step-(\d{6,})")
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class State:
    """The facts of a checkpoint besides its tensors.

    Args:
        step: optimizer steps done.
        samples: samples consumed by all ranks together: the loader's cursor.
        global_batch_size: samples per step.
        identity: the settings that determine what the run learns (identity.identity).
        validation_loss: at this step; None if it was not measured.
        versions: of the installed packages.
    """

    step: int
    samples: int
    global_batch_size: int
    identity: dict[str, Any]
    validation_loss: float | None
    versions: dict[str, str]


def folder(output: str | Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(output) / "checkpoints"


def complete(output: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    root = folder(output)
    names = [path for path in root.iterdir() if _NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(names, key=lambda path: int(path.name.removeprefix("step-")))


def latest(output: str | Path) -> Path | None:
    """Return the last complete checkpoint of a run, or None."""
    checkpoints = complete(output)
    return checkpoints[-1] if checkpoints else None


def read_state(path: Path) -> State:
    """Return the state of a checkpoint. Raises ContractError if its state.json is missing or invalid."""
    try:
        return State(**json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ContractError(f"{path} is not a complete checkpoint: {error}") from error


def rewrite_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Give a checkpoint the identity of another run, so that this run can resume from it."""
    state = replace(read_state(path), identity=dict(identity))
    storage.write_bytes(path / "state.json", (json.dumps(asdict(state), indent=1) + "\n").encode())


def read_tensors(path: Path) -> dict[str, Any]:
    """Return {name: tensor on the CPU} of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ContractError(f"{path} cannot be read: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Write {name: CPU tensor} as a safetensors file."""
    from safetensors.torch import save_file

    save_file(tensors, path)


def load_weights(model: Any, tensors: Mapping[str, Any]) -> None:
    """Fill a model's trainable parameters from {name: tensor}; ContractError if they do not fit (weights.fill)."""
    from ex4d.models import weights

    weights.fill(model.trainable_parameters(), tensors, "the checkpoint")


@contextmanager
def writing(output: str | Path, state: State) -> Iterator[Path]:
    """Yield a folder that atomically becomes the checkpoint of `state` on exit. Only one rank calls this."""
    with _whole_folder(folder(output) / f"step-{state.step:06d}") as temporary:
        yield temporary
        (temporary / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder; on exit its files are flushed to disk and it is renamed to `target`.

    Raises:
        OSError: a file cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-{target.name}")
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        if not target.exists():  # an existing folder holds the same step of the same run
            os.replace(temporary, target)
            _flush(target.parent)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{target} cannot be written ({error}); the earlier checkpoints are complete") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def note_validation(output: str | Path, step: int, validation_loss: float) -> None:
    """Add a validation loss that arrived later to the checkpoint of its step, if that still exists."""
    path = folder(output) / f"step-{step:06d}"
    if path.is_dir():
        state = replace(read_state(path), validation_loss=validation_loss)
        storage.write_bytes(path / "state.json", (json.dumps(asdict(state), indent=1) + "\n").encode())


def clean(output: str | Path) -> None:
    """Remove what a killed process left half-written."""
    root = folder(output)
    for path in root.iterdir() if root.is_dir() else ():
        if path.name.startswith(_TEMPORARY):
            shutil.rmtree(path, ignore_errors=True)


def prune(output: str | Path, keep_last: int) -> None:
    """Remove all but the last `keep_last` checkpoints and the one with the lowest validation loss."""
    checkpoints = complete(output)
    measured = [(loss, path) for path in checkpoints if (loss := read_state(path).validation_loss) is not None]
    best = min(measured)[1] if measured else None
    for path in checkpoints[:-keep_last]:
        if path != best:
            # Rename first: a kill during the removal must not leave half a checkpoint under its name.
            doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
