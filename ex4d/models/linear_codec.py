"""A linear space-time codec with the interface of AutoencoderKLWan, small and fast enough for a CPU.

Frames are grouped as in Wan's VAE: of 4k + 1 frames, the first stands alone and the others form groups of four, so it
is causal. Each 8 × 8 block of the first frame (192 numbers) and each 4 × 8 × 8 block of a group (768 numbers) is
projected onto an orthonormal basis fitted by PCA; decoding is the transposed projection, the best linear inverse.
There are no learned non-linearities and no overlap between blocks.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ex4d.errors import ContractError

GROUP = 4
# Log variance of the posterior: the codec is deterministic, so a sample equals the mode in float32.
LOG_VARIANCE = -30.0


class LinearVideoCodec(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both name config_name, as in diffusers
    """Encode and decode video by orthonormal projections of blocks.

    Args:
        z_dim: channels of a latent.
        num_shared: how many of the first channels have the same spatial pattern in a first frame and in a group
            (constant in time there); the others are fitted to each separately.
        latents_mean, latents_std: per channel; a normalised latent is (latent − mean) / std.
        scale_factor_temporal: frames in a group; scale_factor_spatial: block size in px.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 24,
        num_shared: int = 12,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        scale_factor_temporal: int = GROUP,
        scale_factor_spatial: int = 8,
    ):
        super().__init__()
        self.side, self.time = scale_factor_spatial, scale_factor_temporal
        pixels = 3 * self.side**2
        self.frame_mean = nn.Parameter(torch.zeros(pixels))
        self.frame_basis = nn.Parameter(torch.zeros(pixels, z_dim))
        self.group_mean = nn.Parameter(torch.zeros(pixels * self.time))
        self.group_basis = nn.Parameter(torch.zeros(pixels * self.time, z_dim))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Return the posterior (`.latent_dist`), whose mode is raw latents [B, z, f, H/8, W/8], f = (T − 1)/4 + 1.

        Args:
            x: pixels [B, 3, T, H, W] in [−1, 1]; T = 4k + 1, H and W multiples of 8.
        """
        side, time = self.side, self.time
        if x.ndim != 5 or x.shape[2] % time != 1 or x.shape[3] % side or x.shape[4] % side:
            raise ContractError(
                f"pixels {tuple(x.shape)}: not [B, 3, {time}k + 1, H, W] with H and W multiples of {side}"
            )
        first = (to_blocks(x[:, :, :1], 1, side) - self.frame_mean) @ self.frame_basis
        # Divided by √4, so that a channel has the same scale in a still group as in a first frame.
        groups = (to_blocks(x[:, :, 1:], time, side) - self.group_mean) @ self.group_basis / time**0.5
        mean = torch.cat([first, groups], dim=1).permute(0, 4, 1, 2, 3).contiguous()
        posterior = DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)], dim=1))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Return pixels (`.sample`) [B, 3, 4(f − 1) + 1, 8h, 8w], about [−1, 1], of raw latents [B, z, f, h, w]."""
        side, time = self.side, self.time
        codes = z.permute(0, 2, 3, 4, 1)
        first = codes[:, :1] @ self.frame_basis.T + self.frame_mean
        groups = codes[:, 1:] * time**0.5 @ self.group_basis.T + self.group_mean
        sample = torch.cat([_from_blocks(first, 1, side), _from_blocks(groups, time, side)], dim=2)
        return DecoderOutput(sample=sample) if return_dict else (sample,)


def to_blocks(pixels: Tensor, time: int, side: int) -> Tensor:
    """Return [B, T/time, H/side, W/side, time·3·side²] of pixels [B, 3, T, H, W]."""
    batch, colours, frames, height, width = pixels.shape
    cut = pixels.reshape(batch, colours, frames // time, time, height // side, side, width // side, side)
    return cut.permute(0, 2, 4, 6, 3, 1, 5, 7).flatten(4)


def _from_blocks(blocks: Tensor, time: int, side: int) -> Tensor:
    """Return pixels [B, 3, T, H, W]: the inverse of `to_blocks`."""
    batch, groups, rows, columns, _ = blocks.shape
    cut = blocks.reshape(batch, groups, rows, columns, time, 3, side, side)
    return cut.permute(0, 5, 1, 4, 2, 6, 3, 7).reshape(batch, 3, groups * time, rows * side, columns * side)
