"""Links, loops and folders that cannot be opened: every file that the input names is taken or counted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.inputs import expand


@pytest.fixture
def place(tmp_path) -> Path:
    """Return a folder next to other users' files."""
    for name in ("in/a.mp4", "in/deep/b.mp4", "other/c.mp4", "other/inner/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def found(given: object, **more) -> tuple[set[str], dict[str, str]]:
    sources = expand(str(given), **more)
    assert len({source.name for source in sources}) == len(sources)
    return (
        {source.name for source in sources if source.is_video},
        {source.name: source.reason for source in sources if not source.is_video},
    )


def test_links_within_the_input_are_followed_once(place):
    (place / "in/z_link.mp4").symlink_to("a.mp4")
    (place / "in/aa_again").symlink_to("deep")
    taken, counted = found(place / "in")
    assert taken == {"a.mp4", "deep/b.mp4", "z_link.mp4"}
    assert counted == {"aa_again": "symlink_again"}


@pytest.mark.parametrize("follow", [False, True])
def test_links_out_of_the_input_are_counted_or_taken(place, follow):
    (place / "in/file.mp4").symlink_to(place / "other/c.mp4")
    (place / "in/folder").symlink_to(place / "other")
    taken, counted = found(place / "in", follow_links=follow)
    outside = {"file.mp4"} if not follow else {"file.mp4", "folder/c.mp4", "folder/inner/d.mp4"}
    if follow:
        assert (taken, counted) == ({"a.mp4", "deep/b.mp4"} | outside, {})
    else:
        assert taken == {"a.mp4", "deep/b.mp4"}
        assert counted == {"file.mp4": "symlink_outside", "folder": "symlink_outside"}
        fates = {source.fate for source in expand(str(place / "in")) if not source.is_video}
        assert fates == {"filtered"}


@pytest.mark.parametrize("follow", [False, True])
def test_loops_end(place, follow):
    (place / "in/deep/up").symlink_to(place / "in")
    (place / "in/deep/self").symlink_to(".")
    (place / "in/x").mkdir()
    (place / "in/y").mkdir()
    (place / "in/x/to_y").symlink_to("../y")
    (place / "in/y/to_x").symlink_to("../x")
    (place / "in/round").symlink_to("round")
    (place / "in/nowhere.mp4").symlink_to("missing")
    taken, counted = found(place / "in", follow_links=follow)
    assert taken == {"a.mp4", "deep/b.mp4", "round", "nowhere.mp4"}  # the last two are refused when they are opened
    assert counted == dict.fromkeys(("deep/up", "deep/self", "x/to_y", "y/to_x"), "symlink_again")


def test_a_hub_snapshot_s_blobs_are_inside(place):
    repo = place / "hub/datasets--a--b"
    (repo / "blobs").mkdir(parents=True)
    shutil.copy(place / "other/c.mp4", repo / "blobs/0123")
    (repo / "snapshots/rev/videos").mkdir(parents=True)
    (repo / "snapshots/rev/videos/c.mp4").symlink_to("../../../blobs/0123")
    (repo / "snapshots/rev/videos/d.mp4").symlink_to(place / "other/inner/d.mp4")
    for root in (repo / "snapshots/rev", repo / "snapshots/rev/videos"):
        taken, counted = found(root)
        assert {os.path.basename(name) for name in taken} == {"c.mp4"}
        assert {os.path.basename(name): reason for name, reason in counted.items()} == {"d.mp4": "symlink_outside"}


def test_globs_follow_the_same_rule(place):
    (place / "in/file.mp4").symlink_to(place / "other/c.mp4")
    (place / "in/folder").symlink_to(place / "other")
    taken, counted = found(place / "in/*")
    assert taken == {"a.mp4", "deep/b.mp4"}
    assert set(counted.values()) == {"symlink_outside"}
    taken, counted = found(place / "in/*/*.mp4")
    assert taken == {"deep/b.mp4"}
    assert counted == {"folder/c.mp4": "symlink_outside"}


def test_a_root_that_is_a_link_is_the_input(place):
    (place / "way").symlink_to("in")
    assert found(place / "way") == ({"a.mp4", "deep/b.mp4"}, {})
    (place / "one.mp4").symlink_to("other/c.mp4")
    assert found(place / "one.mp4") == ({"one.mp4"}, {})  # it is named itself


def test_a_folder_that_cannot_be_opened_is_counted(place):
    """As another user than root, for whom every folder opens."""
    os.chmod(place / "in/deep", 0o700)
    script = (
        "import os, sys\n"
        "from pipelines.inputs import expand\n"
        "import pipelines.preprocess.run\n"
        "os.setgid(65534) if os.getuid() == 0 else None\n"
        "os.setuid(65534) if os.getuid() == 0 else os.chmod(sys.argv[1] + '/deep', 0)\n"
        "print([(s.name, s.reason, s.fate) for s in expand(sys.argv[1])])\n"
    )
    for folder in (place, *place.parents):  # the way there must be open to that user
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            os.chmod(folder, 0o755) if str(folder).startswith("/tmp/") else None
    ran = subprocess.run([sys.executable, "-c", script, str(place / "in")], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "[('a.mp4', '', 'bad'), ('deep', 'unreadable', 'bad')]", ran.stderr[-600:]
