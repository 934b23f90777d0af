"""Who may import whom: the rules of docs/architecture.md, read off the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import its own room, and the rooms that are named for it.
FLOOR = {"errors", "config", "remote", "storage", "hub", "video"}
LEAVES = {"geometry", "depth", "data", "models", "flow", "synthetic", "quality"}
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors"},
    "remote": set(),
    "storage": {"errors", "remote"},
    "hub": {"errors"},
    "video": {"errors", "config", "storage"},
    "geometry": FLOOR,
    "depth": FLOOR | {"geometry"},
    "synthetic": FLOOR | {"geometry"},
    "quality": FLOOR | {"geometry"},
    "data": FLOOR,
    "models": FLOOR,
    "flow": FLOOR,
    "reconstruct": FLOOR | LEAVES,
    "generate": FLOOR | LEAVES | {"reconstruct"},
    "train": FLOOR | LEAVES | {"generate", "reconstruct"},
    "evaluate": FLOOR | LEAVES | {"generate", "reconstruct"},
    "viewer": FLOOR | LEAVES | {"generate", "reconstruct"},
}

# One gate for each heavy library: the only places that may import it.
GATES = {
    "av": ("ex4d/video",),
    "decord": ("ex4d/video",),
    "fsspec": ("ex4d/storage.py",),
    "yaml": ("ex4d/config.py",),
    "deepspeed": ("ex4d/train/engine.py",),
    "wandb": ("ex4d/train/runlog.py",),
    "peft": ("ex4d/models/lora.py",),
    "diffusers": ("ex4d/models/", "ex4d/depth/"),
    "transformers": ("ex4d/models/", "ex4d/depth/"),
    "nvdiffrast": ("ex4d/geometry/render/nvdiffrast.py",),
    "numba": ("ex4d/geometry/",),
    "ray": ("pipelines/",),
    "argparse": ("pipelines/cli.py", "pipelines/commands.py"),
}


def _sources() -> list[Path]:
    return sorted([*ROOT.glob("ex4d/**/*.py"), *ROOT.glob("pipelines/**/*.py")])


def _imports(path: Path) -> set[str]:
    """Return every absolute module name that a file imports, `from a import b` as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports absolutely"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _rooms(names: set[str]) -> set[str]:
    rooms = {name.split(".")[1].split("_")[0] for name in names if name.startswith("ex4d.")}
    known = FLOOR | set(MAY_IMPORT)
    return rooms & known


def test_rooms_import_downward_only():
    wrong = []
    for path in ROOT.glob("ex4d/**/*.py"):
        room = path.relative_to(ROOT / "ex4d").parts[0].removesuffix(".py").split("_")[0]
        if not room:  # ex4d/__init__.py
            continue
        assert room in MAY_IMPORT, f"{path}: a new room needs a line in MAY_IMPORT and in docs/architecture.md"
        wrong += [
            f"{path.relative_to(ROOT)} imports {other}" for other in _rooms(_imports(path)) - MAY_IMPORT[room] - {room}
        ]
    assert not wrong


def test_the_library_knows_no_jobs():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in ROOT.glob("ex4d/**/*.py")
        for name in _imports(path)
        if name.split(".")[0] in ("pipelines", "cluster", "ray")
    ]
    assert not wrong


@pytest.mark.parametrize("library", sorted(GATES))
def test_one_gate_for_each_heavy_library(library):
    wrong = [
        str(path.relative_to(ROOT))
        for path in _sources()
        if any(name == library or name.startswith(f"{library}.") for name in _imports(path))
        and not str(path.relative_to(ROOT)).startswith(GATES[library])
    ]
    assert not wrong


def test_the_command_line_imports_nothing_heavy():
    heavy = ["torch", "ray", "diffusers", "transformers", "deepspeed", "wandb", "av", "cv2", "numba", "peft", "pandas"]
    code = f"import sys, pipelines.cli as c; c.parser(); print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in _sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long
