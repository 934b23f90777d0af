"""User mistakes give one clear line that names the problem, exit status 2 or 1, no traceback, and no output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ex4d import video
from pipelines import cli

BASE = """
preprocess: {input: in, output: out, num_workers: 1, num_frames: 5, size: [32, 32]}
synthetic: {num_videos: 1}
model: {base: tiny}
encode: {data: data, output: latents}
evaluate: {adapter: none, output: eval}
train: {data: data, output: run, num_steps: 1, device: cpu, num_processes: 1}
"""
JOB = ("preprocess", "c.yaml")
VIEW = ("reconstruct", "in/a.mp4", "--output", "out", "--num-frames", "5", "--size", "32x32")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with a video, its depth, and other files that users may have next to them."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "in").mkdir()
    (folder / "empty").mkdir()
    (folder / "set").mkdir()
    (folder / "set/dataset.json").write_text("{}")
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (7, 32, 32, 3)).astype(np.uint8)
    video.write(folder / "in/a.mp4", frames, 25)
    depth = np.linspace(1, 3, 7 * 32 * 32).reshape(7, 32, 32).astype(np.float32)
    np.savez(folder / "in/a.depth.npz", z_depth=depth)
    video.write(folder / "bare.mp4", frames, 25)
    for name, count in (("short", 3), ("long", 14)):
        np.savez(folder / f"{name}.npz", z_depth=np.concatenate([depth, depth])[:count])
    np.savez(folder / "share.npz", z_depth=depth, K=np.array([[0.8, 0, 0.5], [0, 0.8, 0.5], [0, 0, 1]]))
    np.savez(folder / "nan.npz", z_depth=np.where(depth < 2, np.nan, depth))
    texts = {
        "c.yaml": BASE,
        "tabs.yaml": BASE.replace("preprocess:", "preprocess:\n\tinput: in\n#"),
        "twice.yaml": BASE + "preprocess: {output: other}\n",
        "list.yaml": "- preprocess\n",
        "empty.yaml": "",
        "python.yaml": "preprocess: !!python/object/apply:os.system [ls]\n",
        "nine.txt": "1 2 3 4 5 6 7 8 9\n" * 7,
        "flat.txt": ("1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1\n") * 7,
        "few.txt": "0 0 0 0 0 0 0 1\n1 0 0 0 0 0 0 1\n",
        "long.txt": "".join(f"{time} {time * 9000} 0 0 0 0 0 1\n" for time in range(7)),
        "angles.txt": "0 2 10 15\n0 -3 -10 -20\n0 0.02 0.09 0.16\n",
        "page.mp4": "<!DOCTYPE html><html>404</html>",
        "pointer.mp4": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "note.mp4": "this is no video at all",
        "names.csv": "id,caption\n0,x\n",
        "captions.csv": "path,caption,caption\nin/a.mp4,x,y\n",
        "broken.json": "[{",
        "page.safetensors": "<!DOCTYPE html><html>404</html>",
        "key.json": json.dumps({"axes": "opencv", "key_poses": [{"eye": [0, 0, 0]}]}),
        "gl.json": json.dumps({"axes": "opengl", "w2c": [np.eye(4).tolist()] * 7}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.yaml").write_bytes(b"# caf\xe9\npreprocess: {}\n")
    (folder / "cut.csv").write_bytes(b"\xff\xfep\0a\0t\0h")
    return folder


def job(*overrides: str, config: str = "c.yaml", command: str = "preprocess") -> tuple[str, ...]:
    return (command, config, *overrides)


def seen(*more: str) -> tuple[str, ...]:
    return (*VIEW, *more)


MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "a configuration that is not there": (job(config="nowhere.yaml"), "nowhere.yaml"),
    "tabs in YAML": (job(config="tabs.yaml"), "tabs.yaml"),
    "a section twice": (job(config="twice.yaml"), "preprocess"),
    "YAML that is a list": (job(config="list.yaml"), "list.yaml"),
    "a Python tag in YAML": (job(config="python.yaml"), "python.yaml"),
    "YAML in Latin-1": (job(config="latin.yaml"), "UTF-8"),
    "a section that is not known": (job("prepare.input=in"), "prepare"),
    "a key that is not known": (job("preprocess.num_frame=5"), "num_frames"),
    "a word for a number": (job("preprocess.num_frames=many"), "num_frames"),
    "no number": (job("preprocess.fps=.nan"), "fps"),
    "three sides": (job("preprocess.size=[32, 32, 3]"), "size"),
    "an odd side": (job("preprocess.size=[33, 32]"), "size"),
    "a huge side": (job("preprocess.size=[100000, 32]"), "size"),
    "no frames": (job("preprocess.num_frames=0"), "num_frames"),
    "an input that is not there": (job("preprocess.input=nowhere"), "nowhere"),
    "an empty input folder": (job("preprocess.input=empty"), "empty"),
    "an empty name": (job("preprocess.input=''"), "preprocess.input"),
    "a page that shows a video": (job("preprocess.input=https://youtu.be/x"), "page"),
    "an estimator that is not known": (job("preprocess.depth=guess"), "parallax"),
    "a list without a column of files": (job("preprocess.input=names.csv"), "column"),
    "a list with two columns of captions": (job("preprocess.input=captions.csv"), "two columns"),
    "a list that is no JSON": (job("preprocess.input=broken.json"), "JSON"),
    "a list that is cut within UTF-16": (job("preprocess.input=cut.csv"), "cut.csv"),
    "a stride beside a rate": (job("preprocess.fps=10", "preprocess.stride=2"), "stride"),
    "a share above one": (job("preprocess.val_fraction=2"), "val_fraction"),
    "a member that is not known": (job("preprocess.members=[flow]"), "members"),
    "an override without a value": (job("preprocess.output"), "preprocess.output"),
    "training on a folder that is none": (job(command="train"), "data"),
    "training into the dataset": (job("train.data=set", "train.output=set/run", command="train"), "train.output"),
    "a preprocess in another dataset": (job("preprocess.output=set/run"), "outside of the dataset"),
    "a view in a dataset": ((*seen()[:3], "set"), "outside of the dataset"),
    "a page in a dataset": (("view", "in/a.mp4", "--output", "set/page.html"), "outside of the dataset"),
    "an export in a dataset": (
        ("export", "none", "--style", "kohya", "--output", "set/a.safetensors"),
        "outside of the dataset",
    ),
    "a generated video in a dataset": (
        ("generate", "--video", "in/a.mp4", "--adapter", "none", "--output", "set/b.mp4"),
        "outside of the dataset",
    ),
    "an evaluation in a dataset": (
        job("evaluate.adapter=none", "evaluate.output=set/e", command="evaluate"),
        "outside of the dataset",
    ),
    "latents over clips": (job("encode.data=set", "encode.output=set", command="encode"), "encode.output"),
    "latents in a dataset": (job("encode.data=set", "encode.output=set/l", command="encode"), "outside of the dataset"),
    "a learning rate below zero": (job("train.lr=-1", command="train"), "lr"),
    "a video that is not there": (("reconstruct", "in/b.mp4", "--output", "out"), "b.mp4"),
    "a web page for a video": (("reconstruct", "page.mp4", "--output", "out"), "HTML"),
    "a pointer for a video": (("reconstruct", "pointer.mp4", "--output", "out"), "LFS"),
    "a text for a video": (("reconstruct", "note.mp4", "--output", "out"), "note.mp4"),
    "a folder for a video": (("reconstruct", "in", "--output", "out"), "in"),
    "a video without depth": (("reconstruct", "bare.mp4", "--output", "out", "--num-frames", "5"), "bare.depth.npz"),
    "more frames than there are": (seen("--num-frames", "99"), "7 frames"),
    "too few depth maps": (seen("--depth-path", "short.npz"), "3 maps, the video 7 frames"),
    "too many depth maps": (seen("--depth-path", "long.npz"), "14 maps, the video 7 frames"),
    "K in shares of the sides": (seen("--depth-path", "share.npz"), "in px"),
    "a depth file that is not there": (seen("--depth-path", "none.npz"), "none.npz"),
    "a path that is not known": (seen("--trajectory", "orbitt"), "orbit"),
    "poses of nine columns": (seen("--trajectory", "nine.txt"), "9 columns"),
    "poses that do not say their way": (seen("--trajectory", "flat.txt"), "format=w2c"),
    "too few poses": (seen("--trajectory", "few.txt"), "2 poses"),
    "poses in another unit": (seen("--trajectory", "long.txt"), "scale"),
    "angles for poses": (seen("--trajectory", "angles.txt"), "4 columns"),
    "poses in OpenGL axes": (seen("--trajectory", "gl.json"), "axes"),
    "key poses without a target": (seen("--trajectory", "key.json"), "look_at"),
    "source poses that are not there": (seen("--source-poses", "none.txt"), "none.txt"),
    "a path option without a value": (seen("-t", "zoom"), "KEY=VALUE"),
    "no field of view": (seen("--fov-deg", "0"), "fov"),
    "an adapter that is not there": (("export", "none", "--style", "kohya", "--output", "out"), "none"),
    "a web page for an adapter": (("export", "page.safetensors", "--style", "kohya", "--output", "out"), "web page"),
    "a run that never was": (("retry", "nowhere", "--reason", "decode_timeout"), "nowhere"),
}


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_one_clear_line(name, place, monkeypatch, capsys):
    argv, named = MISTAKES[name]
    monkeypatch.chdir(place)
    before = contents(place)
    status = exit_of(lambda: cli.main(argv))
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.strip()]
    assert status in (1, 2), (status, lines)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"ex4d {argv[0]}: ")
    assert named in lines[0]
    assert "Traceback" not in told.err + told.out
    assert contents(place) == before


def exit_of(command: Callable[[], int]) -> int | str | None:
    """Return the exit status of a command; that of argparse if it exits there."""
    try:
        return command()
    except SystemExit as ended:
        return ended.code


def test_there_are_forty():
    assert len(MISTAKES) >= 40
