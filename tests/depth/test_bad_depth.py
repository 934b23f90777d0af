"""Invalid depth raises BadSample with a reason, whichever network returned it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_svd
from test_transformers import MAKERS, pictures, save

from ex4d.depth import ESTIMATORS, DepthRequest, depthcrafter, estimate, transformers
from ex4d.errors import BadSample

SIZE = (40, 56)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    import torch

    torch.manual_seed(0)
    paths = {name: save(tmp_path_factory.mktemp(name), maker()) for name, maker in MAKERS.items()}
    return {**paths, "depthcrafter": tiny_svd.save(tmp_path_factory.mktemp("svd"))}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, *SIZE), np.uint8),
        np.zeros((2, *SIZE, 4), np.uint8),
        np.zeros((0, *SIZE, 3), np.uint8),
        np.zeros((2, 0, 56, 3), np.uint8),
        np.zeros((2, *SIZE, 3), np.float32),
    ],
    ids=["grey", "rgba", "no frames", "no rows", "float"],
)
def test_frames_that_are_no_frames(name, frames):
    with pytest.raises(BadSample) as caught:
        estimate(name, frames, DepthRequest())
    assert caught.value.reason == "depth_shape"


RAMP = np.linspace(0.2, 0.9, 3 * SIZE[0] * SIZE[1], dtype=np.float32).reshape(3, *SIZE)
SPOILT = RAMP.copy()
SPOILT[1, 3, 4] = np.nan
ENDLESS = RAMP.copy()
ENDLESS[2, 0, 0] = np.inf
NEGATIVE = RAMP.copy()
NEGATIVE[0, 5, 5] = -0.1
ZERO = RAMP.copy()
ZERO[0, 5, 5] = 0
FAULTS = {
    "nan": (SPOILT, "depth_nan"),
    "inf": (ENDLESS, "depth_nan"),
    "all equal": (np.full_like(RAMP, 0.5), "depth_constant"),
    "a frame too few": (RAMP[:2], "depth_shape"),
    "another size": (RAMP[:, :-1], "depth_shape"),
}
NOTHING = np.zeros_like(RAMP)
CASES = [
    *((name, fault, *FAULTS[fault]) for name in (*MAKERS, "depthcrafter") for fault in FAULTS),
    # Depth Pro and the relative networks return disparity, where zero is infinity; DepthCrafter's is clipped to [0, 1].
    *((name, "negative", NEGATIVE, "depth_nonpositive") for name in MAKERS),
    *((name, "all zero", NOTHING, "depth_constant") for name in ("depth-anything-v2", "depth-pro", "depthcrafter")),
    ("zoedepth", "zero", ZERO, "depth_nonpositive"),
]


@pytest.mark.parametrize(("name", "fault", "values", "reason"), CASES, ids=[f"{case[0]}, {case[1]}" for case in CASES])
def test_what_a_network_may_not_say(weights, monkeypatch, name, fault, values, reason):
    """The checkpoint is loaded as usual, and its output is replaced."""
    spoken = iter([values[index : index + 1] for index in range(len(values))])

    def one_frame(model, settings, frames, device):
        return next(spoken, np.zeros((0, *values.shape[1:]), np.float32)), np.array([50.0])

    monkeypatch.setattr(transformers, "_run", one_frame)
    monkeypatch.setattr(depthcrafter, "denoise", lambda networks, latents, embeddings, noise: latents)
    monkeypatch.setattr(depthcrafter, "decode", lambda networks, latents, size: values)
    with pytest.raises(BadSample) as caught:
        estimate(name, pictures(3, SIZE), DepthRequest(depth_path=weights[name]))
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", [*MAKERS, "depthcrafter"])
def test_what_it_may_say_passes(weights, monkeypatch, name):
    """The same code path with good values passes: the rejections above are due to the values."""
    spoken = iter(RAMP[:, None])
    monkeypatch.setattr(transformers, "_run", lambda *_: (next(spoken), np.array([50.0])))
    monkeypatch.setattr(depthcrafter, "denoise", lambda networks, latents, embeddings, noise: latents)
    monkeypatch.setattr(depthcrafter, "decode", lambda networks, latents, size: RAMP)
    assert estimate(name, pictures(3, SIZE), DepthRequest(depth_path=weights[name])).values.shape == RAMP.shape
