"""Select the attention kernel, and detect which one actually runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from ex4d.errors import ConfigError

_ATEN = torch.ops.aten
# setting -> (name in torch.nn.attention.SDPBackend, its operators); math is composed of basic operators
KERNELS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cudnn": ("CUDNN_ATTENTION", (_ATEN._scaled_dot_product_cudnn_attention,)),
    "flash": (
        "FLASH_ATTENTION",
        (_ATEN._scaled_dot_product_flash_attention, _ATEN._scaled_dot_product_flash_attention_for_cpu),
    ),
    "efficient": ("EFFICIENT_ATTENTION", (_ATEN._scaled_dot_product_efficient_attention,)),
    "math": ("MATH", ()),
}


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Compute attention with one kernel inside the block, backward passes and recomputation included.

    Args:
        name: a key of KERNELS, or "auto": PyTorch chooses.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if name == "auto":
        yield
        return
    with sdpa_kernel(getattr(SDPBackend, KERNELS[name][0])):
        yield


class _Operators(TorchDispatchMode):
    """Records the operators that run inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(operator.overloadpacket)
        return operator(*args, **(kwargs or {}))


def kernel_that_runs(
    device: torch.device | str, dtype: torch.dtype, head_dim: int = 128, num_tokens: int = 1024
) -> str:
    """Return the kernel that PyTorch uses for this input, found by a trial forward and backward pass.

    PyTorch silently skips cuDNN, for example, if another copy of its library shadows it. On a GPU the result includes
    the CUDA kernel, as in "flash (void pytorch_flash::flash_fwd_kernel…)".

    Raises:
        ConfigError: the kernel that `kernel` selects does not work on this device.
    """
    device = torch.device(device)
    query = torch.randn(1, 2, num_tokens, head_dim, device=device, dtype=dtype, requires_grad=True)

    def attend() -> None:
        scaled_dot_product_attention(query, query, query).sum().backward()

    try:
        with _Operators() as operators:
            attend()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("train.attention", device.type, f"does not work here ({reason}); set auto") from None
    chosen = next((name for name, (_, known) in KERNELS.items() if operators.seen & {*known}), "math")
    if device.type != "cuda":
        return chosen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attend()
        torch.cuda.synchronize(device)
    names = [event.key for event in profile.key_averages()]
    own = [name for name in names if any(word in name for word in ("flash", "fmha", "sdpa"))]
    return f"{chosen} ({own[0]})" if own else chosen
