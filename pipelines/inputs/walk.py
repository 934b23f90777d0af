"""List every file under a folder, and every link and folder that is not entered, so that all are accounted for.

Links within the input are followed. Each folder is entered once, by its own path rather than through a link, so loops
terminate. A link that leads out of the input is counted as `symlink_outside`, unless `preprocess.follow_links` is set.
The `blobs` folder of a hub's cache counts as part of each of its snapshots.

If pictures are enabled, a folder is a video if it directly contains two or more JPEG or PNG files and no file with a
video's suffix, and is not named `*.depth` or `*.disparity`. Its pictures are then part of it; its other files and its
subfolders are treated as usual.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ex4d.depth import places
from ex4d.video import pictures, sniff
from pipelines.inputs.rows import Entry

OUTSIDE = "a link that leads out of the input: preprocess.follow_links=true follows it"


@dataclass(frozen=True)
class Rules:
    """What counts as an input: whether links may lead out, and whether folders of pictures are videos."""

    follow_links: bool = False
    pictures: bool = False


def files(folder: str, rules: Rules = Rules(), root: str | None = None) -> Iterator[Entry]:
    """Yield an entry for each file under a folder; and an entry with a reason for each link or folder not entered.

    Args:
        root: the input that the folder belongs to, which links must not leave; None: the folder itself.

    Reasons: `unreadable` (a folder that cannot be opened), `symlink_outside`, `symlink_again` (a folder that was
    already entered: a loop, or a second path to it).
    """
    root = root or folder
    inside = _inside(root)
    entered: dict[str, str] = {}
    waiting, links = deque([folder]), deque[str]()
    while waiting or links:
        place = waiting.popleft() if waiting else links.popleft()
        real = os.path.realpath(place)
        if real in entered:
            yield _refused(root, place, "symlink_again", f"the same folder as {entered[real]}")
            continue
        if place != root and not (rules.follow_links or _is_under(real, inside)):
            yield _refused(root, place, "symlink_outside", OUTSIDE)
            continue
        entered[real] = os.path.relpath(place, root)
        try:
            with os.scandir(place) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            yield _refused(root, place, "unreadable", f"the folder cannot be opened: {error.strerror}")
            continue
        others = []
        for entry in entries:
            if _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(entry.path)
            elif not entry.name.startswith(".tmp-"):
                others.append(entry)
        frames = _frames(place, [entry.name for entry in others]) if rules.pictures else set()
        outside = False
        for entry in others:
            is_allowed = rules.follow_links or not entry.is_symlink() or _is_under(os.path.realpath(entry.path), inside)
            outside |= entry.name in frames and not is_allowed
            if entry.name not in frames:
                yield _file(root, entry.path, is_allowed)
        if frames:
            above = root if place != root else os.path.dirname(root)
            yield _refused(above, place, "symlink_outside", OUTSIDE) if outside else Entry(above, place)


def _frames(folder: str, names: Sequence[str]) -> set[str]:
    """Return the picture files of a folder that is a video; empty if it is not a video."""
    if folder.endswith(places.FOLDERS) or any(name.lower().endswith(sniff.VIDEO_SUFFIXES) for name in names):
        return set()
    found = pictures.chosen(names)
    return set(found) if len(found) > 1 else set()


def file(root: str, path: str, rules: Rules = Rules()) -> Entry:
    """Return the entry of one file under `root`; it has a reason if the file is a link that leads out."""
    return _file(root, path, rules.follow_links or _is_under(os.path.realpath(path), _inside(root)))


def leads_out(path: str, *roots: str) -> bool:
    """Return True if a file or folder, with links resolved, lies in none of the input folders."""
    return not _is_under(os.path.realpath(path), [place for root in roots for place in _inside(root)])


def _file(root: str, path: str, is_allowed: bool) -> Entry:
    if is_allowed or not os.path.exists(path):  # opening a dangling link reports the error later
        return Entry(root, path)
    return _refused(root, path, "symlink_outside", OUTSIDE)


def _refused(root: str, place: str, reason: str, message: str) -> Entry:
    return Entry(root, place, None, reason, message, is_place=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link through a folder without search permission; opening it reports the error later
        return False


def _inside(folder: str) -> list[str]:
    """Return the resolved folders whose files belong to an input folder."""
    folders = [os.path.realpath(folder)]
    for place in (Path(folder), *Path(folder).parents):
        blobs = place.parent.parent / "blobs"
        if place.parent.name == "snapshots" and blobs.is_dir():
            folders.append(os.path.realpath(blobs))
    return folders


def _is_under(real: str, folders: list[str]) -> bool:
    return any(real == folder or real.startswith(os.path.join(folder, "")) for folder in folders)
