"""The checks of `ex4d doctor --cluster` on one node. Each check yields findings; `look` turns errors into findings."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from ex4d import video
from ex4d.config import installed_versions

OWN = "ex4d-platform"
COMPARED = ("ray", "torch", OWN)
DECODERS = ("h264", "hevc", "vp9", "av1")
PROBE_BYTES = 4 << 20


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Args:
        ok: None for a plain fact, or for a warning, which `remedy` explains.
    """

    check: str
    found: str
    ok: bool | None = True
    remedy: str = ""


@dataclass(frozen=True)
class Asked:
    """The input of a node's checks.

    Args:
        versions: {package: version} on the driver, with a hash of this project's code as "code".
        storage: local folders that all nodes share. weights: base models, folders or hub ids.
        min_disk_gb: free space that each disk must have. gpus: number of the node's GPUs according to Ray.
    """

    versions: dict[str, str]
    storage: tuple[str, ...]
    weights: tuple[str, ...]
    min_disk_gb: float
    gpus: int


def look(asked: Asked) -> list[Finding]:
    """Run every check on this node and return the findings."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check(asked)
        except (ImportError, OSError, ValueError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
            name, reason = check.__name__.strip("_"), str(error).strip().split("\n")[0]
            remedy = "the environment of this node is broken: install ex4d there again, or use one image for all nodes"
            findings.append(Finding(name, f"{type(error).__name__}: {reason}", False, remedy))
    return findings


def _versions(asked: Asked) -> Iterator[Finding]:
    remedy = "install the same versions on all nodes: one image, or one environment on shared storage"
    here = versions()
    for name, wanted in asked.versions.items():
        version = here.get(name, "not installed")
        yield Finding(
            f"version of {name}", version, version == wanted, "" if version == wanted else f"{remedy}: {wanted}"
        )


def _torch(asked: Asked) -> Iterator[Finding]:
    """Check that PyTorch has an allowed version and, on a node with GPUs, was built with CUDA."""
    from packaging.requirements import Requirement

    known = [Requirement(line) for line in metadata.requires(OWN) or ()]
    allowed = next(one.specifier for one in known if one.name == "torch")
    installed = metadata.version("torch")
    if not allowed.contains(installed, prereleases=True):
        yield Finding("torch", installed, False, f"install torch {allowed}")
        return
    import torch

    if asked.gpus and torch.version.cuda is None:
        yield Finding("torch", f"{torch.__version__}, without CUDA", False, "install the CUDA build of PyTorch")
        return
    yield Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda}" if asked.gpus else torch.__version__)


def _gpus(asked: Asked) -> Iterator[Finding]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    program = shutil.which("nvidia-smi")
    driver = "none"
    if program:
        words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=15, check=False)
        driver = done.stdout.strip().split("\n")[0] or f"nvidia-smi ended with {done.returncode}"
    is_good = len(names) >= asked.gpus
    text = f"{', '.join(names) or 'none'}; driver {driver}"
    remedy = "" if is_good else f"Ray counts {asked.gpus} GPUs, PyTorch sees {len(names)}: check driver and container"
    yield Finding("GPUs", text, is_good if asked.gpus else None, remedy)


def _attention(asked: Asked) -> Iterator[Finding]:
    import torch

    from ex4d.models.attention import kernel_that_runs

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    name = kernel_that_runs(device, dtype, num_tokens=256)
    is_slow = device == "cuda" and name.startswith("math")
    remedy = "no fused kernel runs: check that one cuDNN is installed, or set train.attention" if is_slow else ""
    yield Finding(f"attention on {device}", name, not is_slow, remedy)


def video_works() -> bool:
    """Return True if the installed FFmpeg can write a video and read it back, which every shard needs."""
    if importlib.util.find_spec("av") is None:
        return False
    import numpy as np

    frames = np.full((3, 32, 32, 3), 128, np.uint8)
    shown, _ = video.read(video.encode(frames, 8.0))
    return shown.shape == frames.shape and int(np.abs(shown.astype(int) - 128).max()) <= 4


def _codecs(asked: Asked) -> Iterator[Finding]:
    remedy = "install PyAV from its wheel (pip install --force-reinstall av), which brings its codecs"
    try:
        works = video_works()
        yield Finding("H.264 round trip", "works" if works else "fails", works, "" if works else remedy)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        yield Finding("H.264 round trip", f"fails: {error}", False, remedy)
    missing = video.missing_decoders(DECODERS)
    text = f"{', '.join(missing)} missing" if missing else ", ".join(DECODERS)
    yield Finding("decoders", text, not missing, remedy if missing else "")


def _disks(asked: Asked) -> Iterator[Finding]:
    for folder in dict.fromkeys((tempfile.gettempdir(), *asked.storage)):
        if not os.path.isdir(folder):
            continue  # `_storage` reports it
        free_gb = shutil.disk_usage(folder).free / 2**30
        problem = _write_problem(folder)
        is_good = not problem and free_gb >= asked.min_disk_gb
        remedy = f"free at least {asked.min_disk_gb:g} GB there, or set TMPDIR or the output to another disk"
        text = f"{free_gb:.1f} GB free" + (f"; {problem}" if problem else "")
        yield Finding(f"disk of {folder}", text, is_good, "" if is_good else remedy)


def _write_problem(folder: str) -> str:
    """Return why some megabytes cannot be written into a folder; "" if they can."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".ex4d-doctor-") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot be written to: {error.strerror}"
    return ""


def _weights(asked: Asked) -> Iterator[Finding]:
    from huggingface_hub import constants

    for name in asked.weights:
        hub_id = name.partition("@")[0]
        cached = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
        is_here = hub_id == "tiny" or os.path.isdir(name) or (cached.is_dir() and any(cached.iterdir()))
        remedy = f"hf download {hub_id}, or a folder on shared storage as model.base" if not is_here else ""
        yield Finding(f"weights {name}", "here" if is_here else "missing", is_here, remedy)


def _wandb(asked: Asked) -> Iterator[Finding]:
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = url.hostname or "api.wandb.ai", url.port or (443 if url.scheme == "https" else 80)
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    key = "key set" if has_key else "no key"
    try:
        with socket.create_connection((host, port), timeout=3):
            yield Finding("W&B", f"{host} answers; {key}", True if has_key else None)
    except OSError as error:
        remedy = "runs are kept offline; allow connections to it, or set train.wandb_mode=offline"
        yield Finding("W&B", f"{host} cannot be reached ({error}); {key}", not has_key and None, remedy)


def _sandbox(asked: Asked) -> Iterator[Finding]:
    from ex4d.isolation import sandbox

    lacks = "; ".join(sandbox.missing())
    yield Finding("sandbox", f"lacks {lacks}" if lacks else "complete", None)


CHECKS: tuple[Callable[[Asked], Iterator[Finding]], ...] = (
    *(_versions, _torch, _gpus, _attention, _codecs, _disks, _weights, _wandb, _sandbox),
)


def now() -> float:
    """Return the time by this node's clock."""
    return time.time()


@cache
def versions() -> dict[str, str]:
    """Return {package: version} of what must be equal on all nodes; "code" is a hash of this project's own files."""
    packages = installed_versions(COMPARED) | {"python": platform.python_version()}
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted((*root.glob("ex4d/**/*.py"), *root.glob("pipelines/**/*.py"))):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return packages | {"code": digest.hexdigest()[:12]}
