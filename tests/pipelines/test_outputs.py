"""One output, one command: a command locks the folder or files that it writes, and leaves nothing if it fails."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from ex4d import video
from ex4d.errors import ConfigError
from pipelines import cli
from pipelines.runtime.output import exclusive, outside_datasets, writing


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3)).astype(np.uint8)
    video.write(tmp_path / "a.mp4", frames, 25)
    depth = np.linspace(1, 3, 3 * 32 * 32).reshape(3, 32, 32).astype(np.float32)
    np.savez(tmp_path / "a.depth.npz", z_depth=depth)
    return tmp_path


COMMANDS = {
    "reconstruct": ("reconstruct", "a.mp4", "--output", "out"),
    "view": ("view", "a.mp4", "--output", "out/page.html"),
    "export": ("export", "none", "--style", "kohya", "--output", "out/lora.safetensors"),
    "generate": ("generate", "--video", "a.mp4", "--adapter", "none", "--output", "out/side.mp4"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_command_of_one_output_is_refused_and_the_first_goes_on(place, capsys, name):
    argv = COMMANDS[name]
    with writing(argv[-1], is_file=name != "reconstruct"):
        before = {path.name for path in place.rglob("*")}
        assert cli.main(argv) == 2
        assert "another run is writing there" in capsys.readouterr().err
        assert {path.name for path in place.rglob("*")} == before
    assert not (place / "out").exists()


def test_files_of_other_names_in_one_folder_are_no_conflict(place):
    with writing("out/b.html", is_file=True):
        assert cli.main(COMMANDS["view"]) == 0
    assert [path.name for path in (place / "out").iterdir()] == ["page.html"]


@pytest.mark.parametrize("name", ["reconstruct", "view"])
def test_a_command_that_fails_leaves_neither_lock_nor_folder(place, name):
    (place / "a.depth.npz").unlink()
    argv = (*COMMANDS[name][:3], f"deep/er/{COMMANDS[name][3]}")
    assert cli.main(argv) == 1
    assert not (place / "deep").exists()


def test_a_reconstruction_into_a_running_training_is_refused(place, capsys):
    with exclusive("out"):
        assert cli.main(COMMANDS["reconstruct"]) == 2
    assert "another run" in capsys.readouterr().err


def hold(barrier, won) -> None:
    """Try, at the same moment as the others, to be the one that writes."""
    barrier.wait()
    try:
        with writing("out/x.mp4", is_file=True):
            won.release()
            barrier.wait()
    except ConfigError:
        barrier.wait()


def test_of_many_that_start_at_once_one_has_the_output(place):
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        barrier, won = context.Barrier(4), context.Semaphore(0)
        processes = [context.Process(target=hold, args=(barrier, won)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
        assert won.get_value() == 1


def test_a_dataset_is_only_written_by_what_made_it(tmp_path):
    for kind in ("clips", "latents"):
        (tmp_path / kind).mkdir()
        record = {"latents": {}} if kind == "latents" else {}
        (tmp_path / kind / "dataset.json").write_text(json.dumps(record))
        outside_datasets("output", str(tmp_path / kind), own=kind)
        for output, own in ((kind, ""), (f"{kind}/deep/er", kind), (f"{kind}/../{kind}/x", ""), (kind, "other")):
            with pytest.raises(ConfigError, match="outside of the dataset"):
                outside_datasets("output", str(tmp_path / output), own=own)
    (tmp_path / "link").symlink_to(tmp_path / "clips")
    with pytest.raises(ConfigError):
        outside_datasets("output", str(tmp_path / "link" / "run"))
    outside_datasets("output", str(tmp_path / "run"))
    outside_datasets("output", "s3://bucket/clips/run")
