"""Folders that another user may have prepared: nothing is read from them or written through them."""

from __future__ import annotations

import http.server
import os
import threading

import pytest

from ex4d import config, storage
from ex4d.errors import BadSample, ConfigError, ContractError
from ex4d.train.runlog import RunLog
from pipelines.preprocess import fetch, file_cache
from pipelines.preprocess.settings import PreprocessConfig
from pipelines.preprocess.stages.shots import unpack_pts
from pipelines.runtime import result
from pipelines.runtime.attempts import Attempts
from pipelines.runtime.ledger import CONFIG, Ledger
from pipelines.runtime.output import exclusive
from pipelines.runtime.progress import Progress


def test_retry_takes_no_choices_from_a_folder_of_another_user(tmp_path):
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    ledger = Ledger(str(tmp_path))
    ledger.write_config({})
    assert ledger.read_config()[1] == {}
    with pytest.raises(ConfigError, match="on the web"):
        Ledger("https://example.org/out").read_config()
    os.chown(tmp_path / CONFIG, 65534, 65534)
    with pytest.raises(ConfigError, match="belongs to another user"):
        ledger.read_config()


def test_a_lock_is_neither_emptied_nor_followed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match=r"\.lock cannot be opened"), exclusive(str(tmp_path / "out")):
        pass
    (tmp_path / "out" / ".lock").unlink()
    (tmp_path / "out" / ".lock").write_text("whose")
    with exclusive(str(tmp_path / "out")):
        pass
    assert (tmp_path / "out" / ".lock").read_text() == "whose"
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["attempts", ".tmp-attempts"])
def test_an_attempt_is_not_written_through_a_link(tmp_path, name):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / name).symlink_to(tmp_path / "precious")
    Attempts(str(tmp_path), 3).begin("decode", ["key"])
    assert (tmp_path / "precious").read_text() == "precious"
    assert Attempts(str(tmp_path), 3).earlier == {"decode key": 1}


def test_no_file_of_a_shared_output_is_written_through_a_link(tmp_path):
    """Logs, configuration and progress: a link that another user put there keeps what it leads to."""
    precious = tmp_path / "precious"
    precious.write_text("keep")
    out = tmp_path / "out"
    (out / "staging").mkdir(parents=True)
    for name in ("progress.jsonl", "run.jsonl", "metrics.jsonl", "validation.jsonl", "config.yaml"):
        (out / name).symlink_to(precious)
    with Progress(str(out)).watch([("clip", [])]) as watched:
        watched.expect("clip", 1)
    with pytest.raises(OSError, match="symbolic links"):
        result._append(result.Result(str(out), {}, []), 0.0, [], {})
    log = RunLog(out, 0, {"mode": "disabled"}, {})
    log.write({"step": 1})
    log.write_validation({"step": 1})
    log.close()
    config.dump({"train": {"num_steps": 1}}, out / "config.yaml")
    for name in ("log", "lock"):
        (out / name).symlink_to(precious)
        with pytest.raises(OSError, match="symbolic links"), open(out / name, "w", opener=storage.no_links):
            pass
    assert precious.read_text() == "keep"
    assert not (out / "config.yaml").is_symlink()


def test_a_note_s_hash_must_be_one(tmp_path):
    """It becomes a part of a path: a record of somebody else must not say ../../.ssh."""
    config = PreprocessConfig(output=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    url = str(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"video")
    for claimed in ("../../.ssh", "A" * 64, None, 5):
        note = {"url": url, "tag": "tag", "sha256": claimed, "size_bytes": 5}
        remote = fetch.Remote(url, {"a.mp4": (5, "tag")}, {"video": note})
        assert remote.digest(url, config, "video")[0] == storage.sha256(tmp_path / "a.mp4")
    good = "ab" * 32
    remote = fetch.Remote(url, {"a.mp4": (5, "tag")}, {"video": note | {"sha256": good}})
    assert remote.digest(url, config, "video") == (good, 5)


def test_runs_of_timestamps_stand_for_no_more_frames_than_a_video_has():
    assert unpack_pts([0, [1, 3]]) == [0, 1, 2, 3]
    with pytest.raises(ContractError, match="more than"):
        unpack_pts([0, [1, 2**40]])


class Endless(http.server.BaseHTTPRequestHandler):
    """An endless body of unknown length."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        try:
            for _ in range(1000):
                self.wfile.write(bytes(1 << 20))
        except OSError:
            return

    def log_message(self, *_) -> None:
        return


def test_an_endless_file_is_given_up_at_the_limit(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = file_cache.FileCache(tmp_path / "cache", 2**30, max_file_bytes=8 << 20)
    with pytest.raises(OSError, match="more than 8388608 bytes") as caught:
        cache.add(f"http://127.0.0.1:{server.server_port}/a.mp4", "video")
    server.shutdown()
    assert file_cache.unreadable(caught.value).reason == "file_too_large"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".ex4d-cache"]


def test_a_list_that_is_written_as_text_has_a_bound():
    from pipelines.inputs import rows

    with pytest.raises(BadSample, match="more than"):
        rows._parsed("[" + "(" * 4_000_000)
