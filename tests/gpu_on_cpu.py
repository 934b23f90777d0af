"""A GPU that computes nothing, for a PyTorch without CUDA: fake tensors know their device, dtype and shape alone.

What a GPU refuses is refused: operators on tensors of two devices, products of two dtypes. Some functions of PyTorch
look for the real device before they reach fake tensors; these are replaced. Numbers that leave the tensors are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
_NUMPY = {torch.uint8: np.uint8, torch.bool: np.bool_, torch.int64: np.int64}
_ATEN = torch.ops.aten
# Fake tensors of two dtypes, and in convolutions of two devices, pass these.
_PRODUCTS = {
    *(functional.linear, functional.conv2d, functional.conv3d, torch.addmm, torch.baddbmm, torch.bmm, torch.matmul),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm),
}


@contextmanager
def gpu(monkeypatch: Any) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Yield a function that puts a module on the GPU, in place; tensors made in the block may go there too."""
    monkeypatch.setattr(nn.Module, "_apply", _apply)
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: np.zeros(x.shape).tolist())
    with FakeTensorMode() as mode, _Replaced(), torch.no_grad():

        def placed(module: nn.Module) -> nn.Module:
            """Put it there; what is fake already only moves. Tensors outside parameters and buffers were made there."""

            def fake(x: torch.Tensor) -> torch.Tensor:
                return (x if isinstance(x, FakeTensor) else mode.from_tensor(x)).to(DEVICE)

            for owner in module.modules():
                vars(owner).update({name: fake(x) for name, x in vars(owner).items() if isinstance(x, torch.Tensor)})
            return _apply(module, fake)

        yield placed


@torch.no_grad()
def _apply(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """As nn.Module's own, whose exchange of a parameter's data is not possible between fake tensors of two devices."""
    for owner in module.modules():
        for name, value in owner._parameters.items():
            if value is not None:
                owner._parameters[name] = nn.Parameter(change(value), requires_grad=value.requires_grad)
        for name, value in owner._buffers.items():
            if value is not None:
                owner._buffers[name] = change(value)
    return module


class _Replaced(TorchFunctionMode):
    """Stands in for functions that ask for the real device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__getitem__:
            part, places = _part(*args)
            return part if places is None else _ATEN.index.Tensor(part, places)
        if function is torch.Tensor.__setitem__:
            part, places = _part(*args[:2])
            value = args[2] if isinstance(args[2], torch.Tensor) else torch.full_like(part, args[2])
            _ATEN.copy_(part, value) if places is None else _ATEN.index_put_(part, places, value)
            return None
        if function in _PRODUCTS and len({(x.device, x.dtype) for x in args if isinstance(x, torch.Tensor)}) > 1:
            raise RuntimeError(f"a product of {[(x.device, x.dtype) for x in args if isinstance(x, torch.Tensor)]}")
        if function is torch.Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if function is torch.Tensor.contiguous:
            return torch.clone(args[0], memory_format=torch.contiguous_format)
        if function is functional.interpolate:
            return _resized(*args, **kwargs)
        if function is torch.Tensor.numpy:
            assert args[0].device.type == "cpu", "a GPU's memory is no array"
            return np.zeros(args[0].shape, _NUMPY.get(args[0].dtype, np.float32))
        return function(*args, **(kwargs or {}))


def _part(x: torch.Tensor, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
    """Return (the view by the numbers, slices and None of an index, its tensors for each dimension of it, or None)."""
    words = index if isinstance(index, tuple) else (index,)
    rest = x.ndim - sum(word is not None and word is not Ellipsis for word in words)
    place, tensors = 0, {}
    for word in words:
        if word is Ellipsis:
            place += rest
        elif word is None:
            x, place = x.unsqueeze(place), place + 1
        elif isinstance(word, int):
            x = x.select(place, word)
        elif isinstance(word, slice):
            x, place = _ATEN.slice(x, place, word.start, word.stop, word.step or 1), place + 1
        else:
            tensors[place], place = word, place + 1
    return x, [tensors.get(number) for number in range(x.ndim)] if tensors else None


def _resized(x: torch.Tensor, size: Any = None, scale_factor: Any = None, **how: Any) -> torch.Tensor:
    sides = x.ndim - 2
    if size is None:
        factors = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * sides
        size = [int(side * factor) for side, factor in zip(x.shape[2:], factors, strict=True)]
    return x.new_empty((*x.shape[:2], *(size if isinstance(size, tuple | list) else (size,) * sides)))
