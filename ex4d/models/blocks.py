"""Configure how the transformer's blocks run in training: recomputation, a float32 residual stream, compilation."""

from __future__ import annotations

import logging
import math
import types
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from ex4d.errors import ConfigError
from ex4d.models.attention import KERNELS

logger = logging.getLogger(__name__)

MEMORY_MARGIN = 0.06  # share of a GPU that `fit_memory` leaves free, for fragmentation and longer texts
_ATTENTION = [operator for _, operators in KERNELS.values() for operator in operators]


def _keep_self_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
    """Keep the outputs of attention with as many queries as keys; recompute everything else."""
    is_attention = getattr(operator, "overloadpacket", None) in _ATTENTION
    if is_attention and args[0].shape[-2] == args[1].shape[-2]:
        return checkpoint.CheckpointPolicy.MUST_SAVE
    return checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


class Recompute:
    """Runs blocks for `transformer.enable_gradient_checkpointing`: the first `count` recompute in the backward pass.

    The first rather than the last: by the time they are recomputed, the activations that the last ones kept are freed.

    Args:
        blocks: all blocks, in order.
        count: how many recompute; None: all.
        keep_attention: blocks that recompute keep the outputs of self-attention, the costliest part at many tokens.
            This works with the fused kernels; the `math` kernel is recomputed.
        measure: measure at the first forward pass how many bytes one block would keep, for `fit`.

    Raises:
        ConfigError: `count` is not between 0 and the number of blocks.
    """

    def __init__(
        self, blocks: nn.ModuleList, count: int | None = None, keep_attention: bool = False, measure: bool = False
    ):
        if count is not None and not 0 <= count <= len(blocks):
            raise ConfigError("train.checkpoint_blocks", count, f"must be 0 to {len(blocks)}, the number of blocks")
        self._index = {id(block): index for index, block in enumerate(blocks)}
        self.count = len(blocks) if count is None else count
        self.block_bytes: int | None = None
        self._measure = measure
        contexts = partial(checkpoint.create_selective_checkpoint_contexts, _keep_self_attention)
        self._options: dict[str, Any] = {"context_fn": contexts} if keep_attention else {}

    def __call__(self, block: nn.Module, *args: Any) -> Tensor:
        """Return the block's output."""
        if self._measure and self.block_bytes is None:
            self.block_bytes = kept_bytes(block, *args)
        if self._index[id(block)] >= self.count:
            return block(*args)
        return checkpoint.checkpoint(block, *args, use_reentrant=False, **self._options)

    @property
    def share(self) -> float:
        """Share of the blocks that recompute."""
        return self.count / len(self._index)

    def fit_memory(self, device: torch.device, state_bytes: int = 0) -> None:
        """Let as many blocks keep their activations as fit in GPU memory; call it after a step in which all recomputed.

        A collective call: the rank with the least free memory decides.

        Args:
            state_bytes: size of the optimizer state, which was created after the peak of the first step.
        """
        free, total = torch.cuda.mem_get_info(device)
        room = free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
        count = torch.tensor(self.fit(room - state_bytes - MEMORY_MARGIN * total), device=device)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
        self.count = int(count)
        logger.info("%d blocks recompute their activations; the others keep them", self.count)

    def fit(self, free_bytes: float) -> int:
        """Return how many blocks must recompute, given the bytes that are free while all of them do."""
        if not self.block_bytes:
            return len(self._index)
        return max(0, len(self._index) - max(0, math.floor(free_bytes / self.block_bytes)))


def kept_bytes(block: nn.Module, *args: Any) -> int:
    """Return the bytes that autograd keeps for a block's backward pass, without its inputs and weights."""
    own = {_place(value) for value in (*block.parameters(), *block.buffers(), *_tensors(args))}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in own:
            kept[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    # LoRA's dropout must draw what it would have drawn without this measurement.
    gpus = {tensor.device.index for tensor in _tensors(args) if tensor.device.type == "cuda"}
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng(devices=gpus), torch.enable_grad(), hooks:
        output = block(*args)
    del output
    return sum(kept.values())


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in _tensors(value)]
    return [values] if isinstance(values, Tensor) else []


def keep_residual_float32(transformer: Any) -> None:
    """Keep the residual stream in float32 from the patch embedding on, in place; each layer still works in its dtype.

    Rounding then affects what a block adds and not the running sum, as in the released network under autocast. It
    doubles the memory of the inputs that recomputing blocks keep; nothing changes for a float32 base.
    """
    dtype = transformer.patch_embedding.weight.dtype

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].to(dtype), *args[1:])

    transformer.patch_embedding.register_forward_hook(lambda module, args, output: output.float())
    for block in transformer.blocks:
        for layer in (block.attn1, block.attn2, block.ffn):
            layer.register_forward_pre_hook(narrow)
    transformer.proj_out.register_forward_pre_hook(narrow)


def compile_blocks(transformer: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks' forward pass once for all of them, in place; the first pass then takes a minute or so.

    Call it after LoRA was added and before `swap.swap_blocks`, which then fetches outside of the compiled graph. One
    function serves all blocks, because weights are inputs of its graph; another clip size, or running without
    gradients, compiles another graph.
    """
    blocks: Any = transformer.get_submodule("blocks")
    forward = torch.compile(type(blocks[0]).forward, fullgraph=True, dynamic=False, backend=backend)
    for block in blocks:
        block.forward = types.MethodType(forward, block)
