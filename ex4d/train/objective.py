"""Compute the flow-matching loss of a batch of clips: encoding, reproducible noise, weighted error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ex4d import flow
from ex4d.models.encoders import holes_in_latents, to_pixels


@dataclass(frozen=True)
class Encoded:
    """A micro batch of clips, each with one mask, encoded by the frozen base; all float32.

    Args:
        latents: of the clips, [B, z, f, h, w].
        cond_latents: of the masked colours and of the mask, [B, 2·z, f, h, w].
        image, first_frame: the first frame's features [B, n, d] and condition [B, m + z, f, h, w]; None if the base
            takes none.
        hole: share of each latent cell that is masked, [B, 1, f, h, w], in [0, 1].
        source: latents of the scene from the other camera, [B, z, f, h, w]; None if the batch has none.
    """

    latents: Tensor
    cond_latents: Tensor
    image: Tensor | None
    first_frame: Tensor | None
    hole: Tensor
    source: Tensor | None = None


@dataclass(frozen=True)
class Inputs:
    """One micro batch, encoded and noised.

    Args:
        model_inputs: the arguments of Ex4dModel.forward.
        target: velocity to predict, float32 [B, C, f, h, w].
        sigma: float32 [B]; loss_weight: float32 [B].
        hole: share of each latent cell that is masked, float32 [B, 1, f, h, w], in [0, 1].
        valid: float32 [B], 0 for a sample that could not be read; it stays in the batch with weight 0.
    """

    model_inputs: tuple[Tensor | None, ...]
    target: Tensor
    sigma: Tensor
    loss_weight: Tensor
    hole: Tensor
    valid: Tensor


class Encoder:
    """Encodes batches with a frozen base; prompts that repeat are encoded once.

    Args:
        base: models.backbone.Base, or any object with its encode_* methods.
        mask_range: "unit" or "released": range of the mask video before it is encoded.
        prompt: one prompt for all clips, or None for their captions.
        known: {text: embeddings [1, 512, d]} of prompts that need not be encoded.

    Attributes:
        timesteps: [first, end) of the timesteps to train on; each of two experts has its own range.
    """

    timesteps = flow.ALL_TIMESTEPS

    def __init__(self, base: Any, mask_range: str, prompt: str | None, known: Mapping[str, Tensor] | None = None):
        self.base, self.mask_range, self.prompt = base, mask_range, prompt
        self._known = dict(known or {})

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], noises: list[NamedNoise], shift: float, sampling: str) -> Inputs:
        """Return the model's inputs for a micro batch.

        Args:
            batch: from the loader: `captions`, `valid` bool [B], and the keys that `clips` needs.
            noises: one source of randomness per sample.
            shift, sampling: of the noise levels (flow.draw_sigma).
        """
        device = self.base.device
        encoded = self.clips(batch)
        latents = encoded.latents
        drawn = [flow.draw_sigma(sampling, noise.generator, shift, device, self.timesteps) for noise in noises]
        sigma, weight = (torch.stack(column) for column in zip(*drawn, strict=True))
        captions = [self.prompt if self.prompt is not None else caption for caption in batch["captions"]]
        prompts = ["" if noise.drops_prompt() else caption for noise, caption in zip(noises, captions, strict=True)]
        noise_latents = on_device(torch.stack([noise.normal(latents.shape[1:]) for noise in noises]), device)
        model_inputs = (
            flow.add_noise(latents, noise_latents, sigma),
            sigma * flow.NUM_TRAIN_TIMESTEPS,
            self._prompt_embeds(prompts),
            encoded.image,
            encoded.first_frame,
            encoded.cond_latents,
            encoded.source,
        )
        valid = on_device(batch["valid"], device).float()
        return Inputs(model_inputs, noise_latents - latents, sigma, weight, encoded.hole, valid)

    def clips(self, batch: dict[str, Any]) -> Encoded:
        """Encode a batch of clips with the base.

        Args:
            batch: `frames` u8 [B,T,H,W,3]; the mask `visible` bool [B,T,H,W]; optionally `shown` (u8, as `frames`), the
                colours under the mask if not those of `frames`; optionally `source` (u8, as `frames`), the scene from
                the other camera.
        """
        device = self.base.device
        frames, visible = on_device(batch["frames"], device), on_device(batch["visible"], device)
        colours = on_device(batch["shown"], device) if "shown" in batch else frames
        latents = self.base.encode_video(to_pixels(frames)).float()
        condition = to_pixels(colours * visible[..., None])
        first = condition[:, :, 0]
        return Encoded(
            latents,
            self.base.encode_condition(condition, visible, self.mask_range),
            self.base.encode_image(first),
            self.base.first_frame_condition(first, frames.shape[1]),
            holes_in_latents(visible, (latents.shape[2], latents.shape[3], latents.shape[4])),
            self._source(batch),
        )

    def _source(self, batch: dict[str, Any]) -> Tensor | None:
        if "source" not in batch:
            return None
        return self.base.encode_video(to_pixels(on_device(batch["source"], self.base.device))).float()

    def text(self, prompt: str) -> Tensor:
        """Return the embeddings [1, 512, d] of a prompt."""
        return self.base.encode_text([prompt])

    def _prompt_embeds(self, prompts: list[str]) -> Tensor:
        fixed = {"", self.prompt}
        rows = []
        for prompt in prompts:
            embeds = self._known.get(prompt)
            if embeds is None:
                embeds = self.text(prompt)
                if prompt in fixed:
                    self._known[prompt] = embeds
            rows.append(embeds)
        return torch.cat(rows)


class LatentEncoder(Encoder):
    """The encoder for a latent dataset: everything is already encoded, so the base needs no encoders.

    Args:
        base: models.backbone.Base.
        texts: prompt embeddings by text: a data.texts.TextStore, or any object with its method `embeds`.
        prompt: as in Encoder.
    """

    def __init__(self, base: Any, texts: Any, prompt: str | None):
        super().__init__(base, "", prompt)
        self.texts = texts

    def clips(self, batch: dict[str, Any]) -> Encoded:
        """Return a batch of data.latents.decode_latents on the base's device, with the first frame's mask added."""
        device = self.base.device
        names = ("latents", "cond_latents", "hole", "first_frame", "image", "source")
        values = {name: on_device(batch[name], device) for name in names if name in batch}
        first = values.get("first_frame")
        if first is not None:
            mask = torch.zeros_like(first[:, :1]).expand(-1, self.base.first_frame_channels, -1, -1, -1).clone()
            mask[:, :, 0] = 1
            first = torch.cat([mask, first], dim=1)
        return Encoded(
            values["latents"], values["cond_latents"], values.get("image"), first, values["hole"], values.get("source")
        )

    def text(self, prompt: str) -> Tensor:
        """Return the stored embeddings [1, 512, d] of a prompt."""
        return torch.from_numpy(self.texts.embeds(prompt))[None].to(self.base.device)


def on_device(values: Any, device: torch.device) -> Tensor:
    """Move an array or CPU tensor to a device; to a GPU through pinned memory, so that the copy is asynchronous."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class NamedNoise:
    """The randomness of one sample at one step; it depends on seed, step and key, not on rank, device or call order."""

    def __init__(self, seed: int, step: int | str, key: str, condition_dropout: float = 0.0):
        self.generator = flow.generator_for(seed, step, key)
        self._dropout = condition_dropout

    def drops_prompt(self) -> bool:
        """Return whether this sample is trained on the empty prompt."""
        return bool(torch.rand((), generator=self.generator) < self._dropout)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal noise, float32, drawn on the CPU so that every device sees the same."""
        return torch.randn(shape, generator=self.generator)


@dataclass(frozen=True)
class Losses:
    """Errors of one micro batch, float32 [B]: `weighted` is minimised, `mse` is the unweighted squared error."""

    weighted: Tensor
    mse: Tensor


def velocity_losses(velocity: Tensor, inputs: Inputs, hole_weight: float) -> Losses:
    """Return the errors of each sample.

    Args:
        velocity: prediction [B, C, f, h, w].
        hole_weight: weight of a cell inside a hole relative to a visible one; each sample's weights have mean 1, so
            that the scale of the loss does not change.
    """
    squared = (velocity.float() - inputs.target) ** 2
    mse = squared.mean(dim=(1, 2, 3, 4))
    cells = 1 + (hole_weight - 1) * inputs.hole
    cells = cells / cells.mean(dim=(1, 2, 3, 4), keepdim=True)
    weighted = (squared * cells).mean(dim=(1, 2, 3, 4)) if hole_weight != 1.0 else mse
    return Losses(inputs.valid * inputs.loss_weight * weighted, inputs.valid * mse.detach())
