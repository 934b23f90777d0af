"""Which caption and depth belong to a video: by relative path, never by a name that two videos share."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_corpus import choices, inline

from ex4d.errors import BadSample
from pipelines import inputs
from pipelines.preprocess.stages.identify import identify


@pytest.fixture
def two_folders(corpus, tmp_path) -> Path:
    """Return a folder with a/clip.mp4 and b/clip.mp4, different videos with different depth."""
    videos = sorted(corpus.glob("*.mp4"))
    for folder, video in zip("ab", videos[:2], strict=True):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(video, tmp_path / "in" / folder / "clip.mp4")
    return tmp_path


def test_one_depth_file_for_two_videos_of_one_name_is_refused(corpus, two_folders):
    depths = [path.with_suffix(".depth.npz") for path in sorted(corpus.glob("*.mp4"))]
    maps = two_folders / "maps"
    maps.mkdir()
    shutil.copy(depths[0], maps / "clip.depth.npz")
    config = choices(two_folders / "in", two_folders / "out", depth_path=str(maps), clips_per_shot=1)
    result = inline(config)
    assert result.counts["samples"] == 0
    assert {reject["reason"] for reject in result.rejects} == {"sidecar_ambiguous"}
    assert "a/clip.mp4 or to b/clip.mp4" in result.rejects[0]["message"]
    for folder, depth in zip("ab", depths, strict=False):
        (maps / folder).mkdir()
        shutil.copy(depth, maps / folder / "clip.depth.npz")
    assert inline(config).counts["samples"] == 2


def test_a_depth_file_of_another_length_costs_its_clips(corpus, two_folders):
    whole = np.load(sorted(corpus.glob("*.depth.npz"))[0])
    for folder, taken in (("a", slice(None, None, 2)), ("b", slice(None))):
        np.savez(two_folders / "in" / folder / "clip.depth.npz", z_depth=whole["z_depth"][taken], K=whole["K"])
    result = inline(replace(choices(two_folders / "in", two_folders / "out"), clips_per_shot=1, max_bad_fraction=0.5))
    assert result.counts["samples"] == 1
    assert [reject["reason"] for reject in result.rejects] == ["depth_frames"]
    assert "9 maps, the video 17 frames" in result.rejects[0]["message"]


def rows(folder: Path) -> dict[str, dict]:
    return {
        source.name: {"known_source": None}
        | {name: getattr(source, name) for name in ("path", "name", "root", "twin", "namesake")}
        for source in inputs.expand(str(folder))
        if source.is_video
    }


def test_twins_share_no_caption(tmp_path):
    for name in ("x.mp4", "x.mov", "y.mp4", "deep/y.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    for name in ("x.txt", "y.txt"):
        (tmp_path / name).write_text(f"of {name}")
    config = choices(tmp_path, tmp_path / "out")
    found = rows(tmp_path)
    assert identify(found["y.mp4"], config)["caption"] == "of y.txt"
    assert identify(found["deep/y.mp4"], config)["caption"] == ""
    for name in ("x.mp4", "x.mov"):
        with pytest.raises(BadSample, match=f"name it {name}.txt") as caught:
            identify(found[name], config)
        assert caught.value.reason == "sidecar_ambiguous"
        (tmp_path / f"{name}.txt").write_text(f"of {name}")
    for name in ("x.mp4", "x.mov"):
        assert identify(found[name], config)["caption"] == f"of {name}"
    assert set(rows(tmp_path)) == {"x.mp4", "x.mov", "y.mp4", "deep/y.mp4"}  # their captions are no inputs


TEXT = "Zwölf größere Boxkämpfer 日本 🎬"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_of_every_unicode_encoding_are_read(tmp_path, encoding):
    (tmp_path / "x.mp4").write_bytes(b"x")
    (tmp_path / "x.txt").write_bytes(f"{TEXT}\r\n".encode(encoding))
    assert identify(rows(tmp_path)["x.mp4"], choices(tmp_path, tmp_path / "out"))["caption"] == TEXT


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "cp1252", "shift_jis", "utf-16-le", "utf-16-be"])
def test_captions_that_cannot_be_decoded_are_a_reason(tmp_path, encoding):
    (tmp_path / "x.mp4").write_bytes(b"x")
    text = {"gbk": "十二名拳击手", "shift_jis": "日本"}.get(encoding, "Zwölf Boxkämpfer")
    (tmp_path / "x.txt").write_bytes(text.encode(encoding))
    with pytest.raises(BadSample, match="UTF-8") as caught:
        identify(rows(tmp_path)["x.mp4"], choices(tmp_path, tmp_path / "out"))
    assert caught.value.reason == "caption_encoding"
    assert "x.txt" in caught.value.message


def test_a_long_caption_is_cut_between_characters(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"x")
    (tmp_path / "x.txt").write_bytes(("a" + "ä" * 40000).encode())
    caption = identify(rows(tmp_path)["x.mp4"], choices(tmp_path, tmp_path / "out"))["caption"]
    assert caption == "a" + "ä" * 32767


@pytest.mark.parametrize("suffix", [".txt", ".depth.npz"])
def test_a_link_of_a_sidecar_never_brings_in_a_secret(corpus, two_folders, suffix):
    secret = two_folders / "secret"
    secret.write_bytes(b"AKIA-a-key-of-somebody")
    secret.chmod(0o600)
    for folder, video in zip("ab", sorted(corpus.glob("*.mp4")), strict=False):
        shutil.copy(video.with_suffix(".depth.npz"), two_folders / "in" / folder / "clip.depth.npz")

    link = two_folders / f"in/a/clip{suffix}"
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    config = choices(two_folders / "in", two_folders / "out", clips_per_shot=1, max_bad_fraction=0.5)
    result = inline(config)
    assert result.counts["samples"] == 1
    assert [reject["reason"] for reject in result.rejects] == ["symlink_outside"] * 2  # the link itself, and the video
    assert any("preprocess.follow_links=true" in reject["message"] for reject in result.rejects)
    written = [path for path in (two_folders / "out").rglob("*") if path.is_file()]
    assert written
    assert not any(b"AKIA" in path.read_bytes() for path in written)


def test_links_of_captions_within_the_input_and_a_snapshot_are_read(tmp_path):
    snapshot = tmp_path / "snapshots/abc"
    (snapshot / "texts").mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/0").write_text("of a blob")
    (snapshot / "texts/y").write_text("of the input")
    for name, target in (("x", "../../blobs/0"), ("y", "texts/y")):
        (snapshot / f"{name}.mp4").write_bytes(name.encode())
        (snapshot / f"{name}.txt").symlink_to(target)
    config, found = choices(snapshot, tmp_path / "out"), rows(snapshot)
    assert [identify(found[f"{name}.mp4"], config)["caption"] for name in "xy"] == ["of a blob", "of the input"]
