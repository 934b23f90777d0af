"""A cache deletes only files that a cache wrote, whatever folder it is pointed at."""

from __future__ import annotations

import os

import pytest

from ex4d.data.cache import MARKER, RangeCache, claim, least_used_first
from ex4d.errors import ConfigError

KEY = "preprocess.cache_dir"


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "id_rsa").write_text("secret")
    with pytest.raises(ConfigError, match=r"holds '\.ssh'"):
        RangeCache(tmp_path, max_bytes=0, identity="d")
    assert (tmp_path / ".ssh" / "id_rsa").read_text() == "secret"
    assert not (tmp_path / MARKER).exists()


def test_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="is a link"):
        claim(tmp_path / "link", KEY)


def test_a_folder_of_another_user_is_refused(tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"):
        claim(tmp_path / "cache", KEY)


def test_a_cache_is_private_and_taken_up_again(tmp_path):
    (tmp_path / "cache" / ("a" * 64)).mkdir(parents=True)  # as an earlier version left it
    claim(tmp_path / "cache", KEY)
    assert claim(tmp_path / "cache", KEY).stat().st_mode & 0o777 == 0o700


def test_only_regular_files_under_the_name_of_a_hash_are_evicted(tmp_path):
    outside = tmp_path / "outside"
    (outside / "a").mkdir(parents=True)
    (outside / "a" / "precious").write_bytes(bytes(100))
    cache = claim(tmp_path / "cache", KEY)
    (cache / ("1" * 64)).mkdir()
    (cache / ("1" * 64) / "video").write_bytes(bytes(10))
    (cache / ("1" * 64) / "link").symlink_to(outside / "a" / "precious")
    (cache / ("2" * 64)).write_bytes(bytes(20))
    (cache / ("3" * 64)).symlink_to(outside / "a")  # put there later
    (cache / "notes.txt").write_bytes(bytes(30))
    assert sorted(size for size, _ in least_used_first(cache)) == [10, 20]
    RangeCache(cache, max_bytes=0, identity="d")
    assert (outside / "a" / "precious").exists()
    assert (cache / "notes.txt").exists()
    assert not (cache / ("2" * 64)).exists()
