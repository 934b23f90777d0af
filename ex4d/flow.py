"""Rectified flow: the sigma schedule, noising, the velocity target, training weights, and the Euler sampler.

A sample moves on a straight line from data to noise, x_sigma = (1 − sigma) x0 + sigma eps, sigma in [0, 1], and the
network predicts the velocity eps − x0. A timestep is 1000 sigma, a float.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ex4d.errors import ConfigError

NUM_TRAIN_TIMESTEPS = 1000
DEFAULT_SHIFT = 5.0
ALL_TIMESTEPS = (0.0, math.inf)

VelocityFn = Callable[[Tensor, Tensor], Tensor]


def shift_sigmas(sigmas: Tensor, shift: float = DEFAULT_SHIFT) -> Tensor:
    """Shift sigmas towards noise, s·sigma / (1 + (s − 1)·sigma): same shape, [0, 1]; shift 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sigmas(num_steps: int, shift: float = DEFAULT_SHIFT) -> Tensor:
    """Return the sampler's sigmas, float32 [num_steps + 1], decreasing from 1 to 0.

    The timesteps of the released sampler are 1000 × all but the last one: linspace(1, 0, N + 1)[:-1], shifted
    (tau-yihouxiang/EX-4D, diffsynth/schedulers/flow_match.py with shift 5, sigma_min 0, extra_one_step).

    Raises:
        ConfigError: num_steps < 1 or shift ≤ 0.
    """
    if num_steps < 1:
        raise ConfigError("num_inference_steps", num_steps, "must be at least 1")
    if shift <= 0:
        raise ConfigError("shift", shift, "must be positive")
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1), shift)


def training_weights(shift: float = DEFAULT_SHIFT) -> tuple[Tensor, Tensor]:
    """Return the training table (sigmas, weights), each float32 [1000]: sigma decreases from 1, weights have mean 1.

    w(t) ∝ exp(−2 ((t − 500) / 1000)²) minus its minimum over the table (DiffSynth's FlowMatchScheduler with
    training=True), so the step of pure noise has weight 0.
    """
    table = sigmas(NUM_TRAIN_TIMESTEPS, shift)[:-1]
    bell = torch.exp(-2 * ((table * NUM_TRAIN_TIMESTEPS - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
    above = bell - bell.min()
    return table, above * (NUM_TRAIN_TIMESTEPS / above.sum())


def _draw_diffsynth(generator: torch.Generator, shift: float) -> tuple[Tensor, Tensor]:
    table, weights = training_weights(shift)
    index = torch.randint(NUM_TRAIN_TIMESTEPS, (), generator=generator)
    return table[index], weights[index]


def _draw_uniform(generator: torch.Generator, shift: float) -> tuple[Tensor, Tensor]:
    # 1 − u lies in (0, 1]: at sigma 0 there is no noise.
    sigma = shift_sigmas(1 - torch.rand((), generator=generator), shift)
    return sigma, torch.ones(())


def _draw_logit_normal(generator: torch.Generator, shift: float) -> tuple[Tensor, Tensor]:
    # Esser et al. 2024 (Stable Diffusion 3), section 3.1, with location 0 and scale 1.
    sigma = shift_sigmas(torch.sigmoid(torch.randn((), generator=generator)), shift)
    return sigma, torch.ones(())


# name -> (generator, shift) -> (sigma, loss weight), both float32 scalars
TIMESTEP_SAMPLING: dict[str, Callable[[torch.Generator, float], tuple[Tensor, Tensor]]] = {
    "diffsynth": _draw_diffsynth,
    "uniform": _draw_uniform,
    "logit_normal": _draw_logit_normal,
}


def draw_sigma(
    name: str,
    generator: torch.Generator,
    shift: float = DEFAULT_SHIFT,
    device: torch.device | str = "cpu",
    timesteps: tuple[float, float] = ALL_TIMESTEPS,
) -> tuple[Tensor, Tensor]:
    """Draw (sigma, loss weight) of one training sample, float32 scalars on `device`.

    Args:
        name: "diffsynth" (the method's: uniform over 1000 shifted values, bell-shaped weight), "uniform" or
            "logit_normal" (continuous, shifted, weight 1).
        generator: a CPU generator, e.g. from `generator_for`.
        timesteps: allowed range [first, end); others are rejected and drawn again, so that within the range the
            distribution and the weights do not change.
    """
    if name not in TIMESTEP_SAMPLING:
        raise ConfigError("timestep_sampling", name, f"allowed: {', '.join(TIMESTEP_SAMPLING)}")
    sigma, weight = TIMESTEP_SAMPLING[name](generator, shift)
    while not timesteps[0] <= float(sigma * NUM_TRAIN_TIMESTEPS) < timesteps[1]:
        sigma, weight = TIMESTEP_SAMPLING[name](generator, shift)
    return sigma.to(device), weight.to(device)


def generator_for(seed: int, *parts: str | int) -> torch.Generator:
    """Return a CPU generator that depends only on (seed, *parts): never on rank, device, process or call order.

    Training uses (seed, step, sample key). Draw on the CPU and move the result, so that every device sees the same
    numbers.
    """
    digest = hashlib.sha256(json.dumps([seed, *parts]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return (1 − sigma) latents + sigma noise.

    Args:
        latents, noise: normalised latents [B, C, f, h, w], equal shape and dtype.
        sigma: [B] or a scalar, in [0, 1].
    """
    level = sigma.to(latents).reshape(sigma.shape + (1,) * (latents.ndim - sigma.ndim))
    return (1 - level) * latents + level * noise


def sample(
    velocity_fn: VelocityFn,
    noise: Tensor,
    sigmas: Tensor,
    guidance_scale: float = 1.0,
    negative_velocity_fn: VelocityFn | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample latents by Euler steps from pure noise to the last sigma; float32, in the shape of `noise`.

    Args:
        velocity_fn: (latents float32 [B, C, f, h, w], timestep float32 [B] in [0, 1000]) -> velocity, like latents.
        noise: [B, C, f, h, w], standard normal.
        sigmas: float32 [N + 1], decreasing, as from `sigmas`.
        guidance_scale: classifier-free guidance, v− + scale (v+ − v−); 1 skips the negative pass.
        negative_velocity_fn: the same network with the negative prompt; required unless the scale is 1.
        on_step: called with the number of steps done, for a progress bar.
    """
    if guidance_scale != 1.0 and negative_velocity_fn is None:
        raise ConfigError("guidance_scale", guidance_scale, "other than 1 needs a negative prompt")
    latents = noise.float()
    for step, (sigma, next_sigma) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True), start=1):
        timestep = torch.full((len(latents),), sigma * NUM_TRAIN_TIMESTEPS, device=latents.device)
        velocity = velocity_fn(latents, timestep).float()
        if guidance_scale != 1.0 and negative_velocity_fn is not None:
            negative = negative_velocity_fn(latents, timestep).float()
            velocity = negative + guidance_scale * (velocity - negative)
        latents = latents + (next_sigma - sigma) * velocity
        if on_step is not None:
            on_step(step)
    return latents
