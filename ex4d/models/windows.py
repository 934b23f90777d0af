"""Videos longer than the model was trained on: overlapping windows over the same latents, joined at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ex4d.errors import ConfigError

PartVelocity = Callable[[Tensor, Tensor, slice], Tensor]


def spans(length: int, window: int, overlap: int) -> list[slice]:
    """Return windows over `length` latent frames; the last one is moved back to end with them.

    Raises:
        ConfigError: the overlap is not smaller than the window.
    """
    if not 0 < overlap < window:
        raise ConfigError(
            "generate.window_overlap", overlap, f"must be at least 1 and less than the window of {window} latent frames"
        )
    if length <= window:
        return [slice(0, length)]
    starts = [*range(0, length - window, window - overlap), length - window]
    return [slice(start, start + window) for start in starts]


def ramp(part: slice, length: int, overlap: int) -> Tensor:
    """Return a window's weights, float32 [frames]: rising and falling over `overlap`, not at the video's ends."""
    frames = part.stop - part.start
    rising = torch.arange(1, frames + 1) / (overlap + 1)
    weight = torch.ones(frames)
    if part.start > 0:
        weight = torch.minimum(weight, rising)
    if part.stop < length:
        weight = torch.minimum(weight, rising.flip(0))
    return weight


def joined(velocity: PartVelocity, window: int, overlap: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a velocity of whole latents [B, C, f, h, w]: the weighted mean of those of overlapping windows.

    All windows move the same latents (after MultiDiffusion, arXiv 2302.08113), so no window starts from another's
    result: neither contrast nor colour can grow from one to the next.

    Args:
        velocity: (latents of a window, timestep, its slice of the latent frames) -> velocity.
        window, overlap: latent frames.
    """

    def whole(latents: Tensor, timestep: Tensor) -> Tensor:
        length = latents.shape[2]
        total = torch.zeros_like(latents)
        weights = torch.zeros(length, device=latents.device)
        for part in spans(length, window, overlap):
            weight = ramp(part, length, overlap).to(latents.device)
            total[:, :, part] += velocity(latents[:, :, part], timestep, part) * weight[:, None, None]
            weights[part] += weight
        return total / weights[:, None, None]

    return whole
