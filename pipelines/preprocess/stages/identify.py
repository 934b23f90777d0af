"""Identify a source by its content: hash the file and its sidecars, and read its caption."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ex4d import storage, text
from ex4d.errors import BadSample
from ex4d.video import pictures
from pipelines.inputs import walk, without_query
from pipelines.preprocess import fetch, file_cache, pairs
from pipelines.preprocess.stages.pair import MAX_CAMERA_BYTES
from pipelines.runtime.stage import Row, Stage

if TYPE_CHECKING:
    from pipelines.preprocess.settings import PreprocessConfig

MAX_CAPTION_BYTES = 64 * 1024


def identify(row: Row, config: PreprocessConfig, may_read: bool = True) -> dict[str, Any]:
    """Return sha256 and size of the file; `depth_file`, NAME:SHA256 of its depth file ("" if none), and its path; the
    caption beside it; and `fetched`, what the next run needs so that it need not read the files again.

    With the member `source`, `pair` holds the `sha256` of each file of `pairs.files_of` and `size_bytes` of the first,
    or is {} if a file is missing, and the depth file is the other video's. Otherwise `pair` is None.

    Args:
        may_read: False: only if no video or depth file has to be read, since all are known and unchanged.

    Raises:
        fetch.MustRead: a file would have to be read, and `may_read` is False.
        BadSample: not_a_file, unreadable, empty_file, truncated_download, sidecar_ambiguous, caption_encoding,
            symlink_outside (a sidecar is a link out of the input); and the reasons of `pictures.digest`.
    """
    path, pair = row["path"], None
    try:
        filmed = path
        if "source" in config.members:
            _check_inside(pairs.files_of(path), row, config)
            fetch.check_may_read(may_read)
            pair, filmed = _pair(path, config), pairs.files_of(path).source
        remote, local = None, fetch.Local(row["known_source"] or {}, may_read)
        if storage.is_local(path):
            sha256, size_bytes = _local(path, local, config)
        else:
            remote = fetch.Remote(path, storage.beside(path), row["known_source"] or {}, may_read)
            sha256, size_bytes = _remote(path, remote, config)
        depth_file, place = "", ""
        if config.depth == "sidecar":
            depth_file, place = _depth_file(row, config, filmed, remote or local)
        return {
            "sha256": sha256,
            "size_bytes": size_bytes,
            "depth_file": depth_file,
            "depth_place": place,
            "caption": _caption(row, config, remote),
            "pair": pair,
            "fetched": remote.lasting() if remote else local.found,
        }
    except OSError as error:
        raise file_cache.unreadable(error) from error


def _local(path: str, local: fetch.Local, config: PreprocessConfig) -> tuple[str, int]:
    if os.path.isdir(path):
        if config.image_fps is None:
            raise BadSample(
                "not_a_file", "is a folder; set preprocess.image_fps to read a folder of pictures as a video"
            )
        fetch.check_may_read(local.may_read)
        return pictures.digest(path, config.image_fps, max_bytes=config.max_file_mb << 20)
    if not os.path.isfile(path):  # opening a pipe or device would block
        raise BadSample("not_a_file", "is missing or not a regular file")
    if os.path.getsize(path) == 0:
        raise BadSample("empty_file", "has no bytes")
    return local.digest([path], "video", lambda: storage.sha256(path))


def _remote(url: str, remote: fetch.Remote, config: PreprocessConfig) -> tuple[str, int]:
    try:
        sha256, size_bytes = remote.digest(url, config, "video")
    except FileNotFoundError:
        raise BadSample("not_a_file", "is missing or not a regular file") from None
    if size_bytes == 0:
        raise BadSample("empty_file", "has no bytes")
    return sha256, size_bytes


def _pair(path: str, config: PreprocessConfig) -> dict[str, Any]:
    files = pairs.files_of(path)
    if not all(storage.is_file(file) for file in files):
        return {}  # the stage `find_pair` rejects the video
    source, *cameras = files
    try:
        alone = fetch.Remote(source, None, {})
        sha256, size_bytes = (
            _local(source, fetch.Local({}), config) if storage.is_local(source) else _remote(source, alone, config)
        )
    except BadSample as error:
        raise BadSample(error.reason, f"{source.rpartition('/')[2]} {error.message}") from error
    return {"sha256": [sha256, *map(_camera, cameras)], "size_bytes": size_bytes}


def _camera(file: str) -> str:
    try:
        return storage.sha256(file, max_bytes=MAX_CAMERA_BYTES)
    except storage.TooLarge:
        name = file.rpartition("/")[2]
        raise BadSample("pair_cameras", f"{name} has more than {MAX_CAMERA_BYTES} bytes") from None


def _check_inside(files: Sequence[str], row: Row, config: PreprocessConfig) -> None:
    """Raise BadSample (symlink_outside) if a sidecar is a link out of the input and of the video's folder."""
    for file in files:
        if config.follow_links or not storage.is_local(file):
            continue
        if walk.leads_out(file, row["root"], os.path.dirname(row["path"]), config.depth_path or row["root"]):
            raise BadSample("symlink_outside", f"{file.rpartition('/')[2]} is {walk.OUTSIDE}")


def _depth_file(row: Row, config: PreprocessConfig, filmed: str, files: fetch.Remote | fetch.Local) -> tuple[str, str]:
    """Return (NAME:SHA256 of the depth file, its path or URL); ("", "") if there is none."""
    from ex4d.depth import places

    try:
        exists = files.exists if isinstance(files, fetch.Remote) else storage.exists
        found = places.find(fetch.depth_request(row, config, filmed), exists)
    except BadSample as error:
        if error.reason == "sidecar_ambiguous":
            raise
        return "", ""  # the depth stage rejects each clip
    if found != config.depth_path:  # a file that the settings name may lie anywhere
        _check_inside([found, *map(str, places.others_of(found))], row, config)
    if not storage.is_local(found):
        if isinstance(files, fetch.Remote):
            digest = files.digest(found, config, "depth")[0]
        else:
            fetch.check_may_read(files.may_read)
            digest = places.sha256(found)
    elif isinstance(files, fetch.Local):
        parts = [found, *map(str, places.others_of(found))]
        digest, _ = files.digest(parts, "depth", lambda: places.sha256(found))
    else:
        fetch.check_may_read(files.may_read)
        digest = places.sha256(found)
    return f"{found.rpartition('/')[2]}:{digest}", found


def _caption(row: Row, config: PreprocessConfig, remote: fetch.Remote | None) -> str:
    """Return the text file beside a video. Raises BadSample: sidecar_ambiguous, symlink_outside, caption_encoding."""
    from ex4d.depth import places

    is_file = storage.is_file if remote is None or remote.there is None else remote.exists
    path, own = without_query(row["path"]), PurePosixPath(row["name"])
    file = os.path.splitext(path)[0] + ".txt"
    if row["twin"]:
        if is_file(f"{path}.txt"):
            file = f"{path}.txt"
        elif is_file(file):
            raise BadSample("sidecar_ambiguous", places.ambiguous(f"{own.stem}.txt", own, row["twin"], True))
    if not is_file(file):
        return ""
    _check_inside([file], row, config)
    data = storage.read_bytes(file, 0, MAX_CAPTION_BYTES)
    try:
        return text.decode(data, is_cut=len(data) == MAX_CAPTION_BYTES).strip()
    except ValueError as error:
        raise BadSample("caption_encoding", f"{file.rpartition('/')[2]} is {error}") from None


STAGE = Stage(
    "identify",
    identify,
    reads=("path", "name", "root", "twin", "namesake", "known_source"),
    writes=("sha256", "size_bytes", "depth_file", "depth_place", "caption", "pair", "fetched"),
)
