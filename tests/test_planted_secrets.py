"""Secrets in URLs of settings, lists and command lines appear in no file, output or W&B run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import typing
from pathlib import Path

import pytest
import yaml
from web_server import web_server

from ex4d import config
from ex4d.data.verify import verify
from ex4d.errors import ConfigError
from ex4d.redact import SECRET
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines import cli
from pipelines.commands.jobs import JOBS
from pipelines.commands.retry import retry
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig
from pipelines.train import launch

PLANTED = "hunter2"
PLACES = ("_path", "_dir", "_root", "input", "output", "data", "base", "adapter", "videos", "model", "init_from")
JOBS_TO_TRY = ("preprocess", "encode", "train", "sweep", "evaluate")


def planted(url: str) -> str:
    """Return a URL with a password that holds a comma and an @, a signature, a token and a fragment."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://me:a,{PLANTED}@{PLANTED}@{rest}?X-Amz-Signature={PLANTED}&token={PLANTED}#{PLANTED}"


def assert_nothing_is_kept(folder: Path, *printed: str) -> None:
    assert PLANTED not in "".join(printed)
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    holders = [str(path) for path in files if PLANTED.encode() in path.read_bytes()]
    assert (holders, len(files) > 0) == ([], True)


def places(cls: type, prefix: str) -> list[str]:
    """Return the settings of a dataclass, and of those within it, that take a path or a URL."""
    hints, found = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        inner = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if inner is not None:
            found += places(inner, f"{prefix}.{field.name}")
        elif str in kinds and field.name.endswith(PLACES):
            found.append(f"{prefix}.{field.name}")
    return found


def test_a_failing_command_tells_no_secret_of_any_setting(tmp_path, capsys, monkeypatch):
    """Each setting of each job that takes a path or a URL, one at a time; nothing there can work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ex4d"])
    nothing = {
        "preprocess": {"input": "nothing", "output": "out/a"},
        "encode": {"data": "nothing", "output": "out/b"},
        "train": {"data": "nothing", "output": "out/c"},
        "evaluate": {"adapter": "nothing", "output": "out/d"},
        "sweep": {"output": "out/e", "space": {"train.lr": {"choice": [0.1]}}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(nothing))
    tried = 0
    for job in JOBS_TO_TRY:
        for section, cls in __import__(JOBS[job], fromlist=["SECTIONS"]).SECTIONS.items():
            for key in places(cls, section):
                for url in ("https://127.0.0.1:9/a", "gs+x://host/a"):
                    assert cli.main([job, "config.yaml", f"{key}={json.dumps(planted(url))}"]) in (1, 2), key
                    tried += 1
    told = capsys.readouterr()
    assert tried > 30
    assert SECRET in told.err
    assert_nothing_is_kept(tmp_path, told.out, told.err)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, SyntheticConfig(num_videos=2, num_frames=5, size=(32, 32), supersample=1))
    return folder


def choices(folder: Path, given: object) -> PreprocessConfig:
    more = {"num_frames": 5, "size": (32, 32), "near_duplicates": "off", "max_bad_fraction": 1.0, "val_fraction": 0.5}
    return PreprocessConfig(
        input=given, output=str(folder / "out"), cache_dir=str(folder / "cache"), allow_private_hosts=True, **more
    )


def test_a_run_over_urls_with_secrets_keeps_none(corpus, tmp_path, capsys):
    """Two good videos and a missing one; then a retry, which names what is missing."""
    names = sorted(path.name for path in corpus.glob("*.mp4"))
    with web_server(corpus) as site:
        given = [planted(f"{site.url}/{name}") for name in (*names, "gone.mp4")]
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "list.txt").write_text("\n".join(given))
        for source, gone in ((str(tmp_path / "in" / "list.txt"), 1), (",".join(given[:2]), 0)):
            result = preprocess.run(choices(tmp_path, source), runner_name="inline")
            assert (result.counts["samples"], result.counts["videos_rejected"]) == (2, gone)
        (tmp_path / "in" / "list.txt").unlink()  # the user's own
        with pytest.raises(ConfigError, match="password or signature") as caught:
            retry(str(tmp_path / "out"), ["not_a_file"], runner_name="inline")
    assert verify(str(tmp_path / "out")).ok
    assert_nothing_is_kept(tmp_path, result.table(), str(caught.value), *capsys.readouterr())


def test_a_run_s_configuration_lacks_the_password_and_says_so(tmp_path):
    tree = {"train": {"data": planted("https://h/d"), "output": str(tmp_path)}}
    sections = config.load(_written(tmp_path, tree), launch.SECTIONS)
    launch._write_config(sections["train"], sections["model"])
    (tmp_path / "given.yaml").unlink()
    with pytest.raises(ConfigError, match=r"train.data=.*give the URL again"):
        config.load(tmp_path / "config.yaml", launch.SECTIONS)
    again = config.load(tmp_path / "config.yaml", launch.SECTIONS, ["train.data=https://me:other@h/d"])
    assert again["train"].data == "https://me:other@h/d"
    assert_nothing_is_kept(tmp_path)


def test_several_datasets_lose_their_passwords_too(tmp_path, capsys, monkeypatch):
    """In the run's configuration, in error messages of every kind, and in their advice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ex4d"])
    data = [{"path": planted("https://127.0.0.1:9/a"), "weight": 2.0}, {"path": planted("gs+x://host/b")}]
    sections = config.load(_written(tmp_path, {"train": {"data": data, "output": str(tmp_path)}}), launch.SECTIONS)
    launch._write_config(sections["train"], sections["model"])
    with pytest.raises(ConfigError, match=r"give the URL again, as train\.data=") as caught:
        config.load(tmp_path / "config.yaml", launch.SECTIONS)
    again = config.load(tmp_path / "config.yaml", launch.SECTIONS, [f"train.data={json.dumps(data)}"])
    assert [one.path for one in again["train"].datasets] == [one["path"] for one in data]
    (tmp_path / "given.yaml").write_text("train: {}\n")
    bad = ({"path": data[0]["path"], "weight": -1}, {"wieght": 1, "path": data[0]["path"]}, data[0]["path"], [data])
    for job, given in [("train", data), ("sweep", data), *(("train", [one]) for one in bad)]:
        assert cli.main([job, "given.yaml", f"train.data={json.dumps(given)}"]) in (1, 2), given
    told = capsys.readouterr()
    assert told.err.count(SECRET) >= 4
    assert_nothing_is_kept(tmp_path, str(caught.value), told.out, told.err)


def _written(folder: Path, tree: dict) -> Path:
    (folder / "given.yaml").write_text(yaml.safe_dump(tree))
    return folder / "given.yaml"


@pytest.fixture
def short_folder():
    """A folder for Ray, whose sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="x4"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


TINY = {"lora_rank": 2, "lora_alpha": 2.0, "adapter_hidden": 8}


@pytest.mark.heavy
def test_real_runs_of_every_job_keep_no_secret(corpus, tmp_path, short_folder):
    """Preprocess, encode, train with W&B offline, sweep, evaluate, retry: as processes, and a failing run each."""
    work = tmp_path / "work"
    work.mkdir()
    printed = []

    def ex4d(*words: str, status: int | None = 0) -> None:
        command = [sys.executable, "-m", "pipelines.cli", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
        environment["RAY_TMPDIR"] = str(short_folder)
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=900)
        printed.extend([done.stdout, done.stderr])
        assert status is None or done.returncode == status, (words[0], done.stdout[-500:], done.stderr[-1500:])

    tree = {
        "preprocess": dataclasses.asdict(choices(work, None)) | {"input": "x", "num_workers": 1},
        "train": {"output": "run", "num_steps": 2, "global_batch_size": 1, "micro_batch_size": 1, "num_processes": 1},
        "model": TINY,
        "encode": {"output": "latents", "num_workers": 1},
        "evaluate": {"adapter": "run/adapter", "output": "measured", "num_scenes": 1, "num_workers": 1},
        "generate": {"num_inference_steps": 1, "guidance_scale": 1.0},
        "sweep": {"output": "swept", "space": {"train.lr": {"choice": [0.1]}}, "num_trials": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_plain(tree)))
    name = sorted(file.name for file in corpus.glob("*.mp4"))
    with web_server(corpus) as site, web_server(work) as own:
        given = [planted(f"{site.url}/{file}") for file in name]
        ex4d("preprocess", str(path), f"preprocess.input={json.dumps(given)}")
        ex4d("retry", "out", "--reason", "not_a_file", status=2)
        bad = json.dumps(planted(f"{site.url}/gone.mp4"))
        ex4d("preprocess", str(path), f"preprocess.input={bad}", "preprocess.output=bad", status=2)
        data = f"http://me:{PLANTED}@{own.url.partition('://')[2]}/out"
        ex4d("encode", str(path), f"encode.data={data}")
        ex4d("encode", str(path), f"encode.data={data}/gone", "encode.output=bad2", status=None)
        ex4d("train", str(path), f"train.data={data}")
        ex4d("train", "run/config.yaml", "train.num_steps=3", status=2)
        ex4d("train", "run/config.yaml", "train.num_steps=3", f"train.data={data}")
        ex4d("train", str(path), f"train.data={data}/gone", "train.output=bad3", status=2)
        two = json.dumps([{"path": data, "weight": 2}, {"path": data}])
        ex4d("train", str(path), f"train.data={two}", "train.output=run2")
        ex4d("train", "run2/config.yaml", "train.num_steps=3", status=2)
        ex4d("sweep", str(path), f"train.data={data}", status=2)
        ex4d("evaluate", str(path), f"evaluate.base={bad}", status=2)
    assert list(work.glob("run/wandb/offline-run-*/*.wandb"))
    assert_nothing_is_kept(work, *printed)
    assert_nothing_is_kept(short_folder)  # logs and events of Ray
