"""Start a training from the weights of an adapter: one of this project, or the released ex4d.ckpt."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ex4d.errors import ConfigError
from ex4d.models import experts, provenance, weights
from ex4d.models.adapter import Ex4dModel
from ex4d.models.backbone import Expert, ModelConfig


@dataclass(frozen=True)
class WarmStart:
    """The weights of an adapter that fits a model configuration.

    Args:
        path: folder or file of the adapter.
        state: {canonical name: float32 tensor}.
        base_fingerprint: of the base that it was trained on; None if the file does not record it.
    """

    path: str
    state: dict[str, Tensor]
    base_fingerprint: str | None

    def fill(self, model: Ex4dModel, found_base: str | None) -> None:
        """Copy the weights into the model's trainable parameters, bit for bit.

        Args:
            found_base: `encoders.base_fingerprint` of the model's base.

        Raises:
            ConfigError: the adapter was trained on another base.
            ContractError: names or shapes differ; says which.
        """
        known = self.base_fingerprint is not None and found_base is not None
        if known and self.base_fingerprint != found_base:
            allowed = f"{self.path} was trained on the base {self.base_fingerprint}, but this base is {found_base}"
            raise ConfigError("train.init_from", self.path, allowed)
        weights.load_state(model, self.state, self.path)


def read(path: str, config: ModelConfig, expert: Expert | None = None) -> WarmStart:
    """Return the weights to start from, before any base is loaded.

    Args:
        path: as in `weights.read_adapter`, or a folder of two experts' adapters.
        expert: the expert to train; None for a base with one transformer.

    Raises:
        ConfigError: there is no such file, or a setting differs from the adapter's; the message names it with the
            required value.
        ContractError: the file is damaged.
    """
    state, metadata = weights.read_adapter(experts.files(path).get(expert or "high", Path(path)))
    if metadata.expert not in (None, expert):
        raise ConfigError("train.expert", expert, f"must be {metadata.expert}, as in train.init_from={path}")
    alpha = config.lora_alpha * (math.sqrt(config.lora_rank) if config.lora_rslora else 1.0)
    pairs = {
        "lora_rank": (config.lora_rank, metadata.lora_rank),
        "lora_alpha": (alpha, metadata.lora_alpha),
        "lora_targets": (sorted(config.lora_targets), sorted(metadata.lora_targets)),
        "adapter_hidden": (config.adapter_hidden, metadata.adapter_hidden),
        "mask_range": (config.mask_range, metadata.mask_range),
        "source_video": (config.source_video, metadata.source_video),
    }
    for name, (here, there) in pairs.items():
        if here != there:
            raise ConfigError(f"model.{name}", here, f"must be {there!r}, as in train.init_from={path}")
    if not provenance.is_verifiable(path, metadata):
        remedy = "`ex4d export --style released` converts it to a file that can be used"
        raise ConfigError("train.init_from", path, f"{provenance.UNVERIFIABLE}; {remedy}")
    return WarmStart(path, state, metadata.base_fingerprint)
