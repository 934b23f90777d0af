"""Profile a step's time on the device by kernel, and measure the speed of single operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

# Words in the names of kernels (CUDA) and operators (CPU), searched in this order.
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention", "softmax"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "matmul", "addmm", "aten::mm", "aten::bmm", "conv"),
    "copies": ("memcpy", "memset", "aten::copy_"),
}
MOST_TIME = 12  # number of kernels that are listed individually


def profile(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return how the device spends one step.

    Keys: `attention_kernel` (the attention kernel with the most time), `share_attention`, `share_products`,
    `share_copies`, `share_other`, and `kernels`, seconds by name.
    """
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            spent[event.key] = spent.get(event.key, 0.0) + microseconds / 1e6
    kinds = {name: kind_of(name) for name in spent}
    whole = sum(spent.values()) or 1.0
    found: dict[str, Any] = {
        f"share_{kind}": sum(spent[name] for name in spent if kinds[name] == kind) / whole for kind in (*KINDS, "other")
    }
    longest = sorted(spent, key=spent.__getitem__, reverse=True)
    found["attention_kernel"] = next((name[:160] for name in longest if kinds[name] == "attention"), None)
    found["kernels"] = {name[:160]: round(spent[name], 5) for name in longest[:MOST_TIME]}
    return found


def kind_of(kernel: str) -> str:
    """Return the kind of work, a key of KINDS or "other", from a kernel's name."""
    lowered = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lowered for word in words)), "other")


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Return the mean seconds of a call, after three warm-up calls."""
    for number in range(3 + repeats):
        if number == 3:
            _wait(device)
            start = time.perf_counter()
        call()
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product(device: torch.device, size: int) -> dict[str, Any]:
    """Time a bfloat16 product of two random size × size matrices, the upper bound for a step's FLOP/s."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = seconds_of(lambda: left @ right, device)
    return {"tflops": 2 * size**3 / seconds / 1e12, "ms": 1000 * seconds, "kernel": f"{size}³"}


def attention(device: torch.device, heads: int, tokens: int, width: int) -> dict[str, dict[str, Any]]:
    """Return {kernel: figures of forward and backward} for each available attention kernel and PyTorch's choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "auto": None,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    shape = (1, heads, tokens, width)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def both() -> None:
        output = functional.scaled_dot_product_attention(q, k, v)
        output.backward(output.detach())

    found: dict[str, dict[str, Any]] = {}
    flop = 3.5 * 4 * tokens**2 * width * heads  # forward 2 products, backward 5
    for name, backend in backends.items():
        try:
            if backend is None:
                seconds, profiled = seconds_of(both, device), profile(both, device)
            else:
                with sdpa_kernel(backend):
                    seconds, profiled = seconds_of(both, device), profile(both, device)
        except RuntimeError as error:  # the kernel does not support this device, dtype or shape
            found[name] = {"failed": str(error).splitlines()[0][:200]}
            continue
        found[name] = {"tflops": flop / seconds / 1e12, "ms": 1000 * seconds, "kernel": profiled["attention_kernel"]}
    return found
