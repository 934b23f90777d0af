"""Load the transformer's weights one tensor at a time, so that the host never holds a full second copy.

One rank reads for all, and weights are quantised on arrival. Files are read rather than memory-mapped: the pages of a
mapped file that were touched count as memory of the process, and every rank of a node would touch all of them.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ex4d.errors import ContractError
from ex4d.models import sharing
from ex4d.models.quantize import QuantizedLinear

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"
MAX_HEADER_BYTES = 2**27
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Location of a tensor: file, offset of its first byte, dtype and shape."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Return the tensor. Raises ContractError if the file is too short."""
        data = torch.empty(math.prod(self.shape) * self.dtype.itemsize, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            view, done = data.numpy().data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise ContractError(f"{self.path} ends within a tensor")
                done += count
        return data.view(self.dtype).view(self.shape)


def index(folder: Path) -> dict[str, Stored]:
    """Return {name: location} of the tensors in a component's folder in diffusers layout.

    Raises:
        ContractError: a file is missing or is not safetensors.
    """
    listing = folder / f"{WEIGHTS}.index.json"
    try:
        names = {WEIGHTS}
        if listing.is_file():
            names = set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values())
        tensors: dict[str, Stored] = {}
        for name in sorted(names):
            if Path(name).name != name:
                raise ContractError(f"{listing} names {name!r}, which is not a file of its folder")
            tensors |= _header(folder / name)
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContractError(f"the weights of {folder} cannot be read: {error}") from error


def _header(path: Path) -> dict[str, Stored]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is not safetensors")
        header = json.loads(file.read(length))
        size = os.fstat(file.fileno()).st_size - 8 - length
    header.pop("__metadata__", None)
    tensors = {}
    for name, facts in header.items():
        start, end = facts["data_offsets"]
        stored = Stored(path, 8 + length + start, _DTYPES[facts["dtype"]], tuple(facts["shape"]))
        if not 0 <= start <= end <= size or end - start != math.prod(stored.shape) * stored.dtype.itemsize:
            raise ValueError(f"{path.name}: {name} has an impossible offset")
        tensors[name] = stored
    return tensors


class _Source:
    """Provides tensors by name: read from their files, or received from rank 0, which reads for all."""

    def __init__(self, folder: Path, device: torch.device, shared: bool):
        self.device, self.shared = device, shared
        self.reads = not shared or torch.distributed.get_rank() == 0
        self.stored: dict[str, Stored] = {}
        problem = None
        if self.reads:
            try:
                self.stored = index(folder)
            except ContractError as error:
                problem = f"{folder} cannot be loaded: {error}"
        self.shapes = {name: at.shape for name, at in self.stored.items()}
        if shared:  # an error on rank 0 is raised on all ranks, with the same message
            self.shapes, problem = sharing.agreed((self.shapes, problem), device)
        if problem:
            raise ContractError(problem)

    def take(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor, cast to `dtype`, on `device`."""
        if not self.shared:
            return self.stored[name].read().to(dtype).to(device)
        if self.reads:
            value = self.stored[name].read().to(dtype).to(self.device).contiguous()
        else:
            value = torch.empty(self.shapes[name], dtype=dtype, device=self.device)
        return sharing.broadcast(value).to(device)


def load_transformer(
    cls: Any,
    config: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    place: torch.device,
    style: str | None = None,
    shared: bool = False,
) -> Any:
    """Load a transformer with the weights of a folder onto `place`, as `cls.from_pretrained` would.

    Args:
        cls: a model class of diffusers; its `_keep_in_fp32_modules` stay float32.
        device: where the process group communicates and weights are quantised.
        style: quantise the linear layers of the blocks in this style (quantize.STYLES), each as soon as it is loaded.
        shared: only rank 0 reads the files; every rank must call.

    Raises:
        ContractError: weights are missing, damaged, or of the wrong shape; the message names the first.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):  # position tables are computed, not stored in the files
            model = cls.from_config(dict(config))
    except (TypeError, ValueError) as error:
        raise ContractError(f"{folder} cannot be loaded as {cls.__name__}: {error}") from error
    source = _Source(folder, device, shared)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check(f"{folder} cannot be loaded as {cls.__name__}", source.shapes, expected)
    kept = set(cls._keep_in_fp32_modules or ())
    for path in [path for path, _ in model.named_modules()]:  # a list of modules would keep replaced layers alive
        module = model.get_submodule(path)
        for name in [*module._parameters]:
            whole = f"{path}.{name}" if path else name
            if whole in expected:
                own = torch.float32 if kept & set(whole.split(".")) else dtype
                value = source.take(whole, own, place)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        if style is not None and path.startswith("blocks.") and type(module) is nn.Linear:
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, QuantizedLinear(module, style, device))
    return model.to(place)


def _check(what: str, stored: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ContractError, prefixed with `what`, unless every expected tensor is stored with the expected shape."""
    wrong = [name for name, shape in expected.items() if stored.get(name) != shape]
    if wrong:
        there = stored.get(wrong[0])
        why = "is missing" if there is None else f"has the shape {[*there]}, not {[*expected[wrong[0]]]}"
        raise ContractError(f"{what}: {wrong[0]} {why} ({len(wrong)} such tensors)")
    if surplus := sorted(stored.keys() - expected.keys()):
        log.warning(
            "skipped %d tensors of the file that the model does not have; the first is %s", len(surplus), surplus[0]
        )
