"""The command line: its grammar, its exit statuses, and that each subcommand explains itself."""

from __future__ import annotations

import json

import pytest

from pipelines import cli


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert cli.COMMANDS[command].help in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["preprocess", "nowhere.yaml"], "nowhere.yaml"),
        (["preprocess", "configs/tiny.yaml", "preprocess.no_such_key=1"], "preprocess.no_such_key"),
        (["preprocess", "configs/tiny.yaml", "preprocess.depth=guess"], "parallax"),
        (["train", "configs/tiny.yaml", "train.zero_stage=7"], "train.zero_stage"),
        (["sweep", "configs/tiny.yaml", "sweep.no_such_key=1"], "sweep.no_such_key"),
        (["demo", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_an_invalid_choice_ends_with_2_and_names_it(argv, named, root, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(root)
    assert cli.main(argv) == 2
    assert named in capsys.readouterr().err


def test_unknown_commands_and_flags_end_with_2():
    for argv in (["fly"], [], ["verify"], ["generate", "--video", "a.mp4", "--size", "big"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 2


def test_verify_of_nothing_ends_with_1_and_says_so(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_doctor_finds_what_is_installed(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == []
    assert found["packages"]["torch"].startswith("2.")
    assert found["num_cpus"] >= 1
