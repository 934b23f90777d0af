"""Fingerprint the encoders of a base by the content of their files, without loading them; latents depend on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ex4d import config, storage
from ex4d.models.backbone import FILES, FOLDERS, resolve

ENCODERS = ("vae", "text_encoder", "image_encoder")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def of_components(
    base: str,
    revision: str | None = None,
    needed: Sequence[str] = ("transformer", "vae"),
    components: Sequence[str] = ENCODERS,
) -> dict[str, str]:
    """Return {component: 16 hex digits of its weights and settings}, leaving out components without weight files.

    Args:
        base, revision: as in `backbone.load_base`.
        needed: components to fetch if a hub id is not cached.
        components: those to fingerprint.

    Raises:
        ConfigError: the base is missing and cannot be fetched.
    """
    folder = resolve(base, revision, needed)
    digests = {}
    for component in components:
        files = sorted(file for sub in FOLDERS[component] for kind in FILES for file in (folder / sub).glob(kind))
        if any(file.suffix == ".safetensors" for file in files):
            digests[component] = config.fingerprint([(str(file.relative_to(folder)), _sha256(file)) for file in files])
    return digests


def _sha256(file: Path) -> str:
    # The hub's cache keeps large files under their sha256, so that gigabytes need not be read to know it.
    stored = file.resolve().name
    return stored if _SHA256.fullmatch(stored) else storage.sha256(file)
