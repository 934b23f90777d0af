"""The command line: its grammar, its exit statuses, and the help of every subcommand."""

from __future__ import annotations

import json

import pytest

from pipelines import cli


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_each_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert cli.COMMANDS[command].help[1:] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["preprocess", "nowhere.yaml"], "nowhere.yaml"),
        (["preprocess", "configs/tiny.yaml", "preprocess.no_such_key=1"], "preprocess.no_such_key"),
        (["preprocess", "configs/tiny.yaml", "preprocess.depth=guess"], "parallax"),
        (["preprocess", "configs/tiny.yaml", "preprocess.fps=.inf"], "preprocess.fps"),
        (["preprocess", "configs/tiny.yaml", "preprocess.size=[100000, 16]"], "8192"),
        (["train", "configs/tiny.yaml", "train.zero_stage=7"], "train.zero_stage"),
        (["train", "configs/tiny.yaml", "train.dry_run=true", "model.family=wan2.1-i2v-14b"], "model.family"),
        (["generate", "--video", "a.mp4", "--adapter", ".", "--output", "out/b.mp4", "--shift", "-1"], "shift"),
        (["sweep", "configs/tiny.yaml", "sweep.no_such_key=1"], "sweep.no_such_key"),
        (["sweep", "configs/tiny.yaml", "sweep.gpus_per_trial=1.5"], "sweep.gpus_per_trial=1.5: must be a whole"),
        (["preprocess", "configs/tiny.yaml", "preprocess.depth_num_gpus=1.5"], "preprocess.depth_num_gpus=1.5"),
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["preproces", "a.yaml"], "'preproces' is not a command. Did you mean preprocess?"),
        (["generate", "--vidoe", "a.mp4"], "--vidoe is not an option. Did you mean --video?"),
        (["preprocess", "a.yaml", "--num_workers=4"], "--num_workers is not an option; write section.key=value"),
        (["preprocess"], "the following arguments are required: CONFIG.yaml\n"),
        ([], "preprocess   turn videos into training shards"),
    ],
)
def test_a_slip_on_the_command_line_is_named(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_value_that_starts_like_an_option_is_a_value():
    needed = ["generate", "--video", "a.mp4", "--adapter", ".", "--output", "b.mp4"]
    assert cli.parse([*needed, "--prompt", "-- a dog, please"]).prompt == "-- a dog, please"


@pytest.mark.parametrize(
    "argv", [["--log-level", "INFO", "train", "a.yaml"], ["train", "a.yaml", "--log-level", "INFO"]]
)
def test_the_log_level_stands_before_or_after_the_command(argv):
    assert cli.parse(argv).log_level == "INFO"
    assert cli.parse(["train", "a.yaml"]).log_level == "WARNING"


def test_verify_of_nothing_ends_with_1_and_says_so(tmp_path, capsys):
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_doctor_finds_what_is_installed(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == []
    assert found["packages"]["torch"].startswith("2.")
    assert found["num_cpus"] >= 1


def test_a_scheme_whose_package_is_missing_is_an_invalid_choice(monkeypatch, capsys):
    def missing(url, **_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    assert cli.main(["verify", "s3://bucket/dataset"]) == 2
    assert "s3fs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    [
        *("train.lr=.inf", "train.weight_decay=.nan", "train.betas=[2, 3]", "train.seed=-1", "train.warmup_steps=-1"),
        "train.num_processes=100000",
    ],
)
def test_a_training_that_cannot_be_is_refused_before_a_process_starts(override, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a process was started"))
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "dataset.json").write_text("{}")
    places = (f"train.data={tmp_path / 'dataset'}", f"train.output={tmp_path / 'run'}")
    assert cli.main(["train", str(root / "configs/tiny.yaml"), override, *places]) == 2
    assert override.partition("=")[0] in capsys.readouterr().err
