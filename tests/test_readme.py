"""The README tells the truth: its commands parse, its targets and files exist, and the essentials come first."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def _commands(page: Path) -> list[str]:
    """Return each line that starts a command of ours, in code blocks and in inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(ex4d [^`]+|make [a-z-]+)`", text)
    return [line.split("  #")[0].strip() for line in (*lines, *inline) if line.startswith(("ex4d ", "make "))]


def _is_template(command: str) -> bool:
    """Return True where capitals or … stand for what the reader chooses."""
    return "…" in command or bool(re.search(r"\b[A-Z]{2,}\b|[<\[]", command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse_and_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in _commands(page):
        program, *arguments = shlex.split(command)
        if program == "make":
            assert arguments[0] in targets, command
        elif len(arguments) > 1 and not _is_template(command):
            parsed = cli.parse(arguments)
            if "config" in parsed and parsed.config.startswith("configs/"):
                assert (ROOT / parsed.config).is_file(), command
        else:
            assert arguments[0] in (*cli.COMMANDS, "COMMAND"), command


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
