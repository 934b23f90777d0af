"""Share what rank 0 of a process group has read with the other ranks, so that each file is read only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ex4d.errors import ContractError


def agreed(value: Any, device: torch.device) -> Any:
    """Return rank 0's value, any picklable object, on every rank. A collective call."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=device)
    return values[0]


def broadcast(value: Tensor) -> Tensor:
    """Overwrite a contiguous tensor with rank 0's, of the same shape and dtype, and return it. A collective call."""
    if value.numel():
        torch.distributed.broadcast(value.view(-1).view(torch.uint8), src=0)
    return value


def loaded_once(load: Callable[[], nn.Module], empty: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Load a module on rank 0, broadcast its tensors and return it on every rank. A collective call.

    Args:
        load: called on rank 0; reads the files and returns a module on `device`.
        empty: called on the other ranks, on the meta device; returns a module of the same structure, in any dtype.

    Raises:
        ContractError: `load` raised it on rank 0; every rank raises it with the same message.
    """
    module, problem = None, None
    if torch.distributed.get_rank() == 0:
        try:
            module = load()
        except ContractError as error:
            problem = str(error)
    tensors = [] if module is None else list(_tensors(module))
    facts = [(names, value.shape, value.dtype, isinstance(value, nn.Parameter)) for names, value in tensors]
    facts, problem = agreed((facts, problem), device)
    if problem is not None:
        raise ContractError(problem)
    if module is not None:
        for _, value in tensors:
            broadcast(value.detach().contiguous())
        return module
    with torch.device("meta"):
        module = empty()
    for names, shape, dtype, is_parameter in facts:
        value = broadcast(torch.empty(shape, dtype=dtype, device=device))
        shared = nn.Parameter(value, requires_grad=False) if is_parameter else value
        for name in names:  # tied weights stay one tensor
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, shared)
    return module


def _tensors(module: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Yield (all its names, tensor) of each parameter and buffer, non-persistent buffers included."""
    names: dict[int, list[str]] = {}
    values: dict[int, Tensor] = {}
    for found in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, value in found:
            names.setdefault(id(value), []).append(name)
            values[id(value)] = value
    for key, value in values.items():
        yield names[key], value
