"""Recomputation and compilation of blocks: equal numbers, only the requested recomputation, one graph for all."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_swap import NUM_BLOCKS, make_model, step
from torch.utils._python_dispatch import TorchDispatchMode

from ex4d.errors import ConfigError
from ex4d.models import adapter, attention, backbone, blocks, swap

CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """Counts self-attention's forward passes, by equal numbers of queries and keys."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.count += args[0].shape[-2] == args[1].shape[-2]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("count", "attentions"), [(None, 12), (2, 8), (0, 6)])
def test_only_the_first_blocks_recompute(count: int | None, attentions: int) -> None:
    plain, _ = make_model(0, checkpointing=False)
    model, _ = make_model(0)
    model.set_gradient_checkpointing(True, count)
    with Calls() as calls:
        found = step(model)
    assert calls.count == attentions, f"{NUM_BLOCKS} forward, {count} again"
    assert all(torch.equal(a, b) for a, b in zip(step(plain), found, strict=True))


@pytest.mark.parametrize("swapped", [0, 4])
def test_kept_attention_is_not_computed_again(swapped: int) -> None:
    plain, _ = make_model(0, checkpointing=False)
    model, _ = make_model(swapped)
    model.set_gradient_checkpointing(True, keep_attention=True)
    policy, seen = blocks._keep_self_attention, []

    def watched(context, operator, *args, **kwargs):  # type: ignore[no-untyped-def]
        decision = policy(context, operator, *args, **kwargs)
        if decision == torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE:
            seen.append(args[0].shape[-2])
        return decision

    recompute = model.transformer._gradient_checkpointing_func
    contexts = torch.utils.checkpoint.create_selective_checkpoint_contexts
    recompute._options["context_fn"] = lambda: contexts(watched)
    found = step(model)
    assert len(seen) == NUM_BLOCKS, "once a block, and text's cross-attention never"
    assert all(torch.equal(a, b) for a, b in zip(step(plain), found, strict=True))


def test_memory_decides_how_many_blocks_recompute() -> None:
    model, _ = make_model(0)
    recompute = model.set_gradient_checkpointing(True, measure=True)
    assert recompute is not None
    assert recompute.fit(1e12) == NUM_BLOCKS, "nothing measured yet"
    step(model)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    totals = []
    for count in (NUM_BLOCKS, NUM_BLOCKS - 1):
        kept.clear()
        model.set_gradient_checkpointing(True, count)
        weights = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        generator = torch.Generator().manual_seed(2)
        inputs = [torch.randn(shape, generator=generator) for shape in ((1, 8, 2, 4, 6), (1, 512, 32), (1, 17, 32))]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(
                *(inputs[0], torch.tensor([400.0]), *inputs[1:], torch.randn(1, 12, 2, 4, 6)),
                torch.randn(1, 16, 2, 4, 6),
            )
        totals.append(sum(size for place, size in kept.items() if place not in weights))
        del out
    one = totals[1] - totals[0]
    assert recompute.block_bytes == pytest.approx(one, rel=0.1)
    assert recompute.fit(2.5 * recompute.block_bytes) == NUM_BLOCKS - 2
    assert recompute.fit(-1.0) == NUM_BLOCKS
    assert recompute.fit(1e12) == 0
    with pytest.raises(ConfigError, match="checkpoint_blocks=7"):
        model.set_gradient_checkpointing(True, 7)


def test_a_gpus_free_memory_is_what_the_peak_and_later_state_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """With doubles of torch.cuda's functions: 80 GB, of which 30 are free and 40 reserved; 38 were used at the peak."""
    model, _ = make_model(0)
    recompute = model.set_gradient_checkpointing(True, measure=True)
    assert recompute is not None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 38e9)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    room = 30e9 + 40e9 - 38e9 - blocks.MEMORY_MARGIN * 80e9
    recompute.block_bytes = round(room / 2.5)
    recompute.fit_memory(CPU)
    assert recompute.count == NUM_BLOCKS - 2
    recompute.fit_memory(CPU, state_bytes=round(room / 2))
    assert recompute.count == NUM_BLOCKS - 1


def test_measuring_a_block_draws_no_random_numbers() -> None:
    """The first step of a run, or after a resume, measures: its dropout must be that of any other start."""
    outputs = []
    for measure in (False, True):
        transformer = tiny.new_transformer(8, num_layers=2, num_attention_heads=2, ffn_dim=64)
        model = adapter.build_model(transformer, backbone.ModelConfig(lora_rank=4, adapter_hidden=16, lora_dropout=0.5))
        with torch.no_grad():
            for parameter in model.trainable_parameters().values():
                parameter.fill_(0.05)
        model.set_gradient_checkpointing(True, measure=measure)
        torch.manual_seed(0)
        outputs.append(step(model.train()))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize(("swapped", "keep"), [(0, False), (2, True)])
def test_compiled_blocks_are_one_graph(swapped: int, keep: bool) -> None:
    """Without recompiles, at two steps; a swapped block's weights are inputs of the graph like any other's."""
    torch._dynamo.reset()

    def make() -> adapter.Ex4dModel:
        transformer = tiny.new_transformer(8, num_layers=4, num_attention_heads=2, ffn_dim=64)
        model = adapter.build_model(transformer, backbone.ModelConfig(lora_rank=4, adapter_hidden=16))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.trainable_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.set_gradient_checkpointing(True, keep_attention=keep)
        return model

    model = make()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    blocks.compile_blocks(model.transformer, backend)
    swap.swap_blocks(model.transformer, swapped, CPU, alike=True)
    plain = step(make())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(plain, step(model), strict=True))
    assert len(graphs) == 1


def test_a_float32_residual_lowers_the_error_of_a_bfloat16_base() -> None:
    def output(dtype: str, residual_fp32: bool) -> torch.Tensor:
        base = backbone.load_base("tiny", dtype=dtype, components=("transformer",))
        config = backbone.ModelConfig(lora_rank=2, adapter_hidden=8, residual_fp32=residual_fp32)
        model, generator = adapter.build_model(base.transformer, config), torch.Generator().manual_seed(3)
        z, size = base.shape["out_channels"], (3, 8, 8)
        shapes = [(1, 512, base.shape["text_dim"]), (1, 17, base.shape["image_dim"])]
        shapes += [(1, base.shape["in_channels"] - z, *size), (1, 2 * z, *size)]
        noisy = torch.randn(1, z, *size, generator=generator)
        with torch.no_grad():
            return model(noisy, torch.tensor([500.0]), *(torch.randn(shape, generator=generator) for shape in shapes))

    exact = output("float32", False)
    assert torch.equal(output("float32", True), exact)
    plain, kept = ((output("bfloat16", on) - exact).norm() / exact.norm() for on in (False, True))
    print(float(plain), float(kept))
    assert kept < 0.75 * plain


def test_a_float32_residual_over_bfloat16_recomputes_and_swaps_to_the_same_bits() -> None:
    found = []
    for swapped in (0, 2):
        transformer = tiny.new_transformer(8, num_layers=4, num_attention_heads=2, ffn_dim=64).to(torch.bfloat16)
        config = backbone.ModelConfig(lora_rank=4, residual_fp32=True, adapter_hidden=16)
        model = adapter.build_model(transformer, config)
        swap.swap_blocks(model.transformer, swapped, CPU)
        model.set_gradient_checkpointing(swapped > 0, keep_attention=True)
        found.append(step(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_kernel_that_runs_is_named() -> None:
    assert attention.kernel_that_runs(CPU, torch.float32, 32, 64) == "flash"
    with attention.kernel("math"):
        assert attention.kernel_that_runs(CPU, torch.float32, 32, 64) == "math"
    with attention.kernel("cudnn"), pytest.raises(ConfigError, match=r"train\.attention"):
        attention.kernel_that_runs(CPU, torch.float32, 32, 64)
