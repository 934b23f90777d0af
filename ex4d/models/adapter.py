"""Define the geometry adapter, and the one module that combines base, LoRA and adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ex4d.errors import ConfigError
from ex4d.models import lora
from ex4d.models.blocks import Recompute, keep_residual_float32

if TYPE_CHECKING:
    from ex4d.models.backbone import ModelConfig


class GeometryAdapter(nn.Module):
    """Maps condition latents to a residual of the patch embedding; float32, and zero until trained.

    Conv3d 1×1×1 → SiLU → 1×1×1 → SiLU → 1×1×1, then Conv3d with kernel = stride = patch, zero-initialised
    (tau-yihouxiang/EX-4D, diffsynth/models/camera.py, whose parameter names it keeps).

    Args:
        latent_channels: z of the VAE; the input has 2·z channels, colour then mask.
        width: hidden size of the transformer.
        hidden: channels of the layers in between.
    """

    def __init__(
        self, latent_channels: int, width: int, hidden: int = 1024, patch: tuple[int, ...] = (1, 2, 2), seed: int = 0
    ):
        super().__init__()
        self.latent_encoder = nn.Sequential(
            nn.Conv3d(2 * latent_channels, hidden, kernel_size=1),
            nn.SiLU(),
            nn.Conv3d(hidden, hidden, kernel_size=1),
            nn.SiLU(),
            nn.Conv3d(hidden, hidden, kernel_size=1),
        )
        kernel = (patch[0], patch[1], patch[2])
        self.latent_patch_embedding = nn.Conv3d(hidden, width, kernel_size=kernel, stride=kernel)
        self._draw(seed)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Draw the weights from `seed` alone, as torch initialises convolutions by default, and zero the last layer."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.latent_encoder:
            if isinstance(layer, nn.Conv3d) and layer.bias is not None and not layer.weight.is_meta:
                bound = 1 / math.sqrt(layer.in_channels)
                layer.weight.copy_(
                    torch.empty(layer.weight.shape, device="cpu").uniform_(-bound, bound, generator=generator)
                )
                layer.bias.copy_(
                    torch.empty(layer.bias.shape, device="cpu").uniform_(-bound, bound, generator=generator)
                )
        for parameter in self.latent_patch_embedding.parameters():
            parameter.zero_()

    def forward(self, cond_latents: Tensor) -> Tensor:
        """Return the residual float32 [B, width, f, h/2, w/2] of condition latents [B, 2·z, f, h, w]."""
        return self.latent_patch_embedding(self.latent_encoder(cond_latents.float()))


class Ex4dModel(nn.Module):
    """A frozen Wan transformer with trainable LoRA and geometry adapter, as one module.

    The residual enters once, through a hook on `transformer.patch_embedding`, so diffusers' class needs no fork.
    """

    def __init__(self, transformer: Any, geometry_adapter: GeometryAdapter):
        super().__init__()
        self.transformer: Any = transformer  # diffusers' WanTransformer3DModel
        self.geometry_adapter = geometry_adapter
        self._residual: Tensor | None = None
        self._alone = False
        transformer.patch_embedding.register_forward_hook(self._add_residual)

    def _add_residual(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if self._residual is None:
            return output
        return output + self._residual.to(output.dtype)

    def forward(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        prompt_embeds: Tensor,
        image_embeds: Tensor | None = None,
        first_frame: Tensor | None = None,
        cond_latents: Tensor | None = None,
        source_latents: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity, float32 [B, z, f, h, w].

        Args:
            noisy_latents: [B, z, f, h, w], normalised.
            timestep: float32 [B] in [0, 1000].
            prompt_embeds: [B, 512, text_dim].
            image_embeds: CLIP features [B, 257, 1280]; None for a base without them.
            first_frame: [B, 4 + z, f, h, w], from `Base.first_frame_condition`; None for a base without it.
            cond_latents: [B, 2·z, f, h, w], from `Base.encode_condition`; None leaves the geometry out.
            source_latents: [B, z, f, h, w] of the source video, whose tokens then follow those of the target along the
                frame axis, clean and marked as given (after ReCamMaster, arXiv 2503.11647); None leaves it out.
        """
        num_latent_frames = noisy_latents.shape[2]
        hidden = noisy_latents if first_frame is None else torch.cat([noisy_latents, first_frame.to(noisy_latents)], 1)
        residual = None if cond_latents is None or self._alone else self.geometry_adapter(cond_latents)
        if source_latents is not None:
            hidden = torch.cat([hidden, _given_frames(source_latents, first_frame).to(hidden)], dim=2)
            if residual is not None:
                residual = torch.cat([residual, torch.zeros_like(residual)], dim=2)
        dtype = self.transformer.patch_embedding.weight.dtype
        self._residual = residual
        try:
            (velocity,) = self.transformer(
                hidden_states=hidden.to(dtype),
                timestep=timestep,
                encoder_hidden_states=prompt_embeds.to(dtype),
                encoder_hidden_states_image=None if image_embeds is None else image_embeds.to(dtype),
                return_dict=False,
            )
        finally:
            self._residual = None
        return velocity[:, :, :num_latent_frames].float()

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Run the plain base, without LoRA and geometry, inside the block: the baseline for an adapter."""
        self._alone = True
        self.transformer.disable_lora()
        try:
            yield
        finally:
            self.transformer.enable_lora()
            self._alone = False

    def set_gradient_checkpointing(
        self, enabled: bool, count: int | None = None, keep_attention: bool = False, measure: bool = False
    ) -> Recompute | None:
        """Recompute blocks in the backward pass, or keep their activations; the results do not change.

        Args:
            count, keep_attention, measure: see blocks.Recompute, which is returned.
        """
        if not enabled:
            self.transformer.disable_gradient_checkpointing()
            return None
        recompute = Recompute(self.transformer.blocks, count, keep_attention, measure)
        self.transformer.enable_gradient_checkpointing(recompute)
        return recompute

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return {canonical name: parameter}, float32: LoRA under `transformer.`, then `geometry_adapter.`.

        The names are those of adapter files and of checkpoints, whatever wraps the module.
        """
        loras = {f"transformer.{name}": value for name, value in lora.lora_parameters(self.transformer).items()}
        return loras | {f"geometry_adapter.{name}": value for name, value in self.geometry_adapter.named_parameters()}


def _given_frames(source_latents: Tensor, first_frame: Tensor | None) -> Tensor:
    """Return the source as input channels [B, C, f, h, w]; if the base takes a mask, all frames are marked as given."""
    if first_frame is None:
        return source_latents
    mask = torch.ones_like(first_frame[:, : first_frame.shape[1] - source_latents.shape[1]])
    return torch.cat([source_latents, mask, source_latents.to(mask)], dim=1)


def build_model(transformer: Any, config: ModelConfig, seed: int = 0) -> Ex4dModel:
    """Return the trainable model over a loaded (or meta-device) WanTransformer3DModel, frozen and changed in place.

    Trainable parameters are float32 on the transformer's device, drawn from `seed` alone; the output equals the base's
    until they are trained.

    Raises:
        ConfigError: an alpha that is not a positive number.
    """
    if not 0 < config.lora_alpha < math.inf:
        raise ConfigError("model.lora_alpha", config.lora_alpha, "must be finite and greater than 0")
    if config.residual_fp32:  # before the hook that adds the geometry, which is float32 too
        keep_residual_float32(transformer)
    scale = (config.lora_rank, config.lora_alpha)
    lora.add_lora(transformer, *scale, seed, config.lora_dropout, config.lora_rslora, config.lora_targets)
    shape = transformer.config
    device = transformer.patch_embedding.weight.device
    with torch.device(device):
        geometry_adapter = GeometryAdapter(
            latent_channels=shape.out_channels,
            width=shape.num_attention_heads * shape.attention_head_dim,
            hidden=config.adapter_hidden,
            patch=tuple(shape.patch_size),
            seed=seed,
        )
    return Ex4dModel(transformer, geometry_adapter)
