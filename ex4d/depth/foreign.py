"""Run a depth network in a worker with a separate Python environment, whose pins conflict with ours, over pipes.

The worker (`foreign_worker`, whose docstring is the protocol) loads the network once and serves clip after clip. If it
times out, dies or sends an unreadable answer, only that clip is rejected, and a new worker starts for the next clip.
The worker ends with this process, because the kernel closes its pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ex4d import hub
from ex4d.config import fingerprint
from ex4d.depth import DepthRequest, Geometry
from ex4d.errors import BadSample, ConfigError

ADAPTERS = Path(__file__).with_name("adapters")
OWN = "own"  # the estimator whose adapter is the user's own file
START_S, CLIP_S = 600.0, 900.0  # time limits: loading weights from a slow disk; a long clip on a CPU
MAX_VALUE_BYTES = 16  # of an answer for each pixel: values and confidence in float64
SMALL_BYTES = 2**20  # of K and cameras
MAX_LINE = 2**16
MAX_ERROR = 4000  # characters
KINDS = ("z_depth", "disparity")
# The only environment variables that reach the worker: those for GPUs, libraries and caches, no keys or tokens. The
# numbers in CUDA_VISIBLE_DEVICES mean other GPUs in another CUDA_DEVICE_ORDER.
ENVIRONMENT = (
    *("HOME", "LANG", "LC_ALL", "PATH", "LD_LIBRARY_PATH", "TMPDIR", "TZ", "OMP_NUM_THREADS"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_MPS_PIPE_DIRECTORY"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_HOME", "XDG_CACHE_HOME"),
)
CUDA = "CUDA"  # in an error: after most of them a process cannot use its GPU any more


def estimate(frames: np.ndarray, request: DepthRequest, name: str) -> Geometry:
    """Estimate the depth of the frames by the adapter `name`; arguments and errors as in `depth.estimate`.

    Raises:
        ConfigError: depth_python is not set, it or the adapter is missing, or the network does not load.
        BadSample: depth_worker_timeout, depth_worker_died, depth_worker_answer, depth_worker_error.
    """
    python, adapter, weights = _paths(request, name)
    options = {"weights": weights, "device": request.device, "batch_size": request.batch_size}
    num_bytes = MAX_VALUE_BYTES * frames.size // 3 + SMALL_BYTES
    message, arrays = ask(python, adapter, options, {"frames": frames}, num_bytes)
    if "error" in message:  # an error of the adapter itself: the worker keeps running, unless CUDA was its cause
        raise BadSample("depth_worker_error", str(message["error"])[:MAX_ERROR])
    return _geometry(message, arrays, frames.shape[:3], {"estimator": name, "adapter": hub.file_sha256(Path(adapter))})


def ask(
    python: str, adapter: str, options: dict[str, Any], arrays: dict[str, np.ndarray], max_bytes: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Call an adapter, starting its worker if needed; return (message, arrays), with `error` in message if it raised.

    Args:
        max_bytes: of the answer's arrays.

    Raises:
        ConfigError: the worker does not start. BadSample: depth_worker_timeout, depth_worker_died, depth_worker_answer.
    """
    with _LOCK:
        key = (python, adapter, json.dumps(options))
        worker = _workers.get(key)
        if worker is None or worker.process.poll() is not None:
            worker = _workers[key] = _Worker(python, adapter, options)
        try:
            answer = worker.call({}, arrays, CLIP_S, max_bytes)
        except BaseException:
            worker.kill()
            raise
        if CUDA in str(answer[0].get("error", "")):
            worker.kill()  # and the next call starts another
        return answer


def identity(name: str, depth_path: str | None) -> str:
    """Return a fingerprint of an adapter and its weights: content hashes, or the hub id."""
    adapter, weights = _adapter(name, depth_path), depth_path or ""
    if name != OWN and Path(weights).is_file():
        weights = hub.file_sha256(Path(weights))
    elif name != OWN and weights and Path(weights).is_dir():
        weights = hub.fingerprint([Path(weights)])
    return fingerprint(name, hub.file_sha256(adapter), "" if name == OWN else weights)


def _adapter(name: str, depth_path: str | None) -> Path:
    if name != OWN:
        return ADAPTERS / f"{name.replace('-', '_')}.py"
    if depth_path is None or not Path(depth_path).is_file():
        raise ConfigError("depth_path", depth_path, "must be your adapter file NAME.py with depth=own")
    return Path(depth_path).resolve()


def _paths(request: DepthRequest, name: str) -> tuple[str, str, str | None]:
    python = request.python
    if python is None or not os.access(python, os.X_OK):
        raise ConfigError("depth_python", python, f"must be the Python executable of an environment for depth={name}")
    return python, str(_adapter(name, request.depth_path)), None if name == OWN else request.depth_path


def _geometry(
    message: dict[str, Any], arrays: dict[str, np.ndarray], shape: tuple[int, ...], facts: dict[str, Any]
) -> Geometry:
    """Check the names, shapes and poses of an answer; `depth.check` checks the values."""
    expected = {"values": shape, "confidence": shape, "K": (3, 3), "w2c": (shape[0], 4, 4)}
    for key, array in arrays.items():
        if key not in expected or array.shape != tuple(expected[key]):
            raise BadSample("depth_worker_answer", f"{key[:40]} is {list(array.shape)}, not {expected.get(key)}")
    if "values" not in arrays or message.get("kind") not in KINDS:
        raise BadSample("depth_worker_answer", f"it has no values, or its kind is not one of {', '.join(KINDS)}")
    K, w2c = (arrays[key].astype(np.float64) if key in arrays else None for key in ("K", "w2c"))
    if w2c is not None:
        from ex4d.geometry.camera import invert, nearest_rigid
        from ex4d.geometry.pose_file import check_poses

        try:
            check_poses(w2c)
        except ValueError as error:
            raise BadSample("depth_worker_answer", f"w2c: {error}") from None
        w2c = nearest_rigid(w2c)
        w2c = w2c @ invert(w2c[0])
    confidence = arrays["confidence"].astype(np.float32) if "confidence" in arrays else None
    values = arrays["values"].astype(np.float32)
    return Geometry(values, message["kind"], K, bool(message.get("metric")), facts, w2c, confidence)


class _Worker:
    """One process of a foreign Python, with its network loaded."""

    def __init__(self, python: str, adapter: str, options: dict[str, Any]):
        environment = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
        self.process = subprocess.Popen(
            [python, "-I", str(Path(__file__).with_name("foreign_worker.py")), adapter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            message, _ = self.call({"options": options}, {}, START_S)
        except BadSample as error:
            self.kill()
            raise ConfigError("depth_python", python, f"its worker did not start: {error}") from None
        if "error" in message:
            self.kill()
            raise ConfigError(
                "depth_python", python, f"{Path(adapter).name} did not load: {str(message['error'])[:MAX_ERROR]}"
            )

    def call(
        self, message: dict[str, Any], arrays: dict[str, np.ndarray], limit_s: float, max_bytes: int = 0
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Send a message; return the worker's answer, with at most `max_bytes` of arrays.

        After a BadSample the worker must be replaced.
        """
        deadline = time.monotonic() + limit_s
        heads = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
        line = json.dumps({**message, "arrays": heads}).encode() + b"\n"
        parts = [line, *(np.ascontiguousarray(array).tobytes() for array in arrays.values())]
        # Write in a thread while reading, so that a worker that dies or answers early does not block us.
        writer = threading.Thread(target=self._write, args=(parts,), daemon=True)
        writer.start()
        try:
            return self._receive(deadline, max_bytes)
        finally:
            if self.process.poll() is not None:
                writer.join(timeout=1)

    def _write(self, parts: list[bytes]) -> None:
        assert self.process.stdin is not None
        try:
            for part in parts:
                self.process.stdin.write(part)
            self.process.stdin.flush()
        except (OSError, ValueError):  # the worker died; the reader reports it
            return

    def _receive(self, deadline: float, max_bytes: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            line = bytearray()
            while not line.endswith(b"\n"):
                if len(line) > MAX_LINE:
                    raise ValueError("a line without an end")
                line += self._read(1, deadline)
            message = json.loads(line)
            arrays, total = {}, 0
            for name, kind, shape in message["arrays"]:
                dtype = np.dtype(kind)
                if dtype.kind not in "fiu" or not all(type(side) is int and side > 0 for side in shape):
                    raise ValueError(f"an array of {kind} {shape}")
                total += math.prod(shape) * dtype.itemsize
                if total > max_bytes:
                    raise ValueError(f"an answer of {total} bytes where {max_bytes} are allowed")
                arrays[str(name)] = np.frombuffer(self._read(math.prod(shape) * dtype.itemsize, deadline), dtype)
                arrays[str(name)] = arrays[str(name)].reshape(shape)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadSample("depth_worker_answer", f"the worker's answer cannot be read: {error}"[:300]) from None
        return message, arrays

    def _read(self, num_bytes: int, deadline: float) -> bytearray:
        """Read exactly `num_bytes` of the answer."""
        assert self.process.stdout is not None
        pipe, data = self.process.stdout.fileno(), bytearray()
        while len(data) < num_bytes:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise BadSample("depth_worker_timeout", "the worker took too long")
            chunk = os.read(pipe, min(num_bytes - len(data), 1 << 20))
            if not chunk:
                status = self.process.wait()
                how = f"signal {-status}" if status < 0 else f"exit code {status}"
                raise BadSample("depth_worker_died", f"the worker died of {how}")
            data += chunk
        return data

    def kill(self) -> None:
        """Kill the worker and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # frames that a dead worker did not read
                if pipe is not None:
                    pipe.close()


_workers: dict[tuple[str, str, str], _Worker] = {}
_LOCK = threading.Lock()


@atexit.register
def release() -> None:
    """Kill all workers, which frees the memory of their networks."""
    while _workers:
        _workers.popitem()[1].kill()
