"""Decide which base an adapter may load, and whether it records the weights of that base.

An adapter file is not trusted. It may only choose the tiny base, published models and folders that this user owns.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ex4d.errors import ConfigError
from ex4d.models import families
from ex4d.models.backbone import TINY
from ex4d.models.weights import AdapterMetadata, adapter_file, is_released

log = logging.getLogger(__name__)

UNVERIFIABLE = "does not say which base weights it was trained on"


def base_of(
    path: str | Path, metadata: AdapterMetadata, base: str | None = None, key: str = "base"
) -> tuple[str, str | None]:
    """Return (base, revision) to load for an adapter: `base` if it is set, else the adapter's own.

    Args:
        path: of the adapter; metadata: from its header.
        key: the setting that `base` comes from, for messages.

    Raises:
        ConfigError: the adapter's own base may not be loaded, so `base` must be set.
    """
    if (metadata.base_revision or "").startswith("refs/"):  # e.g. a pull request, which anybody can open
        raise ConfigError(
            key, base, f"must be of another adapter: {path} names its revision {metadata.base_revision!r}"
        )
    if base is not None:
        return base, metadata.base_revision if base == metadata.base else None
    folder = Path(metadata.base)
    is_own_folder = metadata.base != "" and folder.is_dir() and folder.stat().st_uid == os.getuid()
    if not (metadata.base == TINY or families.family_of_hub_id(metadata.base) or is_own_folder):
        allowed = f"must be set: {path} names {metadata.base!r}, neither a published model nor a folder of yours"
        raise ConfigError(key, None, allowed)
    if not is_verifiable(path, metadata):
        raise ConfigError(key, None, f"must be set: {path} {UNVERIFIABLE}")
    return metadata.base, metadata.base_revision


def is_verifiable(path: str | Path, metadata: AdapterMetadata) -> bool:
    """Return True if an adapter records which base weights it was trained on, as all adapters of this project do.

    The released ex4d.ckpt cannot record them and is accepted with a warning.
    """
    if metadata.base_fingerprint is None and is_released(adapter_file(path)):
        log.warning("%s %s; whether the base matches is not verified", path, UNVERIFIABLE)
        return True
    return metadata.base_fingerprint is not None
