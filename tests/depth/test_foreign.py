"""Depth from a worker in another Python: clips succeed, and every kind of failure rejects only one clip."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ex4d.depth import DepthRequest, estimate, foreign
from ex4d.errors import BadSample, ConfigError

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 20, 3), np.uint8)
ADAPTER = """
import os, sys, time
import numpy as np

def load(options):
    print("a library that prints")
    return {"served": 0}

def estimate(model, frames):
    model["served"] += 1
    how = frames[0, 0, 0, 0]
    z = 1.0 + frames[..., 0].astype(np.float32)
    if how == 1: os.kill(os.getpid(), 9)
    if how == 2: time.sleep(60)
    if how == 3: raise MemoryError("out of memory")
    if how == 4: z = z[:, :4]
    if how == 5: os.write(3, b"\\x00garbage\\n"); os.close(3); time.sleep(60)
    if how == 6: return {"values": z, "kind": "ray"}
    if how == 8 or "lost" in model:
        model["lost"] = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    w2c = np.tile(np.eye(4), (len(frames), 1, 1))
    w2c[:, 0, 3] = np.arange(len(frames))
    K = np.array([[20.0, 0, 10], [0, 20, 8], [0, 0, 1]])
    return {"values": z, "kind": "z_depth", "w2c": w2c, "K": K}
"""


@pytest.fixture(autouse=True)
def none_left(monkeypatch):
    monkeypatch.setattr(foreign, "CLIP_S", 5.0)
    yield
    foreign.release()
    assert not workers_left()


def workers_left() -> list[str]:
    """Return the command lines of this process's workers that are still running."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"PPid:\t{os.getpid()}\n" in status.read_text():
                found.append(status.with_name("cmdline").read_text())
    return [line for line in found if "foreign_worker.py" in line]


@pytest.fixture
def request_of(tmp_path):
    (tmp_path / "mine.py").write_text(ADAPTER)
    return DepthRequest(depth_path=str(tmp_path / "mine.py"), python=sys.executable)


def clip(how: int) -> np.ndarray:
    frames = FRAMES.copy()
    frames[0, 0, 0, 0] = how
    return frames


def test_clips_are_served_by_one_process(request_of):
    for how in range(10, 16):
        result = estimate("own", clip(how), request_of)
        np.testing.assert_array_equal(result.values, 1.0 + clip(how)[..., 0])
        assert result.values[0, 0, 0] == how + 1
    np.testing.assert_allclose(result.w2c[2, 0, 3], 2)
    assert result.provenance["estimator"] == "own"
    assert len(foreign._workers) == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (1, "depth_worker_died"),
        (2, "depth_worker_timeout"),
        (3, "depth_worker_error"),
        (4, "depth_worker_answer"),
        (5, "depth_worker_answer"),
        (6, "depth_worker_answer"),
    ],
)
def test_a_failure_costs_one_clip(request_of, how: int, reason: str):
    estimate("own", clip(9), request_of)
    started = time.monotonic()
    with pytest.raises(BadSample) as caught:
        estimate("own", clip(how), request_of)
    assert caught.value.reason == reason
    assert time.monotonic() - started < 30
    assert estimate("own", clip(9), request_of).values[0, 0, 0] == 10


def test_an_error_of_the_gpu_costs_one_clip(request_of):
    """After such an error every CUDA call of a process fails, so that another process must serve the next clip."""
    estimate("own", clip(9), request_of)
    for _ in range(2):
        with pytest.raises(BadSample, match="illegal memory access"):
            estimate("own", clip(8), request_of)
        assert estimate("own", clip(9), request_of).values[0, 0, 0] == 10


def test_a_worker_sees_the_same_gpus_and_no_secret(tmp_path, request_of, monkeypatch):
    writes = f"    open({str(tmp_path / 'names')!r}, 'w').write(' '.join(os.environ))\n    how = frames"
    adapter = ADAPTER.replace("    how = frames", writes)
    (tmp_path / "mine.py").write_text(adapter)
    gpus = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "OMP_NUM_THREADS": "1"}
    for name, value in {**gpus, "WANDB_API_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    estimate("own", clip(9), request_of)
    names = (tmp_path / "names").read_text().split()
    assert set(gpus) <= set(names)
    assert "WANDB_API_KEY" not in names


def reply(arrays: object, body: bytes = b"", **more: object) -> bytes:
    return json.dumps({"arrays": arrays, "kind": "z_depth", **more}).encode() + b"\n" + body


VALUES = (1.0 + FRAMES[..., 0]).astype("<f4").tobytes()
HOSTILE = {
    "a list": b"[]\n",
    "a text": b'"arrays"\n',
    "nested without end": b"[" * 60_000 + b"\n",
    "a huge number": b'{"arrays": ' + b"9" * 60_000 + b"}\n",
    "no lists": reply(5),
    "exabytes": reply([["values", "<f4", [2**31, 2**31]]]),
    "more than the clip can have": reply([["values", "<f8", [3, 16, 20, 200]]]),
    "many of them": reply([[f"a{i}", "<f8", [3, 16, 20]] for i in range(500)]),
    "negative sides": reply([["values", "<f4", [-3, -16, 20]]]),
    "objects": reply([["values", "O", [3, 16, 20]]], VALUES),
    "a structure": reply([["values", {"names": ["a"], "formats": ["f4"]}, [3, 16, 20]]], VALUES),
    "kind is a list": reply([["values", "<f4", [3, 16, 20]]], VALUES, kind=["z_depth"]),
    "not finite": reply([["values", "<f4", [3, 16, 20]]], np.full((3, 16, 20), np.nan, "<f4").tobytes()),
    "cameras that are none": reply([["values", "<f4", [3, 16, 20]], ["w2c", "<f8", [3, 4, 4]]], VALUES + bytes(384)),
    "a lens that is none": reply([["values", "<f4", [3, 16, 20]], ["K", "<f8", [3, 3]]], VALUES + bytes(72)),
    "an error of megabytes": reply([], error=[1] * 20_000),
    "an error that is no text": reply([], error={"\ud800": "\x1b[31m"}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_worker_that_was_taken_over_costs_its_clip(tmp_path, request_of, what: str):
    """Malformed answers of every kind are rejected with little memory, and the next clip is processed."""
    (tmp_path / "reply").write_bytes(HOSTILE[what])
    adapter = ADAPTER.replace(
        "    z = 1.0", f"    if how == 7: os.write(3, open({str(tmp_path / 'reply')!r}, 'rb').read())\n    z = 1.0"
    )
    (tmp_path / "mine.py").write_text(adapter)
    tracemalloc.start()
    with pytest.raises(BadSample) as caught:
        estimate("own", clip(7), request_of)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.reason.startswith("depth_")
    assert len(str(caught.value)) < 5000
    assert peak < 4 << 20


def test_what_cannot_start_is_a_wrong_choice(tmp_path, request_of):
    import dataclasses

    for python in (None, str(tmp_path / "no_python"), "/bin/false"):
        with pytest.raises(ConfigError, match="depth_python"):
            estimate("own", FRAMES, dataclasses.replace(request_of, python=python))
    (tmp_path / "mine.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(ConfigError, match="a_package_that_is_not_there"):
        estimate("own", FRAMES, request_of)
    with pytest.raises(ConfigError, match="depth_path"):
        estimate("own", FRAMES, dataclasses.replace(request_of, depth_path=None))


@pytest.mark.heavy
def test_an_environment_of_contradicting_pins_serves_a_hundred_clips(tmp_path, request_of):
    import dataclasses
    import subprocess
    import venv

    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "numpy<2"], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        pytest.skip(f"no numpy<2 to be had: {done.stderr[-200:]}")
    asked = dataclasses.replace(request_of, python=python)
    for index in range(100):
        assert estimate("own", clip(10 + index), asked).values[0, 0, 0] == 11 + index
    assert len(foreign._workers) == 1
