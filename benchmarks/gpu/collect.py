"""Collect wheels for a GPU machine without a network (Python 3.12, Linux, x86-64) in benchmarks/gpu/wheels.

    python benchmarks/gpu/collect.py                        wheels.txt, and DeepSpeed built without compiled operations
    python benchmarks/gpu/collect.py --av                   also PyAV (40 MB), to read video files
    python benchmarks/gpu/collect.py --nvdiffrast FOLDER    its source, from a clone of github.com/NVlabs/nvdiffrast

Neither folder is ever committed. nvdiffrast's licence restricts commercial use; read it first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A folder `nvdiffrast` beside the scripts would be found as that package.
WHEELS, NVDIFFRAST = HERE / "wheels", HERE / "nvdiffrast-source"
DEEPSPEED, AV = "deepspeed==0.19.8", "av==18.1.0"
# pip matches each of these tags exactly.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
MOST_BYTES = 60 * 2**20  # what may travel is 64 MiB, this repository included


def download(*what: str) -> None:
    """Download wheels for the GPU machine's Python, without dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(WHEELS)]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    subprocess.run([*command, *what], check=True)


def build_deepspeed() -> None:
    """Build DeepSpeed's wheel from source without compiled operations: the trainer needs none."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(WHEELS), DEEPSPEED]
    # No isolated build: setup.py imports torch, which this Python has and an isolated build would download.
    subprocess.run([*command, "--no-build-isolation"], check=True, env={**os.environ, "DS_BUILD_OPS": "0"})


def copy_nvdiffrast(clone: Path) -> None:
    """Copy nvdiffrast's source, without its history, samples and documentation."""
    shutil.rmtree(NVDIFFRAST, ignore_errors=True)
    NVDIFFRAST.mkdir()
    for name in ("csrc", "nvdiffrast"):
        shutil.copytree(clone / name, NVDIFFRAST / name)
    for name in ("setup.py", "pyproject.toml", "LICENSE.txt", "README.md", "MANIFEST.in"):
        if (clone / name).is_file():
            shutil.copy(clone / name, NVDIFFRAST / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--av", action="store_true")
    parser.add_argument("--nvdiffrast", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    shutil.rmtree(WHEELS, ignore_errors=True)  # two versions of one package would stop the installation
    WHEELS.mkdir()
    download("--requirement", str(HERE / "wheels.txt"), *([AV] if arguments.av else []))
    build_deepspeed()
    if arguments.nvdiffrast:
        copy_nvdiffrast(arguments.nvdiffrast)
    sizes = {file.name: file.stat().st_size for file in sorted(WHEELS.iterdir())}
    for name, size in sizes.items():
        print(f"{size / 1e6:6.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:6.1f} MB in all")
    if sum(sizes.values()) > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES / 1e6:.0f} MB: leave --av out")


if __name__ == "__main__":
    main()
