"""Swap blocks: keep the frozen weights of some transformer blocks in host memory and copy them to the device on use.

A swapped block's frozen tensors lie in one buffer of (pinned) host memory. Its forward pass first copies them to the
device, and drops the copy when it returns. Under activation checkpointing the backward pass runs the block's forward
again, which fetches again; autograd holds this copy until the block's backward pass ends. A copy lives as long as
something references it, so results do not depend on the order of hooks. While a block runs, the next swapped one in
the current direction is copied on a separate stream.

diffusers' `apply_group_offloading` (0.42.1) is not used: it swaps LoRA along with the base, so that the optimizer's
updates are lost when a block is fetched again (tried, with figures, in docs/decisions/models.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ex4d.errors import ConfigError

_ALIGN = 256  # bytes, for a GPU's wide loads
# Bytes per allocation of pinned memory, which PyTorch rounds up to a power of two. Blocks share one: the 40 blocks of
# the 14B model in bfloat16 take 34.4 GB, and 42.9 GB one by one. It is not larger, because the original weights of its
# blocks are still in memory while it fills.
ARENA = 2**32


class HostBlock:
    """The frozen tensors of one block, moved out of its modules into one buffer of host memory.

    The modules' parameter and buffer entries become None, so that code that walks over parameters (DeepSpeed,
    `Module.to`) skips them. While the block runs, its tensors are plain attributes, which Python looks up first.

    Args:
        host: uint8 buffer for the tensors; see `host_buffers`.
    """

    def __init__(self, block: nn.Module, host: Tensor):
        self._places: list[tuple[nn.Module, str, int, Tensor]] = []
        tensors = list(_frozen(block))
        size = 0
        for module, _, name, tensor in tensors:
            self._places.append((module, name, size, torch.empty_like(tensor, device="meta")))
            size += _aligned(tensor.nbytes)
        self.host = host
        for (_, table, name, tensor), view in zip(tensors, self.views(self.host), strict=True):
            view.copy_(tensor)
            table[name] = None

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the block's tensors, in order, as views into `buffer`, which is laid out as `host`."""
        return [
            buffer[start : start + like.nbytes].view(like.dtype).view(like.shape) for *_, start, like in self._places
        ]

    @contextmanager
    def lent(self, buffer: Tensor) -> Iterator[None]:
        """Install the tensors of `buffer` in the modules inside the context, and remove them afterwards."""
        for (module, name, _, _), tensor in zip(self._places, self.views(buffer), strict=True):
            vars(module)[name] = tensor
        try:
            yield
        finally:
            for module, name, *_ in self._places:
                del vars(module)[name]


def _frozen(block: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any], str, Tensor]]:
    """Yield (module, its parameters or buffers, name, tensor) of every frozen tensor, in module order."""
    for module in block.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and not tensor.requires_grad:
                    yield module, table, name, tensor


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGN) * _ALIGN


def host_buffers(blocks: Sequence[nn.Module], pin: bool, arena: int = ARENA) -> Iterator[Tensor]:
    """Yield a uint8 buffer of host memory for each block's frozen tensors in turn.

    Blocks share allocations of at most `arena` bytes (more for a block that is larger). Each is made when its first
    block is due: by then the earlier blocks have freed their original weights.
    """
    sizes = [sum(_aligned(tensor.nbytes) for *_, tensor in _frozen(block)) for block in blocks]
    while sizes:
        count = max(1, sum(total <= arena for total in accumulate(sizes)))
        yield from torch.empty(sum(sizes[:count]), dtype=torch.uint8, pin_memory=pin).split(sizes[:count])
        del sizes[:count]


class BlockSwap:
    """The swapped blocks of one transformer, and the copies in flight.

    Args:
        blocks: all blocks of the transformer; those of `indices` are changed in place.
        device: where they run. On a CPU real copies are made too, so that tests need no GPU.
    """

    def __init__(self, blocks: nn.ModuleList, indices: list[int], device: torch.device):
        self.device, self.indices = device, indices
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: dict[int, tuple[Tensor, Any]] = {}
        self._started: Any = None  # event that follows the queued work of all earlier blocks
        buffers = host_buffers([blocks[index] for index in indices], pin=self._stream is not None)
        self._host = {index: HostBlock(blocks[index], next(buffers)) for index in indices}
        for index in indices:
            blocks[index].forward = self._fetching(index, blocks[index].forward)

    def _fetching(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def fetch_and_forward(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():  # selective recomputation must not see these copies
                buffer = self._take(index)
                self._wait_for_the_last_but_one()
                self._send_for(self._following(index), instead=(index, buffer))
            with self._host[index].lent(buffer):
                return forward(*args, **kwargs)

        return fetch_and_forward

    def _following(self, index: int) -> int:
        """Return which swapped block runs next; the last one in a direction is the first on the way back."""
        # Inside a backward pass autograd has a current graph task; blocks are recomputed from the last to the first.
        backwards = torch._C._current_graph_task_id() != -1
        place = self.indices.index(index) + (-1 if backwards else 1)
        return self.indices[min(max(place, 0), len(self.indices) - 1)]

    def _wait_for_the_last_but_one(self) -> None:
        """Wait on the host until the device has finished the block before the previous one.

        Otherwise the host would queue many blocks ahead, each with its own copy. The previous block still runs
        meanwhile, so the device does not idle.
        """
        if self._stream is not None:
            before, self._started = self._started, torch.cuda.current_stream(self.device).record_event()
            if before is not None:
                before.synchronize()

    def _copy(self, index: int) -> tuple[Tensor, Any]:
        """Return (copy of a block's buffer on the device, event that marks its completion; None on a CPU)."""
        host = self._host[index].host
        if self._stream is None:
            return host.clone(), None
        with torch.cuda.stream(self._stream):
            buffer = host.to(self.device, non_blocking=True)
            return buffer, self._stream.record_event()

    def _send_for(self, index: int, instead: tuple[int, Tensor]) -> None:
        """Start the copy of a block, or reuse one that exists; drop other pending copies."""
        here, buffer = instead
        self._under_way = {i: copy for i, copy in self._under_way.items() if i == index}
        if index == here:
            self._under_way[index] = (buffer, None)
        elif index not in self._under_way:
            self._under_way[index] = self._copy(index)

    def _take(self, index: int) -> Tensor:
        """Return the copy of a block; the current stream waits until it is complete."""
        buffer, event = self._under_way.pop(index) if index in self._under_way else self._copy(index)
        if event is not None:
            working = torch.cuda.current_stream(self.device)
            working.wait_event(event)
            buffer.record_stream(working)  # it was allocated on the copy stream
        return buffer


def swap_blocks(transformer: nn.Module, count: int, device: torch.device, alike: bool = False) -> BlockSwap | None:
    """Keep the frozen weights of `count` blocks, evenly spread, in host memory; return None if count is 0.

    Call it after LoRA was added, then move the model to `device`; swapped weights stay where they are. Training then
    needs activation checkpointing, without which autograd would hold every copy until the backward pass.

    Args:
        alike: also turn the frozen weights of the other blocks into plain attributes, on `device`, so that compiled
            blocks (blocks.compile_blocks) share one graph.

    Raises:
        ConfigError: count is not between 0 and the number of blocks.
    """
    blocks: Any = transformer.get_submodule("blocks")
    if not 0 <= count <= len(blocks):
        raise ConfigError("block_swap", count, f"must be 0 to {len(blocks)}, the number of blocks")
    if count == 0:
        return None
    indices = [(2 * place + 1) * len(blocks) // (2 * count) for place in range(count)]
    for index in set(range(len(blocks))) - set(indices) if alike else ():
        for module, table, name, tensor in list(_frozen(blocks[index])):
            table[name] = None
            vars(module)[name] = tensor.detach().to(device)
    return BlockSwap(blocks, indices, device)
