"""Estimate the depth of a whole clip by DepthCrafter: Stable Video Diffusion, trained on disparity (Hu et al. 2024).

The VAE latents of the frames are concatenated with the noise along channels; each frame has its own CLIP embedding.
5 Euler steps, no guidance, windows of 110 frames that overlap the previous one by 25. Overlapping frames start from the
previous window's result plus noise, use the same noise in both windows, and are cross-faded. Numbers and rules follow
the authors' code, depth_crafter_ppl.py. Pictures pass through the VAE in chunks of 8; only they, as uint8, and latents
are in memory for the whole clip.

A folder of weights holds a diffusers pipeline of SVD, with DepthCrafter's network under `unet`:
`unet/` (from tencent/DepthCrafter), `vae/`, `image_encoder/`, `feature_extractor/`, `scheduler/` (from SVD).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ex4d.depth import DepthRequest, Geometry
from ex4d.depth.depthcrafter_weights import Networks, load
from ex4d.errors import BadSample

if TYPE_CHECKING:
    import torch

WINDOW, OVERLAP, NUM_STEPS = 110, 25, 5
CHUNK = 8  # frames that pass through the VAE together: its decoder mixes them, so this number affects the result
MULTIPLE, MAX_SIDE_PX = 64, 1024  # of the network's input
NOISE_STRENGTH = 0.02  # added to the frames before the VAE
TIME_IDS = (7.0, 127.0, NOISE_STRENGTH)  # frames per second, motion bucket, noise: the values used in training


def estimate(frames: np.ndarray, request: DepthRequest) -> Geometry:
    """Estimate the disparity of frames uint8 [T, H, W, 3], in [0, 1], up to one scale and shift for the clip.

    Args:
        request: `depth_path` is a folder of weights (see above), or `hub-id[@revision]` of the network, with the other
            parts of SVD from the hub; None: the published weights. `seed` seeds the noise.

    Raises:
        ConfigError: the weights are missing and cannot be fetched, or are those of another network.
        ContractError: the folder does not match its configs.
        BadSample: depth_nan.
    """
    import torch

    networks = load(request.depth_path, request.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    noise = torch.Generator().manual_seed(request.seed)  # on the CPU: the same on every device
    with torch.inference_mode():
        pictures = working_pictures(frames)
        latents = encode(networks, pictures, noise)
        embeddings = embed(networks, pictures)
        disparity = denoise(networks, latents, embeddings, noise)
        values = decode(networks, disparity, frames.shape[1:3])
    if not np.isfinite(values).all():
        raise BadSample("depth_nan", f"depthcrafter gave {(~np.isfinite(values)).mean():.2%} non-finite values")
    return Geometry(values, "disparity", None, False, dict(networks.facts))


def working_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Return the network's input (H, W) for a picture of `size`: multiples of 64, the longer side at most 1024."""
    scale = min(1.0, MAX_SIDE_PX / max(size))
    height, width = (max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in size)
    return height, width


def working_pictures(frames: np.ndarray) -> torch.Tensor:
    """Resize frames uint8 [T, H, W, 3] to uint8 [T, 3, h, w] at the network's input size."""
    import torch
    from torch.nn import functional

    size, parts = working_size(frames.shape[1:3]), []
    for start in range(0, len(frames), CHUNK):
        part = torch.from_numpy(np.ascontiguousarray(frames[start : start + CHUNK])).permute(0, 3, 1, 2)
        if tuple(part.shape[2:]) != size:
            part = functional.interpolate(part.float(), size=size, mode="bilinear", antialias=True)
            part = part.round().clamp(0, 255).to(torch.uint8)
        parts.append(part)
    return torch.cat(parts)


def _chunks(pictures: torch.Tensor, device: str) -> Iterator[torch.Tensor]:
    """Yield pixels float32 [n, 3, h, w] in [−1, 1] on the device, CHUNK of them at a time."""
    for start in range(0, len(pictures), CHUNK):
        yield pictures[start : start + CHUNK].to(device).float() / 127.5 - 1


def encode(networks: Networks, pictures: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Encode pictures with a little noise to raw latents float [T, z, h/8, w/8], not scaled, like SVD's conditions."""
    import torch

    vae, parts = networks.vae, []
    overflows = vae.config.force_upcast and vae.dtype == torch.float16
    if overflows:
        vae.float()
    for pixels in _chunks(pictures, networks.device):
        pixels = pixels + NOISE_STRENGTH * torch.randn(pixels.shape, generator=noise).to(pixels.device)
        parts.append(vae.encode(pixels.to(vae.dtype)).latent_dist.mode())
    if overflows:
        vae.half()
    return torch.cat(parts).to(networks.unet.dtype)


def embed(networks: Networks, pictures: torch.Tensor) -> torch.Tensor:
    """Embed each picture with CLIP: float [T, 1, C]."""
    import torch

    encoder, parts = networks.image_encoder, []
    side = encoder.config.image_size
    mean, std = (
        torch.tensor(values, device=networks.device)[:, None, None]
        for values in (networks.clip_mean, networks.clip_std)
    )
    for pixels in _chunks(pictures, networks.device):
        small = (shrink(pixels, side) + 1) / 2
        parts.append(encoder(((small - mean) / std).to(encoder.dtype)).image_embeds)
    return torch.cat(parts)[:, None]


def shrink(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Resize pixels [n, 3, h, w] to side × side: a Gaussian of σ = (factor − 1) / 2, then bicubic, aligned corners.

    SVD's embeddings are computed this way (diffusers, `_resize_with_antialiasing`).
    """
    import torch
    from torch.nn import functional

    for axis in (2, 3):
        sigma = max((pixels.shape[axis] / side - 1) / 2, 0.001)
        reach = int(max(4 * sigma, 3)) // 2
        offset = torch.arange(-reach, reach + 1, device=pixels.device, dtype=pixels.dtype)
        kernel = torch.exp(-(offset**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).view((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)).repeat(3, 1, 1, 1)
        margin = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        pixels = functional.conv2d(functional.pad(pixels, margin, mode="reflect"), kernel, groups=3)
    return functional.interpolate(pixels, size=(side, side), mode="bicubic", align_corners=True)


def denoise(
    networks: Networks, condition: torch.Tensor, embeddings: torch.Tensor, noise: torch.Generator
) -> torch.Tensor:
    """Sample the latents [T, z, h, w] of the disparity.

    Args:
        condition: [T, z, h, w], latents of the frames. embeddings: [T, 1, C]. noise: generator of the initial noise.
    """
    import torch

    unet, scheduler = networks.unet, networks.scheduler
    time_ids = torch.tensor([TIME_IDS], device=condition.device, dtype=embeddings.dtype)

    def sample(latents: torch.Tensor, start: int) -> torch.Tensor:
        span = slice(start, start + len(latents))
        scheduler.set_timesteps(NUM_STEPS, device=condition.device)
        with one_embedding_a_frame(unet, embeddings[span]):
            for timestep in scheduler.timesteps:
                seen = torch.cat([scheduler.scale_model_input(latents, timestep), condition[span]], dim=1)
                velocity = unet(seen[None], timestep, embeddings[span][:1], time_ids, return_dict=False)[0][0]
                latents = scheduler.step(velocity, timestep, latents).prev_sample
        return latents

    scheduler.set_timesteps(NUM_STEPS, device=condition.device)
    shape = (min(WINDOW, len(condition)), *condition.shape[1:])
    drawn = torch.randn(shape, generator=noise).to(condition)
    scale, first_sigma = float(scheduler.init_noise_sigma), float(scheduler.sigmas[0])
    return in_windows(sample, drawn, len(condition), scale, first_sigma)


def in_windows(
    sample: Callable[[torch.Tensor, int], torch.Tensor],
    noise: torch.Tensor,
    num_frames: int,
    noise_scale: float,
    first_sigma: float,
) -> torch.Tensor:
    """Sample latents [T, …] of the clip in overlapping windows.

    Args:
        sample: (start latents [n, …], number of the first frame) → latents of these frames.
        noise: standard normal [window, …]; frames that two windows share get the same noise in both.
        num_frames: T. noise_scale: of the noise in frames that start from noise alone. first_sigma: of the schedule,
            scale of the noise added to the previous window's result.
    """
    import torch

    window = len(noise)
    overlap = OVERLAP if num_frames > window else 0
    stride = window - overlap
    fade = torch.linspace(0, 1, overlap, device=noise.device, dtype=noise.dtype).view(-1, *[1] * (noise.ndim - 1))
    done = sample(noise * noise_scale, 0)
    for start in range(stride, num_frames - overlap, stride):
        noise = torch.cat([noise[stride:], noise[:stride]])
        latents = noise[: num_frames - start] * noise_scale
        latents[:overlap] = done[-overlap:] + noise[:overlap] * first_sigma
        found = sample(latents, start)
        joined = fade * found[:overlap] + (1 - fade) * done[-overlap:]
        done = torch.cat([done[:-overlap], joined, found[overlap:]])
    return done


@contextmanager
def one_embedding_a_frame(unet: Any, embeddings: torch.Tensor) -> Iterator[None]:
    """Give each frame its own embedding [T, 1, C]: diffusers' network repeats one for all frames of a video."""

    def swap(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "encoder_hidden_states": embeddings}

    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    attending = [block for block in blocks if getattr(block, "has_cross_attention", False)]
    hooks = [block.register_forward_pre_hook(swap, with_kwargs=True) for block in attending]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def decode(networks: Networks, latents: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Decode to disparity float32 [T, H, W] in [0, 1] at `size`: the mean of the VAE's three output channels."""
    import torch
    from torch.nn import functional

    vae, parts = networks.vae, []
    for start in range(0, len(latents), CHUNK):
        part = latents[start : start + CHUNK].to(vae.dtype) / vae.config.scaling_factor
        pixels = vae.decode(part, num_frames=len(part)).sample.float()
        grey = (pixels / 2 + 0.5).clamp(0, 1).mean(dim=1, keepdim=True)
        if tuple(grey.shape[2:]) != tuple(size):
            grey = functional.interpolate(grey, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)
        parts.append(grey[:, 0].cpu())
    return torch.cat(parts).numpy()
