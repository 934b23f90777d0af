"""Every file that is given is accounted for, whatever its name."""

from __future__ import annotations

import os

import pytest

from ex4d.errors import ConfigError
from ex4d.synthetic import SyntheticConfig
from pipelines.cli import main
from pipelines.inputs import expand
from pipelines.preprocess.run import PreprocessConfig, find_sources


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.mp4", "a.depth.npz", "a.txt", "deep/c.MKV", "deep/notes.md", "deep/no_suffix", "odd.xyz"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "in"


def names(sources):
    return [source.name for source in sources]


def test_folder_gives_every_file_and_sidecars_belong_to_their_video(folder):
    sources = expand(str(folder))
    assert names(sources) == ["a.mp4", "b.mp4", "deep/c.MKV", "deep/no_suffix", "deep/notes.md", "odd.xyz"]
    assert [source.name for source in sources if not source.is_video] == ["deep/notes.md"]


@pytest.mark.parametrize("name", ["a_depth.mp4", "a.depth.mkv", "a_vis.mp4", "deep/c_depth.avi"])
def test_a_video_of_depth_beside_its_video_is_counted_as_none(folder, name):
    (folder / name).write_bytes(b"x")
    found = {source.name: source for source in expand(str(folder))}
    assert found[name].reason == "not_a_video"
    assert found[name].fate == "filtered"
    assert "depth" in found[name].message
    assert found["a.mp4"].is_video
    assert found["deep/c.MKV"].is_video


def test_a_video_that_is_named_like_depth_is_a_video_where_no_other_stands_beside_it(folder):
    (folder / "fields_of_depth.mp4").write_bytes(b"x")
    assert next(source for source in expand(str(folder)) if source.name == "fields_of_depth.mp4").is_video


def test_file_glob_commas_and_lists(folder):
    assert names(expand(str(folder / "a.mp4"))) == ["a.mp4"]
    assert names(expand(str(folder / "*.mp4"))) == ["a.mp4", "b.mp4"]
    assert names(expand(str(folder / "**/*.MKV"))) == ["deep/c.MKV"]
    assert names(expand(f"{folder / 'a.mp4'}, {folder / 'deep'}")) == names(
        expand([str(folder / "a.mp4"), str(folder / "deep"), str(folder / "a.mp4")])
    )


def test_a_text_list_is_relative_to_itself_and_keeps_missing_files(folder):
    listing = folder / "list.txt"
    listing.write_text("# mine\n a.mp4 \n\ndeep/c.MKV\nmissing.mp4\n")
    assert names(expand(str(listing))) == ["a.mp4", "deep/c.MKV", "missing.mp4"]


def test_same_names_in_two_folders_stay_apart(tmp_path):
    for name in ("x/clip.mp4", "y/clip.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    assert names(expand([str(tmp_path / "x"), str(tmp_path / "y")])) == ["x/clip.mp4", "y/clip.mp4"]


def test_hostile_names_survive(tmp_path):
    hostile = [
        b"new\nline.mp4",
        b"quote'\";$(x).mp4",
        b"\xff\xfe.mp4",
        "ünïcode 日本.mp4".encode(),
        b"-rf.mp4",
        b"[a].mp4",
    ]
    for name in hostile:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"x")
    sources = expand(str(tmp_path))
    assert sorted(os.fsencode(os.path.basename(source.path)) for source in sources) == sorted(hostile)
    assert all(source.name.encode("utf-8") and source.is_video for source in sources)
    assert len({source.name for source in sources}) == len(hostile)
    assert names(expand(str(tmp_path / "[a].mp4"))) == ["[a].mp4"]


def test_the_output_is_no_input(folder):
    (folder / "out").mkdir()
    (folder / "out" / "d.mp4").write_bytes(b"x")
    assert "out/d.mp4" not in names(expand(str(folder), exclude=folder / "out"))


@pytest.mark.parametrize("given", ["nowhere.mp4", "*.nothing", []])
def test_what_is_not_there_is_an_invalid_choice(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"preprocess\.input"):
        expand(given)


@pytest.mark.parametrize("given", ["", " ", ["", "a.mp4"]])
def test_nothing_given_is_not_the_working_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ConfigError, match="empty"):
        expand(given)


def test_an_output_that_holds_every_input_is_named(folder):
    with pytest.raises(ConfigError, match="is in the output"):
        expand(str(folder), exclude=folder)


def test_no_input_is_a_corpus_only_where_one_is_asked_for(tmp_path):
    config = PreprocessConfig(output=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"preprocess\.input"):
        find_sources(config, None)
    assert not (tmp_path / "out").exists()
    assert len(find_sources(config, SyntheticConfig(num_videos=2, num_frames=2, size=(16, 16), supersample=1))) == 2


def test_the_command_says_that_the_input_is_missing(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(f"preprocess: {{output: {tmp_path / 'out'}}}\n")
    assert main(["preprocess", str(tmp_path / "config.yaml")]) == 2
    assert "preprocess.input" in capsys.readouterr().err
