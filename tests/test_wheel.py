"""A built wheel works in a fresh environment and an empty folder, without files that only a checkout has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.heavy

SMALL = {
    "synthetic": {"num_videos": 4, "num_frames": 5, "size": [32, 32]},
    "preprocess": {"num_frames": 5, "size": [32, 32], "num_workers": 1},
    "model": {"lora_rank": 2, "lora_alpha": 2, "adapter_hidden": 16},
    "train": {"num_steps": 2, "save_every": 2, "micro_batch_size": 2, "warmup_steps": 1, "num_processes": 1},
    "generate": {"num_inference_steps": 1},
    "evaluate": {"num_scenes": 2, "methods": ["adapter", "warp"]},
}


def run(*argv: str | Path, cwd: Path) -> str:
    """Run a program without this process's PYTHONPATH, require status 0, and return its standard output."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in argv], cwd=cwd, env=kept, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def programs(root, tmp_path_factory) -> Path:
    """The bin folder of an environment that has the wheel, and every other package from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, since a build leaves folders behind
    for name in ("ex4d", "pipelines"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    run(sys.executable, "-m", "pip", *build, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # A plain path in a .pth file: .pth files in that folder, such as those of an editable ex4d, are not followed.
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import ex4d, pipelines; print(ex4d.__file__, pipelines.__file__)", cwd=folder)
    assert all(Path(path).is_relative_to(site) for path in where.split())
    return python.parent


def test_the_version_and_a_job_s_settings_are_printed(programs, tmp_path):
    assert run(programs / "ex4d", "--version", cwd=tmp_path).split()[-1][0].isdigit()
    assert "preprocess" in yaml.safe_load(run(programs / "ex4d", "config", "preprocess", cwd=tmp_path))


def test_the_demo_runs_in_an_empty_folder(programs, tmp_path):
    code = "from pipelines.commands import demo; print(open(demo.default_config(), encoding='utf-8').read())"
    settings = yaml.safe_load(run(programs / "python", "-c", code, cwd=tmp_path))
    for section, changes in SMALL.items():
        settings[section] |= changes
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings))
    run(programs / "ex4d", "demo", "--config", "small.yaml", cwd=tmp_path)
    assert (tmp_path / "out" / "demo" / "train" / "adapter").is_dir()
    assert list((tmp_path / "out" / "demo").rglob("*.html"))
