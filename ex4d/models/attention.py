"""Which kernel computes attention: the one asked for, and the one that really runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention

from ex4d.errors import ConfigError

# setting -> (name in torch.nn.attention.SDPBackend, operator that the profiler sees)
KERNELS = {
    "cudnn": ("CUDNN_ATTENTION", "aten::_scaled_dot_product_cudnn_attention"),
    "flash": ("FLASH_ATTENTION", "aten::_scaled_dot_product_flash_attention"),
    "efficient": ("EFFICIENT_ATTENTION", "aten::_scaled_dot_product_efficient_attention"),
    "math": ("MATH", "aten::_scaled_dot_product_attention_math"),
}


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Compute attention with one kernel inside the block, backward passes and recomputation included.

    Args:
        name: of KERNELS, or "auto": PyTorch chooses.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == "auto":
        yield
        return
    with sdpa_kernel(getattr(SDPBackend, KERNELS[name][0])):
        yield


def kernel_that_runs(
    device: torch.device | str, dtype: torch.dtype, head_dim: int = 128, num_tokens: int = 1024
) -> str:
    """Return which kernel PyTorch takes here, by trying one forward and backward pass under the profiler.

    cuDNN, for one, is passed over without a word where its library is shadowed by another. On a GPU the device's own
    kernel is named too, as in "flash (void pytorch_flash::flash_fwd_kernel…)".

    Raises:
        ConfigError: the kernel that `kernel` asks for does not work here.
    """
    device = torch.device(device)
    query = torch.randn(1, 2, num_tokens, head_dim, device=device, dtype=dtype, requires_grad=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        with torch.profiler.profile(activities=activities) as profile:
            scaled_dot_product_attention(query, query, query).sum().backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("train.attention", device.type, f"auto: the kernel does not work here ({reason})") from None
    events = profile.key_averages()
    names = {event.key for event in events}
    chosen = next((key for key, (_, operator) in KERNELS.items() if _matches(operator, names)), "unknown")
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    attention = [event.key for event in on_device if any(word in event.key for word in ("flash", "fmha", "sdpa"))]
    return f"{chosen} ({attention[0]})" if attention else chosen


def _matches(operator: str, names: set[str]) -> bool:
    return any(name.startswith(operator) for name in names)
