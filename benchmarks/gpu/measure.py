"""Run one of two measurements on a GPU machine without a network: install wheels, run the rows, print the table.

    python3 benchmarks/gpu/measure.py steps  --output "$OUT"    training steps of 14B, by how its base is stored and run
    python3 benchmarks/gpu/measure.py system --output "$OUT"    the real trainer, the renderer, masks, VAE, generation

The wheels of benchmarks/gpu/wheels (from collect.py) are installed into a separate folder, on top of the machine's
PyTorch. Each run ends within --budget seconds and appends rows to OUTPUT/rows.jsonl as they finish. --size tiny
rehearses both on a CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPTS = {"steps": HERE.parent / "train_14b.py", "system": HERE / "system.py"}


def install(site: Path) -> None:
    """Install the wheels into `site`, without network access."""
    wheels = sorted((HERE / "wheels").glob("*.whl"))
    if not wheels:
        sys.exit("benchmarks/gpu/wheels is empty: python benchmarks/gpu/collect.py, on a machine with a network")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--upgrade", "--target", str(site)]
    subprocess.run([*command, *map(str, wheels)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=SCRIPTS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=570.0, help="seconds in all (570)")
    parser.add_argument("--site", type=Path, default=Path(tempfile.gettempdir()) / "ex4d-site", help="for the wheels")
    arguments, more = parser.parse_known_args()
    start = time.monotonic()
    install(arguments.site)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{arguments.site}", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment["EX4D_SITE"] = str(arguments.site)  # where a row installs packages that it builds
    left = arguments.budget - (time.monotonic() - start)
    command = [sys.executable, str(SCRIPTS[arguments.run]), "--output", str(arguments.output), "--budget", str(left)]
    # Replace this process, so that a signal reaches the process that runs the rows.
    os.execvpe(sys.executable, [*command, *more], environment)


if __name__ == "__main__":
    main()
