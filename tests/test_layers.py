"""The import rules of docs/architecture.md, checked against the code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

ROOT = Path(__file__).resolve().parent.parent

# A module may import its own package and the packages listed for it.
FLOOR = {"errors", "config", "isolation", "redact", "remote", "storage", "hub", "text", "video", "web", "metrics"}
FLOOR |= {"compiled", "npy", "threads"}
LEAVES = {"geometry", "depth", "data", "models", "flow", "synthetic", "quality"}
MAY_IMPORT = {
    "compiled": set(),
    "errors": {"redact"},
    "config": {"errors", "redact", "storage", "text"},
    "redact": set(),
    "remote": {"redact", "web"},
    "storage": {"errors", "remote", "threads", "web"},
    "hub": {"errors"},
    "isolation": {"errors"},
    "text": set(),
    "web": set(),
    "metrics": {"errors"},
    "npy": set(),
    "threads": set(),
    "video": {"errors", "config", "storage", "text"},
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
    "fsspec": ("ex4d/storage/urls.py",),
    "yaml": ("ex4d/config.py",),
    "jinja2": ("ex4d/viewer/html.py",),
    "deepspeed": ("ex4d/train/engine.py",),
    "wandb": ("ex4d/train/runlog.py",),
    "peft": ("ex4d/models/lora.py",),
    "diffusers": ("ex4d/models/", "ex4d/depth/"),
    "transformers": ("ex4d/models/", "ex4d/depth/"),
    "nvdiffrast": ("ex4d/geometry/render/nvdiffrast.py",),
    "numba": ("ex4d/compiled.py", "ex4d/geometry/"),
    "pycolmap": ("ex4d/depth/adapters/",),
    "ray": ("pipelines/",),
    "argparse": ("pipelines/cli.py", "pipelines/commands/"),
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


def _reached(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of this repository that a file imports, at its top or inside a function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    ignored = {id(below) for block in only_types for below in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return found & modules


def _graph(root: Path) -> dict[str, set[str]]:
    """Return {module: the modules it imports}, over both packages below `root`."""
    paths = [*root.glob("ex4d/**/*.py"), *root.glob("pipelines/**/*.py")]
    names = {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    return {name: _reached(path, set(names)) - {name} for name, path in names.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return each import cycle as a group of modules, lazy imports included."""
    names = sorted(graph)
    index = {name: number for number, name in enumerate(names)}
    edges = [(index[a], index[b]) for a, others in graph.items() for b in others]
    matrix = coo_matrix(([True] * len(edges), tuple(zip(*edges, strict=True))), shape=(len(names), len(names)))
    _, label = connected_components(matrix, directed=True, connection="strong")
    groups: dict[int, list[str]] = {}
    for name, group in zip(names, label, strict=True):
        groups.setdefault(int(group), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


JOBS = {"preprocess", "encode", "evaluate", "train"}
BELOW_JOBS = {"runtime", "inputs"}


def crossings(graph: dict[str, set[str]]) -> list[str]:
    """Return each import between packages of `pipelines` that the rules forbid."""
    wrong = []
    for name, others in graph.items():
        is_entry = name.endswith(".__main__")  # another entry point of the command line
        room = name.split(".")[1] if name.startswith("pipelines.") and not is_entry else ""
        for other in (o for o in others if o.startswith("pipelines.") and room):
            there = other.split(".")[1]
            upward = room in BELOW_JOBS and there not in BELOW_JOBS
            sideways = room in JOBS and there not in {room, *BELOW_JOBS}
            to_the_top = room == "commands" and there == "cli"
            if upward or sideways or to_the_top:
                wrong.append(f"{name} imports {other}")
    return wrong


def test_no_module_imports_itself_in_a_circle():
    assert not circles(_graph(ROOT))


def test_jobs_do_not_know_each_other_and_nothing_imports_upward():
    assert not crossings(_graph(ROOT))


@pytest.mark.parametrize(
    ("path", "line", "finds"),
    [
        ("pipelines/runtime/ledger.py", "from pipelines.preprocess import settings", crossings),
        ("pipelines/encode/job.py", "from pipelines.train import launch", crossings),
        ("ex4d/errors.py", "def late():\n    from ex4d.config import load", circles),
    ],
)
def test_a_planted_import_is_found(tmp_path, path, line, finds):
    for source in _sources():
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    assert not finds(_graph(tmp_path))
    with open(tmp_path / path, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert finds(_graph(tmp_path))


@pytest.mark.parametrize(
    "path", ["pipelines/cli.py", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("pipelines/commands/*.py"))]
)
def test_commands_import_jobs_inside_functions_only(path):
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    at_the_top = [node.module for node in body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in at_the_top if name.split(".")[:2] in [["pipelines", job] for job in JOBS]]


def test_the_command_line_imports_nothing_heavy():
    heavy = ["torch", "ray", "diffusers", "transformers", "deepspeed", "wandb", "av", "cv2", "numba", "peft", "pandas"]
    code = f"""import sys, pipelines.cli as cli
for name in cli.COMMANDS:
    cli.command_parser(name)
print([module for module in {heavy!r} if module in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in _sources() if (n := len(p.read_text().splitlines())) > 400}
    assert not long
