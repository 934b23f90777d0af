"""Time a training step of the 14B model on one GPU: seconds, MFU, HFU and peak memory for each way to run its base.

    python benchmarks/train_14b.py --output out/train_14b              49 × 512 × 512, each row in its own process
    python benchmarks/train_14b.py --output out/tiny --size tiny       the same rows of the small model, on a CPU too
    python benchmarks/train_14b.py --output out/swap --only nf4+swap   one row

Weights are random and created on the device, one parameter at a time, and quantised block by block, so that no host
needs 33 GB; latents, text and image features are random too, since no time depends on them. A step is forward, backward
with activation checkpointing, clipping and AdamW. It needs torch, diffusers and peft, but no DeepSpeed and no download.
Each row is written to OUTPUT/rows.jsonl as soon as it is measured; OUTPUT/train_14b.{json,md} come last, with the
estimate of `train.estimate` for each row and the targets on an H200: HFU ≥ 45 %, ≤ 48 GB, ≤ 24 GB quantised with swap.
Rows that the estimate puts above the GPU's memory are skipped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn

from ex4d.models import adapter, backbone, blocks, families, swap
from ex4d.models.encoders import TEXT_LENGTH
from ex4d.train import estimate, flops
from ex4d.train.config import BatchPlan, TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
import rows as gpu_rows
from profiles import profile

TARGET_HFU, TARGET_GB, TARGET_SWAP_GB = 0.45, 48, 24
FAMILY = "wan2.1-i2v-14b"
ROOM = 0.97  # of the GPU's memory; CUDA itself takes the rest


@dataclass(frozen=True)
class Setting:
    """How a row runs: quantisation of the base, share of swapped blocks, compilation, share of recomputed blocks, with
    or without the outputs of self-attention, and products of the frozen layers in bfloat16 or, by torchao, in fp8.

    A row that takes longer than `limit_s` is killed.
    """

    quantize: str | None = None
    swapped: float = 0.0
    compile: bool = False
    recomputed: float = 1.0
    keep_attention: bool = False
    fp8_products: bool = False
    limit_s: float = 45.0


# Most valuable first, for a run that is cut short. The limits up to bf16+swap fit in one run together; later rows use
# the time that is left.
ROWS = {
    "bf16": Setting(limit_s=60.0),
    "bf16+compile": Setting(compile=True, limit_s=90.0),
    "bf16+compile, attention kept": Setting(compile=True, keep_attention=True, limit_s=75.0),
    "bf16+compile, 30 of 40 recomputed": Setting(compile=True, recomputed=0.75, limit_s=75.0),
    "fp8": Setting("fp8"),
    "nf4": Setting("nf4"),
    "nf4+swap": Setting("nf4", swapped=0.5),
    "bf16+swap": Setting(swapped=1.0),
    "bf16+compile, fp8 products": Setting(compile=True, fp8_products=True, limit_s=90.0),
    "int8": Setting("int8"),
    "fp8+compile": Setting("fp8", compile=True, limit_s=90.0),
    "nf4+compile": Setting("nf4", compile=True, limit_s=90.0),
}
# Rows of single operations, with their limits: the ceiling, and attention by each of its kernels.
KERNELS = {"product": 30.0, "attention": 40.0}


@dataclass(frozen=True)
class Size:
    """A transformer's configuration and the latents (f, h, w) of one sample."""

    name: str
    shape: Mapping[str, Any]
    latents: tuple[int, int, int]
    adapter_hidden: int


def size_of(name: str) -> Size:
    """Return the published size, or one whose step takes a CPU about a second."""
    if name == "14b":
        return Size(name, families.FAMILIES[FAMILY].transformer, flops.latent_size((49, 512, 512)), 1024)
    return Size(name, backbone.transformer_config("tiny"), (3, 12, 12), 128)


def fill(module: nn.Module, device: torch.device, keep_float32: tuple[str, ...], generator: torch.Generator) -> None:
    """Replace a module's meta parameters by random values on the device, bfloat16 but for those in `keep_float32`."""
    for path, owner in module.named_modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            whole = f"{path}.{name}"
            dtype = torch.float32 if any(kept in whole for kept in keep_float32) else torch.bfloat16
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                values.normal_(0.0, 0.02, generator=generator)
            else:
                values.fill_(1.0 if "norm" in whole and name == "weight" else 0.0)
            owner._parameters[name] = nn.Parameter(values, requires_grad=False)


def use_fp8_products(block: nn.Module, device: torch.device) -> None:
    """Let the linear layers of a block multiply in fp8 with a scale per tensor; on a CPU, only round to fp8."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(block, config=replace(recipe, emulate=device.type == "cpu"))


def random_model(size: Size, row: Setting, device: torch.device) -> tuple[adapter.Ex4dModel, int]:
    """Return (the model of a row with random weights, number of its swapped blocks)."""
    transformer = backbone.meta_transformer(size.shape)
    generator = torch.Generator(device).manual_seed(0)
    kept = tuple(transformer._keep_in_fp32_modules or ())
    for block in transformer.blocks:
        fill(block, device, kept, generator)
        if row.quantize:
            tiny.quantize_linears(block, row.quantize, device)
        if row.fp8_products:
            use_fp8_products(block, device)
    fill(transformer, device, kept, generator)
    # The position tables are buffers, which were created on the meta device as well.
    shape = transformer.config
    transformer.rope = type(transformer.rope)(shape.attention_head_dim, shape.patch_size, shape.rope_max_seq_len)
    transformer.to(device)
    model = adapter.build_model(transformer, backbone.ModelConfig(adapter_hidden=size.adapter_hidden))
    count = round(row.swapped * len(transformer.blocks))
    if row.compile:
        blocks.compile_blocks(transformer, "inductor" if device.type == "cuda" else "aot_eager")
    swap.swap_blocks(transformer, count, device, alike=row.compile)
    model.set_gradient_checkpointing(True, round(row.recomputed * len(transformer.blocks)), row.keep_attention)
    return model, count


def inputs_of(size: Size, device: torch.device) -> tuple[Tensor | None, ...]:
    """Return the arguments of Ex4dModel.forward for one sample."""
    shape, z = size.shape, size.shape["out_channels"]
    generator = torch.Generator(device).manual_seed(1)

    def draw(*of: int) -> Tensor:
        return torch.randn(of, device=device, generator=generator)

    image = shape["image_dim"]
    first = shape["in_channels"] - z
    return (
        draw(1, z, *size.latents),
        torch.full((1,), 700.0, device=device),
        draw(1, TEXT_LENGTH, shape["text_dim"]),
        draw(1, flops.CLIP_TOKENS, image) if image else None,
        draw(1, first, *size.latents) if first else None,
        draw(1, 2 * z, *size.latents),
    )


def time_steps(model: adapter.Ex4dModel, size: Size, device: torch.device, warm_up: int, steps: int) -> dict[str, Any]:
    """Return the seconds of each step after the warm-up, their peak memory, and the profile of one more step."""
    trainables = list(model.trainable_parameters().values())
    optimizer = torch.optim.AdamW(trainables, lr=3e-5, fused=device.type == "cuda")
    inputs, seconds = inputs_of(size, device), []
    target = torch.randn_like(inputs[0])  # type: ignore[arg-type]

    def step() -> None:
        loss = (model(*inputs) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trainables, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):  # waits for the GPU
            sys.exit(f"the loss is {float(loss)}")

    for number in range(warm_up + steps):
        if number == warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    found: dict[str, Any] = {"seconds": seconds, "seconds_median": statistics.median(seconds)}
    if device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        found["reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return found | profile(step, device)


def measure(name: str, size_name: str, device: torch.device, warm_up: int, steps: int) -> dict[str, Any]:
    """Return the figures of one row."""
    size, row = size_of(size_name), ROWS[name]
    model, swapped = random_model(size, row, device)
    held = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    found: dict[str, Any] = {**asdict(row), "blocks_swapped": swapped, "weights_gb": held / 1e9}
    found |= time_steps(model, size, device, warm_up, steps)
    peak = flops.peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        cost = flops.cost(size.shape, size.latents, backbone.ModelConfig(adapter_hidden=size.adapter_hidden))
        again = (row.recomputed, row.keep_attention)
        found["mfu"], found["hfu"] = flops.utilisation(cost, 1 / found["seconds_median"], peak, *again)
    return found | expected(size, row)


@cache
def counted_once(size_name: str) -> dict[str, int]:
    """Return the numbers of parameters, which do not depend on how they are stored."""
    size = size_of(size_name)
    return estimate.count_parameters(size.shape, backbone.ModelConfig(adapter_hidden=size.adapter_hidden))


def expected(size: Size, row: Setting) -> dict[str, Any]:
    """Return the estimate of `train.estimate` for a row, and the seconds of a step on an H200 at the target HFU."""
    model = backbone.ModelConfig(adapter_hidden=size.adapter_hidden, quantize=row.quantize)  # type: ignore[arg-type]
    swapped = round(row.swapped * size.shape["num_layers"])
    recomputed = round(row.recomputed * size.shape["num_layers"]) if row.recomputed < 1 else None
    train = TrainConfig(
        activation_checkpointing=True,
        zero_stage=0,
        block_swap=swapped,
        checkpoint_blocks=recomputed,
        checkpoint_keep_attention=row.keep_attention,
    )
    parts = estimate.memory(size.shape, counted_once(size.name), size.latents, model, train, BatchPlan(1, 1, 1, 1))
    cost = flops.cost(size.shape, size.latents, model)
    at_target = flops.seconds_per_step(cost, 1, "H200", row.recomputed, row.keep_attention, TARGET_HFU)
    return {"estimated_gb": sum(parts.values()) / 1e9, "h200_seconds_at_target": at_target}


def gpu() -> tuple[str, float] | None:
    """Return (name, bytes of memory) of the GPU, or None, without a CUDA context, which would take memory."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    name, mebibytes = done.stdout.splitlines()[0].rsplit(",", 1)
    return name.strip(), float(mebibytes) * 2**20


def plan(arguments: argparse.Namespace, memory: float | None) -> list[gpu_rows.Row]:
    """Return the rows to run; those that cannot fit the GPU's `memory`, in bytes, are marked to be skipped."""
    size, planned = size_of(arguments.size), []
    for name in arguments.only:
        command = [sys.executable, __file__, "--row", name, "--size", arguments.size, "--device", arguments.device]
        command += ["--steps", str(arguments.steps), "--warm-up", str(arguments.warm_up)]
        limit_s, skip = KERNELS.get(name, 0.0), None
        if name in ROWS:
            needed = expected(size, ROWS[name])["estimated_gb"]
            limit_s = ROWS[name].limit_s
            if memory and needed * 1e9 > ROOM * memory:
                skip = f"skipped: {needed:.1f} GB by estimate, the GPU has {memory / 1e9:.1f}"
        patience = 10 if arguments.device == "cpu" else 1  # a rehearsal shares its cores with others
        planned.append(gpu_rows.Row(name, command, patience * limit_s, skip))
    return planned


COLUMNS = {
    "blocks swapped": "{blocks_swapped}",
    "s/step": "{seconds_median:.2f}",
    "MFU": "{mfu:.1%}",
    "HFU": "{hfu:.1%}",
    "peak GB": "{peak_gb:.1f}",
    "estimated GB": "{estimated_gb:.3g}",
    "weights on the device, GB": "{weights_gb:.3g}",
    "attention": "{share_attention:.0%}",
    "products": "{share_products:.0%}",
}
KERNEL_COLUMNS = {"TFLOP/s": "{tflops:.0f}", "ms": "{ms:.2f}", "kernel": "{kernel}"}


def markdown(facts: Mapping[str, Any]) -> str:
    """Return the results as a page."""
    steps = [row for row in facts["rows"] if row["row"] in ROWS]
    kernels = [row for row in facts["rows"] if row["row"] not in ROWS]
    used = sorted({row["attention_kernel"] for row in steps if row.get("attention_kernel")})
    lines = [
        f"# A training step, {facts['size']}",
        "",
        f"{facts['date']}, {facts['hardware']}; torch {facts['torch']}. Micro batch 1, latents "
        f"{' × '.join(map(str, facts['latents']))}, {facts['tokens']} tokens, LoRA 16, activation checkpointing, "
        f"AdamW; median of {facts['steps']} steps. Shares are of the time on the device, by the profiler.",
        "",
        *gpu_rows.table(steps, COLUMNS),
        "",
        *([f"Attention ran as: {', '.join(f'`{name}`' for name in used)}.", ""] if used else []),
        *([*gpu_rows.table(kernels, KERNEL_COLUMNS), ""] if kernels else []),
        *facts["expected"],
    ]
    return "\n".join(lines) + "\n"


def expectations() -> list[str]:
    """Return the expected results of the published size on an H200, as lines of a table."""
    size, lines = size_of("14b"), []
    lines += [
        f"What 14B at 49 × 512 × 512 should do on one H200, by `train.estimate` and at {TARGET_HFU:.0%} HFU "
        f"(targets: ≤ {TARGET_GB} GB unsharded, ≤ {TARGET_SWAP_GB} GB quantised with swap):",
        "",
        "| base | blocks swapped | estimated GB | within the target | s/step at the target |",
        "|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        swapped = round(row.swapped * size.shape["num_layers"])
        said = expected(size, row)
        limit = TARGET_SWAP_GB if row.quantize and swapped else TARGET_GB
        fills = row.keep_attention or row.recomputed < 1  # such rows may use all free memory
        within = "–" if fills else "yes" if said["estimated_gb"] <= limit else "no"
        lines.append(
            f"| {name} | {swapped} | {said['estimated_gb']:.1f} | {within} | {said['h200_seconds_at_target']:.2f} |"
        )
    return lines


def measure_row(arguments: argparse.Namespace) -> None:
    """Measure one row; runs in the row's own process."""
    import profiles

    device, name = torch.device(arguments.device), arguments.row
    if name == "product":
        gpu_rows.record(name, **profiles.product(device, 8192 if arguments.size == "14b" else 256))
    elif name == "attention":
        shape = size_of(arguments.size)
        tokens = flops.cost(shape.shape, shape.latents, backbone.ModelConfig()).tokens
        sizes = (shape.shape["num_attention_heads"], tokens, shape.shape["attention_head_dim"])
        for kernel, figures in profiles.attention(device, *sizes).items():
            gpu_rows.record(f"attention {kernel}", **figures)
    else:
        gpu_rows.record(name, **measure(name, arguments.size, device, arguments.warm_up, arguments.steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = gpu()
    parser.add_argument("--output", type=Path, default=Path("out/train_14b"))
    parser.add_argument("--size", choices=("14b", "tiny"), default="14b")
    parser.add_argument("--device", default="cuda" if found else "cpu")
    parser.add_argument("--hardware", default=found[0] if found else f"{os.cpu_count()} CPU cores", help="for the page")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=(*KERNELS, *ROWS), default=[*KERNELS, *ROWS], metavar="ROW")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all rows")
    parser.add_argument("--row", choices=(*KERNELS, *ROWS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        measure_row(arguments)
        return
    if arguments.size == "14b" and arguments.device == "cpu":
        print("\n".join(expectations()))
        sys.exit("no GPU is here: --size tiny runs the same rows on a CPU")
    start = time.monotonic()
    planned = plan(arguments, found[1] if found else None)
    budget_s = arguments.budget - (time.monotonic() - start)
    size, measured = size_of(arguments.size), gpu_rows.run_rows(planned, arguments.output, budget_s)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": arguments.hardware,
        "torch": torch.__version__,
        "size": arguments.size,
        "latents": size.latents,
        "tokens": flops.cost(size.shape, size.latents, backbone.ModelConfig()).tokens,
        "steps": arguments.steps,
        "rows": measured,
        "expected": expectations(),
    }
    stem = "train_14b" if arguments.size == "14b" else "train_14b_tiny"
    (arguments.output / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (arguments.output / f"{stem}.md").write_text(markdown(facts), encoding="utf-8")
    print(markdown(facts))


if __name__ == "__main__":
    main()
