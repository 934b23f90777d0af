"""Sample videos longer than the training clips: overlapping windows over the same latents, blended at every step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ex4d.errors import ConfigError

PartVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def parts(length: int, window: int, overlap: int) -> list[Tensor]:
    """Return the frame indices, int64 [<= window], of each window over `length` latent frames.

    Every window begins with frame 0, whose true picture is known, as in training. The frames after it are consecutive
    and overlap the previous window by `overlap` or more; the last window ends with the video.

    Raises:
        ConfigError: `overlap` leaves a window no frame of its own.
    """
    if not 0 < overlap < window - 1:
        allowed = f"must leave each window of {window} latent frames one of its own, beside the first of the video"
        raise ConfigError("generate.window_overlap", overlap, allowed)
    if length <= window:
        return [torch.arange(length)]
    own, last = window - 1, length - window + 1
    starts = [*range(1, last, own - overlap), last]
    return [torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(start, start + own)]) for start in starts]


def ramp(part: Tensor, length: int, overlap: int) -> Tensor:
    """Return a window's blending weights, float32 [frames]: ramps over `overlap`, except at the ends of the video.

    Frame 0 has weight in the first window only.
    """
    own = len(part) - 1
    rising = torch.arange(1, own + 1) / (overlap + 1)
    weight = torch.ones(own)
    is_first = own == 0 or int(part[1]) == 1
    if not is_first:
        weight = torch.minimum(weight, rising)
    if int(part[-1]) + 1 < length:
        weight = torch.minimum(weight, rising.flip(0))
    return torch.cat([torch.tensor([float(is_first)]), weight])


def joined(velocity: PartVelocity, window: int, overlap: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a velocity function of whole latents [B, C, f, h, w]: the weighted mean over overlapping windows.

    All windows update the same latents (after MultiDiffusion, arXiv 2302.08113). No window starts from another's
    result, so that errors in contrast and colour do not accumulate from window to window.

    Args:
        velocity: (latents of a window, timestep, indices of its latent frames) -> velocity.
        window, overlap: latent frames.
    """

    def whole(latents: Tensor, timestep: Tensor) -> Tensor:
        length = latents.shape[2]
        total = torch.zeros_like(latents)
        weights = torch.zeros(length, device=latents.device)
        for part in parts(length, window, overlap):
            weight, here = ramp(part, length, overlap).to(latents.device), part.to(latents.device)
            total[:, :, here] += velocity(latents[:, :, here], timestep, here) * weight[:, None, None]
            weights[here] += weight
        return total / weights[:, None, None]

    return whole
