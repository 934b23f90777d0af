"""Overlapping windows: a model that does not look across frames is unaffected, and weights cover frames smoothly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from ex4d.errors import ConfigError
from ex4d.models import windows


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(13, 13, 4), (49, 13, 4), (50, 13, 4), (14, 13, 11), (3, 5, 1), (1, 5, 1)]
)
def test_a_velocity_that_looks_at_one_frame_is_unchanged(length: int, window: int, overlap: int) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, place = torch.randn(2, 3, length, 2, 2, generator=generator), torch.arange(length).float()
    seen = []

    def velocity(part_latents, timestep, part):  # type: ignore[no-untyped-def]
        seen.append(part.tolist())
        assert part_latents.shape[2] == min(length, window)
        return part_latents * 2 + place[part][:, None, None] + timestep[0]

    found = windows.joined(velocity, window, overlap)(latents, torch.tensor([3.0, 3.0]))
    assert torch.allclose(found, latents * 2 + place[:, None, None] + 3.0, atol=1e-5)
    assert sorted({frame for part in seen for frame in part}) == list(range(length))
    assert all(part[0] == 0 for part in seen), "every window begins with the frame whose picture is known"
    assert all(part[1:] == list(range(part[1], part[-1] + 1)) for part in seen if len(part) > 1)
    assert all(len({*before[1:]} & {*after[1:]}) >= overlap for before, after in pairwise(seen))


def test_windows_that_disagree_are_faded_into_each_other() -> None:
    """Each window returns its own number: the result changes between frames by no more than a ramp's step."""
    calls: list[int] = []

    def velocity(part_latents, timestep, part):  # type: ignore[no-untyped-def]
        calls.append(int(part[1]))
        return torch.full_like(part_latents, float(len(calls)))

    found = windows.joined(velocity, 13, 4)(torch.zeros(1, 1, 37, 1, 1), torch.zeros(1)).flatten()
    assert calls == [1, 9, 17, 25]
    assert float(found[0]) == 1.0
    assert float(found[-1]) == 4.0
    assert float(found.diff().max()) == pytest.approx(1 / 5, abs=1e-6)
    assert float(found.diff().min()) >= 0


def test_an_overlap_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="window_overlap"):
        windows.parts(20, 5, 4)
