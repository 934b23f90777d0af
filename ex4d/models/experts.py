"""Support bases with two experts (Wan2.2-A14B): a transformer for high noise levels, `high`, and one for low, `low`.

Each expert is trained separately and has its own adapter; generation switches experts at the base's boundary.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ex4d.errors import ConfigError, ContractError
from ex4d.models import backbone, families, weights
from ex4d.models.adapter import Ex4dModel
from ex4d.models.backbone import Expert
from ex4d.models.encoders import Base

log = logging.getLogger(__name__)

EXPERTS: tuple[Expert, ...] = ("high", "low")
NUM_TIMESTEPS = 1000  # a timestep is 1000 times the noise level
# Metadata that must be equal in the adapters of two experts that are used together.
_ALIKE = ("base", "mask_range", "source_video", "num_frames", "size")


def boundary(base: str, revision: str | None = None) -> float | None:
    """Return the noise level at and above which the high expert works; None for a base with one transformer.

    It is `boundary_ratio` in the base's model_index.json; known hub ids need no network access.

    Raises:
        ConfigError: the base is missing. ContractError: it has two transformers but no valid boundary.
    """
    known = families.family_of_hub_id(base)
    if known is not None and not Path(base).is_dir():
        return families.FAMILIES[known].boundary
    folder = backbone.resolve(base, revision, ())
    index = folder / "model_index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8")).get("boundary_ratio") if index.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ContractError(f"{index} cannot be read: {error}") from error
    if found is None and not (folder / "transformer_2").is_dir():
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1:
        raise ContractError(f"{index}: boundary_ratio is {found!r}; two experts need one between 0 and 1")
    return float(found)


def timesteps(base: str, revision: str | None, expert: str | None) -> tuple[float, float]:
    """Return the half-open range [first, end) of the timesteps that an expert is trained on.

    Raises:
        ConfigError: the base does not have this expert.
    """
    at = boundary(base, revision)
    if at is None:
        if expert is not None:
            raise ConfigError("train.expert", expert, f"must be null: {base} has one transformer")
        return 0.0, math.inf
    if expert not in EXPERTS:
        allowed = f"must be high (noise levels of at least {at:g}) or low (below): {base} has two transformers"
        raise ConfigError("train.expert", expert, f"{allowed}, each trained separately")
    return (NUM_TIMESTEPS * at, math.inf) if expert == "high" else (0.0, NUM_TIMESTEPS * at)


def files(folder: str | Path) -> dict[Expert, Path]:
    """Return {expert: path of its adapter.safetensors} of a folder with FOLDER/high or FOLDER/low; {} for others.

    Each of the two is an adapter's folder or the output folder of a training.
    """
    if (Path(folder) / weights.FILE_NAME).is_file():
        return {}
    places = {
        name: [Path(folder) / name / weights.FILE_NAME, Path(folder) / name / "adapter" / weights.FILE_NAME]
        for name in EXPERTS
    }
    return {name: file for name, both in places.items() for file in both[::-1] if file.is_file()}


def read(path: str | Path) -> dict[Expert | None, tuple[Path, weights.AdapterMetadata]]:
    """Return {expert: (file, metadata)}, one or two entries; the key is None for a base with one transformer.

    Args:
        path: as in `weights.read_adapter`, or a folder of two experts' adapters (see `files`).

    Raises:
        ConfigError: there is no adapter. ContractError: a file is damaged or belongs to the other expert, or the two
            were trained with different settings.
    """
    pair = files(path)
    if not pair:
        metadata = weights.read_metadata(path)
        return {metadata.expert: (weights.adapter_file(path), metadata)}
    found: dict[Expert | None, Any] = {name: (file, weights.read_metadata(file)) for name, file in pair.items()}
    for name, (file, metadata) in found.items():
        if metadata.expert != name:
            raise ContractError(f"{file} is the adapter of the expert {metadata.expert}, not of {name}")
    all_metadata = [metadata for _, metadata in found.values()]
    first, last = all_metadata[0], all_metadata[-1]
    for key in _ALIKE:
        if getattr(first, key) != getattr(last, key):
            raise ContractError(
                f"{path}: the adapters of the two experts were trained with different {key}: "
                f"{getattr(first, key)} and {getattr(last, key)}"
            )
    return found


def common(adapters: Mapping[Expert | None, tuple[Path, weights.AdapterMetadata]]) -> weights.AdapterMetadata:
    """Return the metadata of the first adapter of `read`, which represents all of them."""
    return next(metadata for _, metadata in adapters.values())


def check_fit(adapters: Mapping[Expert | None, Any], base: str, at: float | None) -> None:
    """Raise ConfigError if the adapters of `read` do not match a base with the boundary `at` (None: one transformer).

    An expert without an adapter runs as the plain base, with a warning.
    """
    if (at is None) != (None in adapters):
        has, wants = ("one transformer", "two experts") if at is None else ("two experts", "a base of one transformer")
        raise ConfigError("base", base, f"has {has}, but the adapter was trained on {wants}")
    for name in set(EXPERTS) - set(adapters) if at is not None else ():
        log.warning("there is no adapter for the expert %s: it runs as the base alone", name)


class Experts(nn.Module):
    """Two models used as one: `high` at timesteps at and above the boundary, `low` below it.

    Args:
        base: holds both transformers; with `base.offload`, only the active one is on the device.
        high, low: the models that wrap them.
        boundary: as the function `boundary` returns it.
    """

    def __init__(self, base: Base, high: Ex4dModel, low: Ex4dModel, boundary: float):
        super().__init__()
        self.high, self.low = high, low
        self.base, self.first_timestep = base, NUM_TIMESTEPS * boundary

    def forward(self, noisy_latents: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        """Return the velocity from the expert for `timestep` [B], equal across the batch; see Ex4dModel.forward."""
        expert: Expert = "high" if float(timestep[0]) >= self.first_timestep else "low"
        self.base.bring(backbone.TRANSFORMERS[expert])
        return (self.high if expert == "high" else self.low)(noisy_latents, timestep, *conditions)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Run the plain base, without adapters, inside the block."""
        with self.high.base_alone(), self.low.base_alone():
            yield
