"""Encode pixels, text and images with the base model for its transformer, and decode latents to pixels."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ex4d.errors import ConfigError, ContractError

# Text is always padded to this length: diffusers' WanAttnProcessor counts back from it to find the image tokens.
TEXT_LENGTH = 512
# Value of hidden pixels in the mask that the VAE encodes; visible ones are +1. The released code scales its mask twice.
MASK_LOW = {"unit": -1.0, "released": -3.0}


@dataclass
class Base:
    """A loaded base model; components that were not requested are None, and methods that need them raise ContractError.

    Args:
        name, revision: as requested; for a hub id, the revision is the commit.
        shape: the transformer's configuration, present even without the transformer.
        image_settings: mean and std of the image encoder's input.
        transformer_2: the second of two experts, for generation.
        offload: keep components in host memory and only the one in use on the device; see `bring`.
    """

    name: str
    revision: str | None
    device: torch.device
    shape: Mapping[str, Any]
    transformer: Any = None
    vae: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    image_encoder: Any = None
    image_settings: dict[str, Any] | None = None
    transformer_2: Any = None
    offload: bool = False

    def _need(self, component: str) -> Any:
        value = getattr(self, component)
        if value is None:
            raise ContractError(f"the base {self.name} was loaded without its {component}")
        return value

    def bring(self, component: str) -> Any:
        """Return a component for use; with `offload`, move it to the device and the others to host memory."""
        wanted = self._need(component)
        if self.offload:
            with torch.inference_mode(False):  # tensors moved in inference mode could not require gradients later
                for name in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
                    other = getattr(self, name)
                    if other is not None and other is not wanted:
                        other.to("cpu")
                wanted.to(self.device)
        return wanted

    @property
    def has_first_frame(self) -> bool:
        """True if the transformer takes the first frame as additional input channels."""
        return self.shape["in_channels"] > self.shape["out_channels"]

    @property
    def first_frame_channels(self) -> int:
        """Number of mask channels in the first-frame condition; the transformer's input is noise, mask and latents."""
        return self.shape["in_channels"] - 2 * self.shape["out_channels"]

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent in (T, H, W)."""
        shape = self._need("vae").config
        return shape.scale_factor_temporal, shape.scale_factor_spatial, shape.scale_factor_spatial

    def latent_shape(self, frames_shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
        """Return (1, z, f, h, w) for frames of shape (T, H, W, 3).

        Raises:
            ConfigError: T is not of the form stride·k + 1, or H or W is not a multiple of stride × patch.
        """
        num_frames, height, width = frames_shape[:3]
        check_clip(frames_shape, self.stride)
        time, down, _ = self.stride
        return 1, self.shape["out_channels"], (num_frames - 1) // time + 1, height // down, width // down

    def _scale(self) -> tuple[Tensor, Tensor]:
        shape = self._need("vae").config
        mean = torch.tensor(shape.latents_mean, device=self.device).view(1, -1, 1, 1, 1)
        return mean, torch.tensor(shape.latents_std, device=self.device).view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode_video(self, pixels: Tensor) -> Tensor:
        """Return normalised latents, float32 [B, z, f, h, w]: the mode of the posterior, (latent − mean) / std.

        Args:
            pixels: float [B, 3, T, H, W] in [−1, 1]; for T, H and W see `check_clip`.
        """
        vae = self.bring("vae")
        self.latent_shape((*pixels.shape[2:], 3))
        raw = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode().float()
        mean, std = self._scale()
        return (raw - mean) / std

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return pixels, float32 [B, 3, T, H, W] clamped to [−1, 1], of normalised latents [B, z, f, h, w]."""
        vae = self.bring("vae")
        mean, std = self._scale()
        raw = latents.to(self.device).float() * std + mean
        return vae.decode(raw.to(vae.dtype), return_dict=False)[0].float().clamp(-1, 1)

    def encode_condition(
        self, cond_pixels: Tensor, visible: Tensor, mask_range: Literal["unit", "released"] = "unit"
    ) -> Tensor:
        """Return condition latents, float32 [B, 2·z, f, h, w]: VAE(colour) ‖ VAE(mask as a 3-channel video).

        Args:
            cond_pixels: [B, 3, T, H, W] in [−1, 1], black (−1) where hidden.
            visible: bool [B, T, H, W], True = seen.
            mask_range: "unit": the mask is {−1, +1}; "released": {−3, +1}.
        """
        mask = torch.where(visible, 1.0, MASK_LOW[mask_range]).unsqueeze(1).expand(-1, 3, -1, -1, -1)
        return torch.cat([self.encode_video(cond_pixels), self.encode_video(mask)], dim=1)

    def first_frame_condition(self, pixels0: Tensor, num_frames: int) -> Tensor | None:
        """Return [B, 4 + z, f, h, w] float32: a mask, 1 for frame 0, and the latents of (frame 0, then grey frames).

        None for a base that does not take it. The four mask channels stand for the four frames of a latent frame.

        Args:
            pixels0: float [B, 3, H, W] in [−1, 1], the first frame of the condition video.
            num_frames: T of the clip.
        """
        if not self.has_first_frame:
            return None
        grey = torch.zeros_like(pixels0).unsqueeze(2).expand(-1, -1, num_frames - 1, -1, -1)
        latents = self.encode_video(torch.cat([pixels0.unsqueeze(2), grey], dim=2))
        mask = torch.zeros_like(latents[:, : self.stride[0]])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Return prompt embeddings, float32 [B, 512, text_dim], zero after the end of each text."""
        encoder = self.bring("text_encoder")
        cleaned = [" ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts]
        tokens = self._need("tokenizer")(
            cleaned, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        return encoder(ids, attention_mask=mask).last_hidden_state.float() * mask.unsqueeze(-1)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor | None:
        """Return CLIP features, float32 [B, tokens, image_dim], of the penultimate layer; None without an encoder.

        The frame is resized to the encoder's square without keeping its aspect ratio (bicubic), as in Wan's training
        (wan_video_image_encoder.py of the released code); diffusers' processor would crop it.

        Args:
            pixels: float [B, 3, H, W] in [−1, 1].
        """
        if self.image_encoder is None:
            return None
        side = self.image_encoder.config.image_size
        settings = self._need("image_settings")
        squashed = functional.interpolate(pixels.float(), size=(side, side), mode="bicubic", align_corners=False)
        mean = torch.tensor(settings["mean"], device=pixels.device).view(1, 3, 1, 1)
        std = torch.tensor(settings["std"], device=pixels.device).view(1, 3, 1, 1)
        encoder = self.bring("image_encoder")
        images = (((squashed * 0.5 + 0.5) - mean) / std).to(self.device, encoder.dtype)
        return encoder(pixel_values=images, output_hidden_states=True).hidden_states[-2].float()


def check_clip(frames_shape: tuple[int, ...], stride: tuple[int, int, int]) -> None:
    """Raise ConfigError unless frames of shape (T, H, W, …) fill whole latents.

    T must be stride·k + 1, H and W multiples of stride × patch.
    """
    num_frames, height, width = frames_shape[:3]
    time, cell = stride[0], stride[1] * 2
    if num_frames % time != 1:
        raise ConfigError("num_frames", num_frames, f"must be {time}·k + 1")
    if height % cell or width % cell:
        raise ConfigError("size", (height, width), f"must be multiples of {cell}")


def to_pixels(frames: Tensor) -> Tensor:
    """Return pixels float32 [B, 3, T, H, W] in [-1, 1] of frames uint8 [B, T, H, W, 3]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def base_fingerprint(transformer: Any) -> str | None:
    """Return 16 hex digits that identify a base, independent of its folder and dtype; None on the meta device.

    They hash the patch embedding in bfloat16, to which float32 and bfloat16 copies of one model both round.
    """
    weight = transformer.patch_embedding.weight
    if weight.is_meta:
        return None
    numbers = weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return hashlib.sha256(numbers.astype("<i2").tobytes()).hexdigest()[:16]


def holes_in_latents(visible: Tensor, latent_size: tuple[int, int, int]) -> Tensor:
    """Return the masked share of each latent cell, float32 [B, 1, f, h, w], in [0, 1].

    Args:
        visible: bool [B, T, H, W]; latent frame 0 holds frame 0 alone, each later one an equal number of frames.
        latent_size: (f, h, w).
    """
    hole = (~visible).float()[:, None]
    num_frames, latent_frames = hole.shape[2], latent_size[0]
    if latent_frames > 1:
        stride = (num_frames - 1) // (latent_frames - 1)
        hole = torch.cat([hole[:, :, :1].expand(-1, -1, stride - 1, -1, -1), hole], dim=2)
    return functional.adaptive_avg_pool3d(hole, latent_size)
