"""Every setting has a description, and `--help`, `ex4d config` and docs/reference/ hold all of them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ex4d import config
from ex4d.config_help import describe
from ex4d.config_settings import keys
from pipelines import cli
from pipelines.commands.jobs import JOBS

ROOT = Path(__file__).resolve().parent.parent


def _sections(job: str) -> dict[str, type]:
    return importlib.import_module(JOBS[job]).SECTIONS


def test_every_section_that_a_file_may_have_belongs_to_a_job():
    assert {name for job in JOBS for name in _sections(job)} == set(config.SECTIONS)


@pytest.mark.parametrize("job", JOBS)
def test_every_setting_is_described_and_in_the_help(job):
    text = cli.command_parser(job).format_help()
    for section, cls in _sections(job).items():
        described = {one.key: one for one in describe(cls, section)}
        assert set(described) == set(keys(cls, section))
        for key, one in described.items():
            assert re.search(rf"^ +{re.escape(key)}(=|$)", text, re.M), key
            assert re.fullmatch(r"\S.{8,158}[.…]", one.help), f"{key}: {one.help!r} is not one plain line"


@pytest.mark.parametrize("job", JOBS)
def test_a_printed_configuration_loads_and_equals_the_defaults(job, tmp_path, capsys):
    assert cli.main(["config", job]) == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    (tmp_path / "none.yaml").write_text("")
    optional = getattr(importlib.import_module(JOBS[job]), "OPTIONAL", ())
    everything, nothing = (
        config.load(tmp_path / name, _sections(job), optional=optional) for name in ("all.yaml", "none.yaml")
    )
    assert everything == nothing
    written = config.read_yaml(tmp_path / "all.yaml")
    assert set(written) == set(_sections(job)) - set(optional)


def test_the_reference_is_the_generated_one(tmp_path):
    """`make reference` writes it."""
    subprocess.run([sys.executable, str(ROOT / "docs" / "make_reference.py"), str(tmp_path)], check=True, cwd=ROOT)
    for page in tmp_path.iterdir():
        committed = (ROOT / "docs" / "reference" / page.name).read_text(encoding="utf-8")
        assert committed == page.read_text(encoding="utf-8"), f"docs/reference/{page.name} is old: make reference"


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"ex4d \d+\.\d+\.\d+\n", capsys.readouterr().out)
