"""No password or signature is kept, and no control character is shown."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from ex4d.redact import SECRET, printable, redacted, without_secrets

URLS = (
    "https://me:hunter2@host/a.mp4",
    "https://me:hun,hunter2@host/a.mp4",
    "https://me:hun@hunter2@host/a.mp4",
    "https://host/a.mp4?X-Amz-Signature=hunter2&b=1,2",
    "https://host/a.mp4#token=hunter2",
    "s3://hunter2:hunter2@bucket/a,b.mp4",
    "hf://hunter2@datasets/a",
    "HTTPS://me:hunter2@host/a.mp4",
)


@pytest.mark.parametrize("url", URLS)
def test_a_url_is_kept_without_its_secrets(url):
    kept = json.dumps(without_secrets({"a": [url, f"x {url} y", f"{url},{url}", {"b": url}]}))
    assert "hunter2" not in kept + redacted(url)
    assert SECRET in kept


def test_other_text_is_kept_as_it_is():
    value = {"a": ["/data/a?b#c@d.mp4", "s3://bucket/a,b.mp4,https://host/c.mp4", 3, None, True]}
    assert without_secrets(value) == value


def test_a_terminal_is_shown_no_control_characters():
    assert printable("a\x1b[2J\u202eb\x9b\r\n\tü") == "a\\x1b[2J\\u202eb\\x9b\\r\n\tü"


def test_a_log_line_is_printable(capsys):
    from pipelines.cli import Lines

    record = logging.LogRecord("n", logging.WARNING, "", 0, "bad %s", ("\x1b[31m\u202e",), None)
    assert Lines("%(message)s").format(record) == "bad \\x1b[31m\\u202e"


def test_markup_in_a_reason_is_text():
    from pipelines.runtime.result import Result

    counts = dict.fromkeys(("videos_in", "videos_split", "videos_rejected", "clips_planned", "samples"), 1)
    counts |= dict.fromkeys(("clips_filtered", "clips_bad"), 0)
    reject = {"unit": "clip", "fate": "bad", "stage": "[b]x[/b]", "reason": "[/red]\x1b[0m", "key": "k", "message": ""}
    result = Result.__new__(Result)
    for name, value in {"rejects": [reject], "counts": counts, "scored": None, "problems": ["[/red]"]}.items():
        object.__setattr__(result, name, value)
    for name, value in {"committed": True, "stands": False, "output": "[/x]", "report": None}.items():
        object.__setattr__(result, name, value)
    shown = result.table()
    assert "[/red]" in shown
    assert "[b]x[/b]" in shown
    assert "\x1b" not in shown


def test_a_traceback_is_shown_like_other_output(capsys, monkeypatch):
    from pipelines import cli

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(cli, "_main", lambda argv: 0)
    assert cli.main([]) == 0
    sys.excepthook(RuntimeError, RuntimeError("\x1b]0;pwned\a https://u:hunter2@example.org/x"), None)
    text = capsys.readouterr().err
    assert "RuntimeError" in text
    assert "\x1b" not in text
    assert "hunter2" not in text
