"""Block swap on the CPU, where copies are real too: bit-identical results, and few copies alive at a time."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ex4d.errors import ConfigError
from ex4d.models import adapter, backbone, swap

CPU = torch.device("cpu")
NUM_BLOCKS = 6


def make_model(count: int, style: str | None = None, checkpointing: bool = True) -> tuple[adapter.Ex4dModel, Any]:
    transformer = tiny.new_transformer(8, num_layers=NUM_BLOCKS, num_attention_heads=2, ffn_dim=64)
    if style is not None:
        tiny.quantize_linears(transformer.blocks, style)
    model = adapter.build_model(transformer, backbone.ModelConfig(lora_rank=4, adapter_hidden=16))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.set_gradient_checkpointing(checkpointing)
    return model, swap.swap_blocks(model.transformer, count, CPU)


def step(model: adapter.Ex4dModel) -> list[Tensor]:
    """Return the output and all gradients of one step."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    model.zero_grad()
    out = model(
        *(draw(1, 8, 2, 4, 6), torch.tensor([400.0]), draw(1, 512, 32), draw(1, 17, 32)),
        *(draw(1, 12, 2, 4, 6), draw(1, 16, 2, 4, 6)),
    )
    out.square().mean().backward()
    gradients = [value.grad for value in model.trainable_parameters().values()]
    assert all(gradient is not None for gradient in gradients)
    return [out.detach(), *(gradient.clone() for gradient in gradients)]


class Copies:
    """The device copies that are alive, by their storages, whoever references them."""

    def __init__(self, swapped: swap.BlockSwap):
        self._refs: list[StorageWeakRef] = []
        self.made, self.most = 0, 0
        copy = swapped._copy

        def counted(index: int) -> tuple[Tensor, Any]:
            buffer, event = copy(index)
            self._refs.append(StorageWeakRef(buffer.untyped_storage()))
            self.made, self.most = self.made + 1, max(self.most, self.alive)
            return buffer, event

        swapped._copy = counted  # type: ignore[method-assign]

    @property
    def alive(self) -> int:
        self._refs = [ref for ref in self._refs if not ref.expired()]
        return len(self._refs)


@pytest.mark.parametrize("style", [None, "nf4"])
@pytest.mark.parametrize("count", [1, 3, NUM_BLOCKS])
def test_swapped_blocks_change_no_bit(count: int, style: str | None) -> None:
    plain, _ = make_model(0, style)
    swapped, _ = make_model(count, style)
    for _ in range(2):  # the second step starts with the copy that the first left in flight
        assert all(torch.equal(a, b) for a, b in zip(step(plain), step(swapped), strict=True))
    with torch.no_grad():
        swapped.transformer.blocks[NUM_BLOCKS // 2].attn1.to_q.lora_B["default"].weight.zero_()
    assert not torch.equal(step(plain)[0], step(swapped)[0])


def test_two_copies_at_a_time_are_enough_with_checkpointing() -> None:
    model, swapped = make_model(NUM_BLOCKS)
    copies = Copies(swapped)
    for _ in range(2):
        step(model)
        assert copies.alive == 1  # the first block, for the next step
    assert copies.most == 2
    # Each block is fetched twice per step, except the last, where the direction turns, and the first, which is kept.
    assert copies.made == 2 * (2 * NUM_BLOCKS - 2) + 1


def test_the_count_has_teeth() -> None:
    """Without checkpointing autograd holds every copy, which the count must show."""
    model, swapped = make_model(NUM_BLOCKS, checkpointing=False)
    copies = Copies(swapped)
    step(model)
    assert copies.most == NUM_BLOCKS


@pytest.mark.parametrize("style", [None, "int8"])
def test_what_is_swapped_is_off_the_device_and_out_of_sight(style: str | None) -> None:
    def held(model: adapter.Ex4dModel) -> int:
        return sum(value.nbytes for value in (*model.parameters(), *model.buffers()))

    plain, _ = make_model(0, style)
    swapped, swap_of = make_model(4, style)
    block = plain.transformer.blocks[1]
    frozen = sum(v.nbytes for v in (*block.parameters(), *block.buffers()) if not v.requires_grad)
    assert held(plain) - held(swapped) == 4 * frozen
    host_bytes = sum(host.host.nbytes for host in swap_of._host.values())
    assert 4 * frozen <= host_bytes < 4 * frozen * 1.05  # aligned
    before = plain.trainable_parameters(), swapped.trainable_parameters()
    assert list(before[0]) == list(before[1])
    # Code that walks over the parameters, such as `Module.to`, does not reach them.
    swapped.to(torch.float64)
    assert sum(host.host.nbytes for host in swap_of._host.values()) == host_bytes
    assert next(iter(swap_of._host.values())).views(next(iter(swap_of._host.values())).host)[0].dtype != torch.float64


def test_swapped_blocks_are_spread_evenly() -> None:
    assert swap.swap_blocks(tiny.new_transformer(8, num_layers=6), 2, CPU).indices == [1, 4]
    assert swap.swap_blocks(tiny.new_transformer(8, num_layers=5), 5, CPU).indices == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="block_swap=7"):
        swap.swap_blocks(tiny.new_transformer(8, num_layers=6), 7, CPU)


def test_blocks_share_allocations_that_are_made_when_they_are_due() -> None:
    blocks = tiny.new_transformer(8, num_layers=5, num_attention_heads=2, ffn_dim=64).requires_grad_(False).blocks
    one = sum(-(-value.nbytes // 256) * 256 for value in (*blocks[0].parameters(), *blocks[0].buffers()))
    buffers = swap.host_buffers(list(blocks), pin=False, arena=2 * one + 1)
    found = list(buffers)
    assert [buffer.nbytes for buffer in found] == [one] * 5
    storages = [buffer.untyped_storage() for buffer in found]
    assert [storage.nbytes() for storage in storages] == [2 * one] * 4 + [one]
    assert len({storage.data_ptr() for storage in storages}) == 3
    # A block that is larger than the arena gets its own allocation.
    assert [len(buffer) for buffer in swap.host_buffers(list(blocks), pin=False, arena=1)] == [one] * 5
    bf16 = (391_000_000 + 10_000_000) * 2  # of a 14B block
    assert 40 * bf16 < 8 * swap.ARENA < 1.08 * 40 * bf16
