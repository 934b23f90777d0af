"""Weight folders that refer to code of their own: it never runs, even if a prompt would be answered with yes."""

from __future__ import annotations

import json
import shutil

import pytest

from ex4d.errors import ContractError
from ex4d.models import backbone

CODE = """
from pathlib import Path
Path({mark!r}).touch()
class Own:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()
"""


def test_the_code_of_a_tokenizer_is_not_run(tmp_path, monkeypatch):
    folder, mark = tmp_path / "base", tmp_path / "it-ran"
    shutil.copytree(backbone.TINY_FOLDER / "tokenizer", folder / "tokenizer")
    path = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    (folder / "tokenizer" / "own.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr("builtins.input", lambda *asked: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ContractError, match="cannot be loaded"):
        backbone._tokenizer(folder)
    assert not mark.exists()
