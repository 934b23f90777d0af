"""Store operations are retried only where that can help, and no message reveals a secret."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import random
import subprocess
import sys

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, IncompleteReadError, NoCredentialsError
from fsspec.implementations.memory import MemoryFileSystem
from hub_server import hub
from web_server import web_server

from ex4d import remote, storage
from ex4d.errors import ConfigError

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The list of requested waits in seconds; the waits themselves are skipped."""
    found = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


@pytest.fixture
def memory(tmp_path):
    """A URL of an empty folder in fsspec's store in memory."""
    yield f"memory://{tmp_path}"
    MemoryFileSystem.store.clear()


def answer(status, code=""):
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Get")


def failing(monkeypatch, method, errors):
    """Let a method of the memory store raise these errors before it succeeds; return the list of its calls."""
    real, left, calls = getattr(MemoryFileSystem, method), list(errors), []

    def maybe(self, *args, **more):
        calls.append(args)
        if left:
            raise left.pop(0)
        return real(self, *args, **more)

    monkeypatch.setattr(MemoryFileSystem, method, maybe)
    return calls


OPERATIONS = {
    "cat_file": lambda url: storage.read_bytes(url),
    "pipe_file": lambda url: storage.write_bytes(url, CONTENT),
    "info": lambda url: storage.exists(url),
    "find": lambda url: storage.list_files(url.rpartition("/")[0]),
    "glob": lambda url: storage.glob(url.rpartition("/")[0] + "/*"),
    "rm_file": lambda url: storage.remove(url),
}


@pytest.mark.parametrize("method", OPERATIONS)
def test_every_operation_is_tried_five_times_and_not_more(memory, monkeypatch, waits, method):
    url = f"{memory}/file"
    storage.write_bytes(url, CONTENT)
    passing = [
        TimeoutError(),
        answer(503, "SlowDown"),
        aiohttp.ServerDisconnectedError(),
        answer(500),
        OSError(5, "io"),
    ]
    calls = failing(monkeypatch, method, passing[:4])
    OPERATIONS[method](url)
    assert len(calls) == 5
    assert waits == [pytest.approx(wait, rel=0.5) for wait in (0.25, 0.5, 1.0, 2.0)]
    assert waits != [0.25, 0.5, 1.0, 2.0]  # else all workers of a cluster retry in step
    storage.write_bytes(url, CONTENT)
    monkeypatch.undo()
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    calls = failing(monkeypatch, method, passing)
    with pytest.raises(remote.Unavailable, match="5 attempts"):
        OPERATIONS[method](url)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (answer(403, "AccessDenied"), PermissionError),
        (answer(404, "NoSuchKey"), FileNotFoundError),
        (answer(400, "InvalidArgument"), OSError),
        (FileNotFoundError("gone"), FileNotFoundError),
        (PermissionError("no"), PermissionError),
        (NoCredentialsError(), PermissionError),
        (OSError(errno.ENOSPC, "disk full"), OSError),
    ],
)
def test_what_will_not_pass_is_tried_once(memory, monkeypatch, waits, error, becomes):
    storage.write_bytes(f"{memory}/file", CONTENT)
    calls = failing(monkeypatch, "cat_file", [error] * 9)
    with pytest.raises(becomes) as raised:
        storage.read_bytes(f"{memory}/file")
    assert (len(calls), waits, isinstance(raised.value, remote.Unavailable)) == (1, [], False)


def test_a_lost_connection_that_calls_itself_not_found_is_tried_again():
    """fsspec turns any error while it queries a web server for a size into FileNotFoundError."""
    for cause, passing in ((aiohttp.ClientConnectionError(), True), (None, False), (answer(404), False)):
        error = FileNotFoundError("https://host/file")
        error.__cause__ = cause
        assert remote.is_passing(error) is passing
    assert remote.is_passing(answer(404, "NoSuchUpload"))  # the end of an upload that had been heard the first time
    assert remote.is_passing(EndpointConnectionError(endpoint_url="x"))
    assert remote.is_passing(IncompleteReadError(actual_bytes=1, expected_bytes=2))


def test_no_secret_is_logged_or_raised(memory, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    url = f"{memory}/file?X-Amz-Signature=SECRET"
    failing(monkeypatch, "cat_file", [OSError(errno.EIO, f"at {url}")] * 9)
    with pytest.raises(OSError) as raised:
        storage.read_bytes(url)
    told = "".join(traceback_of(raised.value)) + caplog.text
    assert "attempt 1 of 5" in told
    assert "SECRET" not in told
    assert remote.redacted("https://me:SECRET@host/a/b.mp4?token=SECRET") == "https://host/a/b.mp4"


def traceback_of(error):
    import traceback

    return traceback.format_exception(error)


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host/a.mp4", "github://a:b@c/d", "s3://bucket/../other/a.mp4", "https://host/a/%2e%2e/b.mp4"),
        *("s3://bucket/a/..", "zip://a.mp4::s3://bucket/b.zip", "simplecache::file:///etc/passwd", "s3://b/a\\..\\c"),
        *("https://host/%252e%252e/b", "http://file:///etc/passwd"),
    ],
)
def test_no_other_scheme_no_chain_no_way_up(url):
    with pytest.raises(ConfigError, match="url"):
        storage.read_bytes(url)


def test_a_query_or_a_dotted_name_is_no_way_up():
    storage.check_url("https://host/a..b/c...mp4?next=../d&u=http://x")


def test_a_remote_file_reads_as_a_local_one(memory, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK_BYTES", 100)
    storage.write_bytes(f"{memory}/file", CONTENT)
    draw, twin = random.Random(0), io.BytesIO(CONTENT)
    with storage.open_read(f"{memory}/file") as file:
        for _ in range(200):
            place, whence, count = draw.randrange(-50, 11000), draw.choice([0, 0, 1, 2]), draw.randrange(0, 500)
            try:
                expected = twin.seek(place, whence)
            except ValueError:
                continue
            expected = max(0, expected)
            assert file.seek(place, whence) == expected
            assert file.read(count) == twin.read(count)
            assert file.tell() == twin.tell()
    assert storage.read_bytes(f"{memory}/file", 100) == CONTENT[100:]
    assert storage.read_bytes(f"{memory}/file", 100, 7) == CONTENT[100:107]
    assert storage.read_bytes(f"{memory}/file", 100, 0) == b""
    assert storage.sha256(f"{memory}/file") == hashlib.sha256(CONTENT).hexdigest()


def test_what_is_not_there(memory, tmp_path):
    for folder in (memory, str(tmp_path)):
        url = f"{folder}/nothing"
        assert not storage.exists(url)
        assert not storage.is_file(url)
        assert storage.list_files(url) == []
        storage.remove(url)
        with pytest.raises(FileNotFoundError):
            storage.size(url)
        with pytest.raises(FileNotFoundError):
            storage.sha256(url)


def test_a_web_server_without_ranges(tmp_path, waits):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.bin").write_bytes(CONTENT)
    (tmp_path / "in" / "deep" / "b c.bin").write_bytes(b"b")
    with web_server(tmp_path / "in") as site:
        url = f"{site.url}/a.bin"
        assert storage.list_files(f"{site.url}/") == ["a.bin", "deep/b%20c.bin"]
        assert storage.read_bytes(f"{site.url}/deep/b%20c.bin") == b"b"
        assert (storage.size(url), storage.exists(url), storage.exists(f"{site.url}/c")) == (len(CONTENT), True, False)
        assert storage.read_bytes(url, 300, 20) == CONTENT[300:320]
        assert storage.read_bytes(url, 300) == CONTENT[300:]
        site.faults["/a.bin"] = [503, "cut", "short", 500]
        assert storage.sha256(url, tmp_path / "copy") == hashlib.sha256(CONTENT).hexdigest()
        assert (tmp_path / "copy").read_bytes() == CONTENT
        assert len(waits) == 4
        for faults, error in ((["short"] * 9, storage.Truncated), (["cut"] * 9, remote.Unavailable)):
            site.faults["/a.bin"] = faults
            with pytest.raises(error):
                storage.sha256(url)
            assert len(faults) == 4  # five of nine were met
        site.faults["/a.bin"] = [403]
        with pytest.raises(PermissionError):
            storage.sha256(url)
    with pytest.raises(remote.Unavailable):
        storage.sha256(url)


ASK_A_HUB = """
import json, sys
from ex4d import storage
from pipelines.inputs import expand
url = "hf://datasets/u/d/videos"
told = [storage.list_files(url), storage.glob(f"{url}/*.mp4"), storage.exists(f"{url}/no"), storage.is_file(url)]
told += [storage.sha256(f"{url}/a.mp4"), storage.size(f"{url}/a.mp4"), [source.name for source in expand(url)]]
print(json.dumps(told))
"""


def test_a_hub(tmp_path):
    """In a process of its own: a hub's client reads its address and whether it may be asked when it is imported."""
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    (tmp_path / "videos" / "a.mp4").write_bytes(CONTENT)
    (tmp_path / "videos" / "deep" / "b.mp4").write_bytes(b"b")
    failures = [503, 503]
    with hub(tmp_path, failures) as address:
        env = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", ASK_A_HUB], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    url = "hf://datasets/u/d/videos"
    assert json.loads(done.stdout.splitlines()[-1]) == [
        ["a.mp4", "deep/b.mp4"],
        [f"{url}/a.mp4"],
        False,
        False,
        hashlib.sha256(CONTENT).hexdigest(),
        len(CONTENT),
        ["a.mp4", "deep/b.mp4"],
    ]
    assert failures == []


def test_a_store_whose_client_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match="gcsfs"):
        storage.exists("gs://bucket/a.mp4")
