"""A training step of the 14B model on one GPU: seconds, MFU, HFU and peak memory, by how its frozen base is stored.

    python benchmarks/train_14b.py --hardware "H200, driver …"       49 × 512 × 512, each row in a process of its own
    python benchmarks/train_14b.py --size tiny --hardware "2 cores"  the same rows of the small model on a CPU, < 60 s
    python benchmarks/train_14b.py --only nf4+swap --hardware …      one row

Weights are random and made on the device, a parameter at a time and a block at a time into their quantised form, so
that no host needs 33 GB; latents, text and image features are random too, since no time depends on them. A step is
forward, backward with activation checkpointing, clipping and AdamW. It needs torch, diffusers and peft; no
DeepSpeed, no download. Writes benchmarks/results/train_14b.{json,md} (tiny: train_14b_tiny), with what
`train.estimate` says of each row and what an H200 should do: HFU ≥ 45 %, ≤ 48 GB, ≤ 24 GB quantised with swap.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ex4d.models import adapter, backbone, families, quantize, swap
from ex4d.models.encoders import TEXT_LENGTH
from ex4d.train import estimate, flops
from ex4d.train.config import BatchPlan, TrainConfig

RESULTS = Path(__file__).parent / "results"
TARGET_HFU, TARGET_GB, TARGET_SWAP_GB = 0.45, 48, 24
FAMILY = "wan2.1-i2v-14b"


@dataclass(frozen=True)
class Row:
    """How the base is stored: in bfloat16 or quantised, a share of its blocks swapped; blocks compiled or not."""

    quantize: str | None = None
    swapped: float = 0.0
    compile: bool = False


ROWS = {
    "bf16": Row(),
    "fp8": Row("fp8"),
    "int8": Row("int8"),
    "nf4": Row("nf4"),
    "bf16+compile": Row(compile=True),
    "fp8+compile": Row("fp8", compile=True),
    "nf4+compile": Row("nf4", compile=True),
    "bf16+swap": Row(swapped=1.0),
    "nf4+swap": Row("nf4", swapped=0.5),
}


@dataclass(frozen=True)
class Size:
    """A transformer's configuration and the latents (f, h, w) of one sample."""

    name: str
    shape: Mapping[str, Any]
    latents: tuple[int, int, int]
    adapter_hidden: int


def size_of(name: str) -> Size:
    """Return the published size, or one that a CPU steps in a second."""
    if name == "14b":
        return Size(name, families.FAMILIES[FAMILY].transformer, flops.latent_size((49, 512, 512)), 1024)
    return Size(name, backbone.transformer_config("tiny"), (3, 12, 12), 128)


def fill(module: nn.Module, device: torch.device, keep_float32: tuple[str, ...], generator: torch.Generator) -> None:
    """Give every meta parameter of a module random values on the device; the named ones in float32, else bfloat16."""
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


def random_model(size: Size, row: Row, device: torch.device) -> tuple[adapter.Ex4dModel, int]:
    """Return (the model of a row with random weights, number of its swapped blocks)."""
    transformer = backbone.meta_transformer(size.shape)
    generator = torch.Generator(device).manual_seed(0)
    kept = tuple(transformer._keep_in_fp32_modules or ())
    for block in transformer.blocks:
        fill(block, device, kept, generator)
        if row.quantize:
            quantize.quantize_linears(block, row.quantize, device)
    fill(transformer, device, kept, generator)
    # Its tables are buffers, which were made on the meta device with the rest.
    shape = transformer.config
    transformer.rope = type(transformer.rope)(shape.attention_head_dim, shape.patch_size, shape.rope_max_seq_len)
    transformer.to(device)
    model = adapter.build_model(transformer, backbone.ModelConfig(adapter_hidden=size.adapter_hidden))
    count = round(row.swapped * len(transformer.blocks))
    swap.swap_blocks(transformer, count, device)
    model.set_gradient_checkpointing(True)
    if row.compile:
        backend = "inductor" if device.type == "cuda" else "aot_eager"
        for block in transformer.blocks:
            block.compile(backend=backend)
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


def time_steps(model: adapter.Ex4dModel, size: Size, device: torch.device, warm_up: int, steps: int) -> list[float]:
    """Return the seconds of each step after the warm-up."""
    trainables = list(model.trainable_parameters().values())
    optimizer = torch.optim.AdamW(trainables, lr=3e-5, fused=device.type == "cuda")
    inputs, seconds = inputs_of(size, device), []
    target = torch.randn_like(inputs[0])  # type: ignore[arg-type]
    for step in range(warm_up + steps):
        if step == warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = (model(*inputs) - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trainables, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if not torch.isfinite(loss):
            sys.exit(f"step {step}: the loss is {float(loss)}")
        if step >= warm_up:
            seconds.append(time.perf_counter() - start)
    return seconds


def measure(name: str, size_name: str, device: torch.device, warm_up: int, steps: int) -> dict[str, Any]:
    """Return the figures of one row."""
    size, row = size_of(size_name), ROWS[name]
    model, swapped = random_model(size, row, device)
    held = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    seconds = time_steps(model, size, device, warm_up, steps)
    median = statistics.median(seconds)
    found: dict[str, Any] = {"row": name, **asdict(row), "blocks_swapped": swapped, "seconds": seconds}
    found |= {"seconds_median": median, "weights_gb": held / 1e9}
    if device.type == "cuda":
        peak = flops.peak_flops(torch.cuda.get_device_name(device))
        found["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        if peak:
            cost = flops.cost(size.shape, size.latents, 16, size.adapter_hidden)
            found["mfu"], found["hfu"] = flops.utilisation(cost, 1 / median, peak, True)
    return found | expected(size, row, swapped)


@cache
def counted_once(size_name: str) -> dict[str, int]:
    """Return the numbers of parameters, which are the same however they are stored."""
    size = size_of(size_name)
    return estimate.count_parameters(size.shape, backbone.ModelConfig(adapter_hidden=size.adapter_hidden))


def expected(size: Size, row: Row, swapped: int) -> dict[str, Any]:
    """Return what `train.estimate` says of a row, and the seconds of a step on an H200 at the target."""
    model = backbone.ModelConfig(adapter_hidden=size.adapter_hidden, quantize=row.quantize)  # type: ignore[arg-type]
    train = TrainConfig(activation_checkpointing=True, zero_stage=0, block_swap=swapped)
    parts = estimate.memory(size.shape, counted_once(size.name), size.latents, model, train, BatchPlan(1, 1, 1, 1))
    cost = flops.cost(size.shape, size.latents, 16, size.adapter_hidden)
    at_target = flops.seconds_per_step(cost, 1, "H200", True, TARGET_HFU)
    return {"estimated_gb": sum(parts.values()) / 1e9, "h200_seconds_at_target": at_target}


def in_a_child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a row's figures from a process of its own, or why there are none: a lack of memory ends one row alone."""
    command = [sys.executable, __file__, "--as-child", name, "--size", arguments.size, "--device", arguments.device]
    command += ["--steps", str(arguments.steps), "--warm-up", str(arguments.warm_up), "--hardware", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    why = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"row": name, **asdict(ROWS[name]), "failed": why[:300]}


def markdown(facts: dict[str, Any]) -> str:
    """Return the results as a page."""
    lines = [
        f"# A training step, {facts['size']}",
        "",
        f"{facts['date']}, {facts['hardware']}, {facts['device']}; torch {facts['torch']}. Micro batch 1, latents "
        f"{' × '.join(map(str, facts['latents']))}, {facts['tokens']} tokens, LoRA 16, activation checkpointing, "
        f"AdamW; median of {facts['steps']} steps.",
        "",
        "| base | blocks swapped | s/step | MFU | HFU | peak GB | weights on the device, GB | estimated GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        if "failed" in row:
            lines.append(f"| {row['row']} | | {row['failed']} | | | | | |")
            continue
        mfu, hfu = (f"{row[key]:.1%}" if key in row else "–" for key in ("mfu", "hfu"))
        peak = f"{row['peak_gb']:.1f}" if "peak_gb" in row else "–"
        lines.append(
            f"| {row['row']} | {row['blocks_swapped']} | {row['seconds_median']:.2f} | {mfu} | {hfu} | {peak} | "
            f"{row['weights_gb']:.3g} | {row['estimated_gb']:.3g} |"
        )
    lines += ["", *facts["expected"]]
    return "\n".join(lines) + "\n"


def expectations() -> list[str]:
    """Return what the run at the published size should do on an H200, as lines of a table."""
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
        said = expected(size, row, swapped)
        limit = TARGET_SWAP_GB if row.quantize and swapped else TARGET_GB
        within = "yes" if said["estimated_gb"] <= limit else "no"
        lines.append(
            f"| {name} | {swapped} | {said['estimated_gb']:.1f} | {within} | {said['h200_seconds_at_target']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="said in the results")
    parser.add_argument("--size", choices=("14b", "tiny"), default="14b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--as-child", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.as_child:
        print(json.dumps(measure(arguments.as_child, arguments.size, device, arguments.warm_up, arguments.steps)))
        return
    if arguments.size == "14b" and device.type == "cpu":
        print("\n".join(expectations()))
        sys.exit("no GPU is here: --size tiny runs the same rows on a CPU")
    size, rows = size_of(arguments.size), []
    for name in arguments.only:
        if device.type == "cuda":
            rows.append(in_a_child(name, arguments))
        else:
            rows.append(measure(name, arguments.size, device, arguments.warm_up, arguments.steps))
            gc.collect()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": arguments.hardware,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "size": arguments.size,
        "latents": size.latents,
        "tokens": flops.cost(size.shape, size.latents).tokens,
        "steps": arguments.steps,
        "rows": rows,
        "expected": expectations(),
    }
    RESULTS.mkdir(exist_ok=True)
    stem = "train_14b" if arguments.size == "14b" else "train_14b_tiny"
    (RESULTS / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(markdown(facts), encoding="utf-8")
    print(markdown(facts))


if __name__ == "__main__":
    main()
