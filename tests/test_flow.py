"""The flow: schedule, weights, noise by name, and a sampler that ends on the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ex4d import flow
from ex4d.errors import ConfigError

# Of tau-yihouxiang/EX-4D b456a41560c3ba6357cfa3b8f6f87adc79c6a242, read on 2026-11-22: FlowMatchScheduler(shift=5,
# sigma_min=0, extra_one_step=True).set_timesteps(N), the first, second, middle and last of its timesteps.
RELEASED = {25: {0: 1000.0, 1: 991.735535, 12: 844.155884, 24: 172.413849}}
RELEASED[50] = {0: 1000.0, 1: 995.934937, 25: 833.333313, 49: 92.592636}


def slow_timesteps(num_steps: int, shift: float) -> list[float]:
    """The slow twin of the schedule, one number at a time in float64."""
    out = []
    for index in range(num_steps):
        sigma = 1 - index / num_steps
        out.append(1000 * shift * sigma / (1 + (shift - 1) * sigma))
    return out


@pytest.mark.parametrize("num_steps", [25, 50])
def test_timesteps_equal_the_released_ones(num_steps: int) -> None:
    ours = flow.sigmas(num_steps)[:-1] * 1000
    assert np.allclose(ours, slow_timesteps(num_steps, 5.0), atol=1e-3)
    for index, value in RELEASED[num_steps].items():
        assert abs(float(ours[index]) - value) < 1e-3
    assert float(flow.sigmas(num_steps)[-1]) == 0.0


def test_diffusers_scheduler_agrees_when_given_our_sigmas() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 26)[:-1])
    assert torch.allclose(scheduler.timesteps, flow.sigmas(25)[:-1] * 1000, atol=1e-3)


def test_training_weights_have_mean_one_and_vanish_at_pure_noise() -> None:
    table, weights = flow.training_weights(5.0)
    assert table.shape == weights.shape == (1000,)
    assert math.isclose(float(weights.mean()), 1.0, abs_tol=1e-5)
    assert float(weights[0]) == 0.0
    assert float(table[0]) == 1.0
    bell = [math.exp(-2 * ((t - 500) / 1000) ** 2) for t in slow_timesteps(1000, 5.0)]
    slow = np.array(bell) - min(bell)
    assert np.allclose(weights, slow / slow.mean(), atol=1e-4)


def test_noise_depends_on_its_name_alone() -> None:
    draws = [torch.randn(4, generator=flow.generator_for(7, 3, key)) for key in ("a", "b", "a")]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    # ("1", 2) and (1, "2") are different names.
    assert flow.generator_for(0, "1", 2).initial_seed() != flow.generator_for(0, 1, "2").initial_seed()
    # Pinned, so that a change of the hash cannot silently change every run.
    assert flow.generator_for(0, 1, "clip").initial_seed() == 3670235513562121626


@pytest.mark.parametrize("name", list(flow.TIMESTEP_SAMPLING))
def test_drawn_sigmas_lie_in_range_and_repeat(name: str) -> None:
    generator, again = flow.generator_for(0, name), flow.generator_for(0, name)
    drawn = torch.stack([torch.stack(flow.draw_sigma(name, generator)) for _ in range(2000)])
    assert torch.equal(drawn[0], torch.stack(flow.draw_sigma(name, again)))
    assert float(drawn[:, 0].min()) > 0
    assert float(drawn[:, 0].max()) <= 1
    assert abs(float(drawn[:, 1].mean()) - 1) < 0.03
    # shift 5 puts the median of every symmetric law at 5/6.
    assert abs(float(drawn[:, 0].median()) - 5 / 6) < 0.02


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(ConfigError, match="logit_normal"):
        flow.draw_sigma("cosine", flow.generator_for(0))
    with pytest.raises(ConfigError, match="num_inference_steps"):
        flow.sigmas(0)
    with pytest.raises(ConfigError, match="negative prompt"):
        flow.sample(lambda x, t: x, torch.zeros(1, 1, 1, 1, 1), flow.sigmas(2), guidance_scale=5.0)


def test_noising_is_a_straight_line_with_the_velocity_as_slope() -> None:
    latents, noise = torch.randn(2, 2, 3, 1, 4, 4, generator=flow.generator_for(0)).unbind(0)
    sigma = torch.tensor([0.25, 0.75])
    noisy = flow.add_noise(latents, noise, sigma)
    assert torch.allclose(noisy[1], 0.25 * latents[1] + 0.75 * noise[1])
    assert torch.allclose(noisy - sigma.view(2, 1, 1, 1, 1) * (noise - latents), latents, atol=1e-6)


def test_sampler_ends_on_the_data_and_guidance_is_linear() -> None:
    latents, noise = torch.randn(2, 1, 3, 1, 4, 4, generator=flow.generator_for(1)).unbind(0)
    seen: list[int] = []

    def exact(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return (x - latents) / (timestep / 1000).view(-1, 1, 1, 1, 1)

    out = flow.sample(exact, noise, flow.sigmas(4), on_step=seen.append)
    assert torch.allclose(out, latents, atol=1e-5)
    assert seen == [1, 2, 3, 4]
    ones, zeros = (lambda x, t: torch.ones_like(x)), (lambda x, t: torch.zeros_like(x))
    guided = flow.sample(ones, noise, flow.sigmas(4), guidance_scale=5.0, negative_velocity_fn=zeros)
    assert torch.allclose(guided, noise - 5.0, atol=1e-5)
