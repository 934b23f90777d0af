"""The README is correct: its commands parse, its targets and files exist, and the essentials come first."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from ex4d import config
from ex4d.errors import ConfigError
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines import cli
from pipelines.commands.jobs import JOBS

ROOT = Path(__file__).resolve().parent.parent
DEVELOPERS = ("make check", "make test", "make bench")  # the tests themselves
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TO_FOLLOW = [ROOT / "README.md", ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
MADE = {"README.md": ["out/side.mp4"], "tutorial.md": ["out/tutorial/run/adapter/adapter.safetensors"]}


def _commands(page: Path) -> list[str]:
    """Return each line that starts a command of ours, in code blocks and in inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(ex4d [^`]+|make [a-z-]+)`", text)
    return [line.split("  #")[0].strip() for line in (*lines, *inline) if line.startswith(("ex4d ", "make "))]


def _is_template(command: str) -> bool:
    """Return True if a word has placeholders for the reader's choices (capitals or …)."""
    return "…" in command or bool(re.search(r"\b[A-Z]{2,}\b|[<\[]", command))


def _check(command: str) -> None:
    """Raise if a command would be rejected: its grammar, its configuration file, every override."""
    program, *arguments = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert arguments[0] in targets, command
    elif len(arguments) > 1 and not _is_template(command) and "--help" not in arguments:
        parsed = cli.parse(arguments)
        if parsed.command in JOBS and parsed.config.startswith("configs/"):
            sections = importlib.import_module(JOBS[parsed.command]).SECTIONS
            config.load(ROOT / parsed.config, sections, parsed.overrides)
    else:
        assert arguments[0] in (*cli.COMMANDS, "COMMAND", "--version", "--help"), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_valid_with_their_overrides(page):
    for command in _commands(page):
        _check(command)


def test_a_misspelt_setting_in_a_page_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nex4d preprocess configs/tiny.yaml preprocess.depht=parralax\n```\n")
    with pytest.raises(ConfigError, match=r"Did you mean preprocess\.depth=parallax\?"):
        _check(*_commands(page))


def _split(page: Path) -> tuple[list[str], list[str]]:
    """Return (commands in a page's code blocks that run anywhere, those marked `# needs …`)."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    ours = [
        line for line in lines if line.startswith(("ex4d ", "make ", ". ")) and not _is_template(line.split("#")[0])
    ]
    marked = [line.split("#")[0].strip() for line in ours if "# needs " in line]
    return [line for line in ours if "# needs " not in line and not line.startswith(DEVELOPERS)], marked


def _fresh_checkout(folder: Path) -> Path:
    """Return a copy of the repository with an environment of its own, as `make setup` leaves it, and two videos."""
    checkout = folder / "ex4d"
    unwanted = (".git", ".venv", "out", "build", "site", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*unwanted))
    venv.create(checkout / ".venv", symlinks=True)
    (packages,) = (checkout / ".venv" / "lib").glob("python*/site-packages")
    # The packages are those of this Python, so that no network is needed; the project is the copy.
    (packages / "checkout.pth").write_text(f"{checkout}\n{sysconfig.get_path('purelib')}\n")
    program = checkout / ".venv" / "bin" / "ex4d"
    program.write_text(f"#!{checkout}/.venv/bin/python\nimport sys\nfrom pipelines.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    (checkout / ".venv" / ".installed").touch()
    world = SyntheticConfig(num_videos=2, num_frames=24, size=(144, 256), fps=8.0)
    clip, *_ = write_corpus(checkout / "videos", world)
    for file in (checkout / "videos").glob(f"{clip.stem}.*"):  # the pages name one video, whose depth lies beside it
        file.rename(file.with_name(file.name.replace(clip.stem, "clip", 1)))
    return checkout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return _fresh_checkout(tmp_path_factory.mktemp("fresh"))


@pytest.mark.heavy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", TO_FOLLOW, ids=lambda page: page.stem)
def test_commands_that_need_nothing_special_run_as_written(checkout, page):
    """In the order of the pages, since the later ones use what README and tutorial made."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    run, marked = _split(checkout / page.relative_to(ROOT))
    trainings = [f"{line} train.dry_run=true" for line in marked if line.startswith("ex4d train ")]
    script = "\n".join(["set -euo pipefail", ". .venv/bin/activate", "set -x", *run, *trainings])
    ended = subprocess.run(["bash", "-c", script], cwd=checkout, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-5000:]}"
    for file in MADE.get(page.name, ()):
        assert (checkout / file).is_file()


def test_most_commands_of_the_pages_run_anywhere():
    assert sum(len(_split(page)[0]) for page in TO_FOLLOW) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_essentials_come_first():
    head = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    assert "docs/images/dataflow.svg" in head
    assert "ex4d preprocess" in head
    assert "ex4d train" in head
    assert "make demo" in head


def test_the_site_builds_strictly_and_a_broken_link_fails_it(tmp_path):
    pytest.importorskip("material", reason="`make docs` installs mkdocs-material")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    assert subprocess.run(build, cwd=ROOT, env=quiet, capture_output=True).returncode == 0
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with open(tmp_path / "docs" / "tutorial.md", "a", encoding="utf-8") as page:
        page.write("\n[nowhere](no_such_page.md)\n")
    broken = subprocess.run(build, cwd=tmp_path, env=quiet, capture_output=True, text=True)
    assert broken.returncode != 0
    assert "no_such_page.md" in broken.stdout + broken.stderr
