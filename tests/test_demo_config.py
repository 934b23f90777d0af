"""`ex4d demo` outside a checkout: its settings come with the package."""

from __future__ import annotations

import tomllib
from pathlib import Path

from ex4d import config
from pipelines import cli
from pipelines.commands import demo


def test_from_an_empty_folder_the_packaged_settings_load(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    assert cli.parse(["demo"]).config is None
    packaged = demo.default_config()
    assert Path(packaged).is_absolute()
    loaded = config.load(packaged, demo.sections())
    assert loaded == config.load(root / "configs" / "tiny.yaml", demo.sections())
    assert loaded["model"].base == "tiny"


def test_in_a_checkout_the_settings_are_the_ones_there(root, monkeypatch):
    monkeypatch.chdir(root)
    assert demo.default_config() == "configs/tiny.yaml"


def test_a_wheel_holds_the_settings(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["pipelines.commands"]
    folder = Path(demo.__file__).parent
    assert folder / "tiny.yaml" in [path for pattern in patterns for path in folder.glob(pattern)]
    assert not (folder / "tiny.yaml").is_symlink()
