"""Picture folders as input of preprocess: which of them are videos, and that they run like any other video."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_corpus import choices, inline

from ex4d.data.manifest import MANIFEST, read_table
from pipelines.inputs import expand
from pipelines.preprocess.run import find_sources

FPS = 25.0


def write(folder: Path, count: int = 17, seed: int = 0, name: str = "{:05d}.png", depth: bool = True) -> Path:
    """Write frames of a sliding texture, and their depth next to the folder."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed).integers(0, 255, (64, 64 + count, 3)).astype(np.uint8)
    for number in range(count):
        cv2.imwrite(str(folder / name.format(number)), noise[:, number : number + 64])
    if depth:
        ramp = 1 + np.arange(64)[:, None] / 50 + np.zeros((count, 64, 64))
        np.savez(folder.with_name(f"{folder.name}.depth.npz"), z_depth=ramp.astype(np.float32))
    return folder


def found(given: object, pictures: bool = True, **more) -> tuple[set[str], dict[str, str]]:
    sources = expand(str(given), pictures=pictures, **more)
    refused = {source.name: source.reason for source in sources if not source.is_video}
    return {source.name for source in sources if source.is_video}, refused


def test_which_folders_are_videos(tmp_path):
    place = tmp_path / "in"
    write(place / "davis/bear")
    write(place / "deep/flat", 3, name="{}.jpg")
    write(place / "single", 1)
    write(place / "clip.depth", 3, depth=False)  # the depth of clip.mp4
    write(place / "mixed", 3, depth=False)
    for name in ("clip.mp4", "mixed/film.mp4"):
        (place / name).write_bytes(b"x")
    (place / "davis/bear/poses.json").write_text("{}")
    videos, others = found(place)
    assert videos == {"davis/bear", "deep/flat", "clip.mp4", "mixed/film.mp4"}
    assert others == dict.fromkeys(
        [
            *("davis/bear/poses.json", "single/00000.png", "single.depth.npz"),
            *(f"{folder}/{number:05d}.png" for folder in ("clip.depth", "mixed") for number in range(3)),
        ],
        "not_a_video",
    )
    # by default, pictures are not videos
    videos, others = found(place, pictures=False)
    assert videos == {"clip.mp4", "mixed/film.mp4"}
    assert len(others) == 17 + 3 + 1 + 6 + 3 + 1  # the frames, poses.json and three depth files without a video


def test_a_webp_is_a_video_where_it_is_animated(tmp_path):
    from PIL import Image

    first, second = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200))
    first.save(tmp_path / "still.webp")
    first.save(tmp_path / "moving.webp", save_all=True, append_images=[second], duration=100)
    assert found(tmp_path, pictures=False) == ({"moving.webp"}, {"still.webp": "not_a_video"})


def test_a_folder_may_be_named_by_itself_by_a_glob_or_by_a_list(tmp_path):
    write(tmp_path / "in/a")
    write(tmp_path / "in/b")
    assert found(tmp_path / "in/a")[0] == {"a"}
    assert found(tmp_path / "in/*")[0] == {"a", "b"}
    (tmp_path / "in/list.txt").write_text("a\nb\n")
    assert found(tmp_path / "in/list.txt")[0] == {"a", "b"}
    (tmp_path / "in/list.csv").write_text("path,start_s,end_s,caption\na,0,0.4,one\na,0.4,0.6,two\n")
    (source,) = expand(str(tmp_path / "in/list.csv"), pictures=True)
    assert (source.name, [span.caption for span in source.spans]) == ("a", ["one", "two"])


@pytest.mark.parametrize("follow", [False, True])
def test_a_picture_whose_link_leads_out_takes_its_folder_along(tmp_path, follow):
    folder = write(tmp_path / "in/a")
    (tmp_path / "secret.png").write_bytes((folder / "00003.png").read_bytes())
    (folder / "00003.png").unlink()
    (folder / "00003.png").symlink_to(tmp_path / "secret.png")
    assert found(tmp_path / "in", follow_links=follow) == (
        ({"a"}, {}) if follow else (set(), {"a": "symlink_outside", "a.depth.npz": "not_a_video"})
    )


def tree(folder: Path) -> dict[str, bytes]:
    names = sorted([*folder.glob("shards/*"), *folder.glob("*.parquet"), folder / "dataset.json"])
    return {str(name.relative_to(folder)): name.read_bytes() for name in names}


def test_a_run_with_folders_of_pictures(tmp_path):
    place = tmp_path / "in"
    write(place / "bear")
    (place / "bear.txt").write_text("a bear")
    write(place / "crab", 17, seed=1, name="img_{}.png")
    write(place / "odd", 3, seed=2)
    (place / "odd/cover.png").write_bytes((place / "odd/00000.png").read_bytes())
    config = choices(place, tmp_path / "out", clips_per_shot=1, image_fps=FPS, cache_dir=str(tmp_path / "cache"))
    config = replace(config, max_bad_fraction=1.0)
    result = inline(config)
    assert result.counts["samples"] == 2
    assert [reject["reason"] for reject in result.rejects] == ["pictures_mixed"]
    rows = {row["source_path"]: row for row in read_table(str(tmp_path / "out"), MANIFEST).to_pylist()}
    assert set(rows) == {"bear", "crab"}
    for row in rows.values():
        assert row["end_s"] - row["start_s"] == pytest.approx(5 / FPS, abs=1 / FPS)
    # the same bytes again, also where the cache is gone
    shutil.rmtree(tmp_path / "cache")
    assert inline(replace(config, output=str(tmp_path / "again"))).counts["samples"] == 2
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    # another rate is another video
    inline(replace(config, output=str(tmp_path / "slow"), image_fps=5.0))
    others = read_table(str(tmp_path / "slow"), MANIFEST).to_pylist()
    assert {row["key"] for row in others}.isdisjoint(row["key"] for row in rows.values())


def test_pictures_without_a_rate_are_counted_and_the_setting_is_named(tmp_path, caplog):
    write(tmp_path / "in/bear", 3)
    config = choices(tmp_path / "in", tmp_path / "out")
    assert find_sources(config, None).num_videos == 0
    assert "preprocess.image_fps=24" in caplog.text
    caplog.clear()
    assert find_sources(replace(config, image_fps=24.0), None).num_videos == 1
    assert not caplog.text


def test_pictures_that_change_between_the_passes_are_noticed(tmp_path):
    from ex4d.errors import BadSample
    from pipelines.preprocess import fetch
    from pipelines.preprocess.stages.identify import identify
    from pipelines.runtime.stage import new_row

    folder = write(tmp_path / "in/a")
    config = choices(tmp_path / "in", tmp_path / "out", image_fps=FPS, cache_dir=str(tmp_path / "cache"))
    row = new_row("a", path=str(folder), name="a", root=str(folder.parent), twin="", namesake="", known_source=None)
    row |= identify(row, config)
    cv2.imwrite(str(folder / "00001.png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(BadSample, match="source_changed"):
        fetch.video(row, config)
    with pytest.raises(BadSample, match=r"preprocess\.image_fps"):
        identify(row, replace(config, image_fps=None))
