"""A dataset on the web or the hub reads like a local one: one ranged read per sample, and a bounded cache."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from web_server import Site, _Handler

from ex4d.data.loader import LoaderConfig, ShardLoader
from ex4d.data.verify import verify


class Ranges(_Handler):
    """A server that supports range requests, as every store of datasets does."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            return super().do_GET()
        self.site.asked.append(f"GET {self.path} {self.headers['Range']}")
        data = path.read_bytes()
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(data)}")
        self.send_header("Content-Length", str(stop + 1 - start))
        self.end_headers()
        self.wfile.write(data[start : stop + 1])
        return None


class Hub(Ranges):
    """The hub's responses for one dataset repository, me/set, as far as reading its files needs them."""

    FILES = "/datasets/me/set/resolve/main/"
    TREE = "/api/datasets/me/set/tree/main"

    def do_GET(self) -> None:
        if self.path.startswith(self.TREE):
            folder = Path(self.directory, self.path.partition("?")[0].removeprefix(self.TREE).strip("/"))
            return self._answer([self._entry(path) for path in sorted(folder.iterdir())])
        if self.path.startswith("/api/datasets/me/set"):
            return self._answer({"id": "me/set", "sha": "1" * 40, "siblings": []})
        if self.path.startswith(self.FILES):
            self.path = "/" + self.path.removeprefix(self.FILES)
        return super().do_GET()

    def do_HEAD(self) -> None:
        self.path = "/" + self.path.removeprefix(self.FILES)
        super().do_HEAD()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        name = json.loads(body)["paths"][0] if body.startswith("{") else body.partition("paths=")[2].partition("&")[0]
        path = Path(self.directory, name.replace("%2F", "/"))
        self._answer([self._entry(path)] if path.exists() else [])

    def _entry(self, path: Path) -> dict:
        name = str(path.relative_to(self.directory))
        size = {"size": path.stat().st_size} if path.is_file() else {}
        return {"type": "file" if size else "directory", "path": name, "oid": "2" * 40, **size}

    def _answer(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve():
    """A function that serves a folder by a handler until the test ends, and returns the Site."""
    running = []

    def start(handler: type[_Handler], folder: Path) -> Site:
        site = Site()
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, site, directory=str(folder)))
        site.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        running.append((server, thread))
        return site

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def take(dataset: str, count: int, **config) -> list[dict]:
    loader = ShardLoader(dataset, "train", 3, 5, config=LoaderConfig(**config))
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a["keys"], a["captions"]) == (b["keys"], b["captions"])
        assert a["valid"].all()
        np.testing.assert_array_equal(a["frames"], b["frames"])


def test_the_web_is_read_by_ranges_and_a_bounded_copy_serves_the_second_epoch(dataset16, serve, tmp_path):
    site = serve(Ranges, dataset16)
    local = take(str(dataset16), 8)  # two epochs of twelve
    assert_same(take(site.url, 8, cache_dir=str(tmp_path / "cache")), local)
    shards = [line for line in site.asked if "/shards/" in line and line.startswith("GET")]
    assert all("bytes=" in line for line in shards)
    assert len(shards) == 12  # each sample crossed the wire once
    assert_same(take(site.url, 4, cache_dir=str(tmp_path / "small"), cache_size_bytes=60_000), local[:4])
    assert sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) <= 60_000


HUB = """
import sys
from ex4d.data.loader import ShardLoader
loader = ShardLoader("hf://datasets/me/set", "train", 3, 5)
print([next(loader)["keys"] for _ in range(2)])
loader.close()
"""


def test_the_hub_is_read_by_its_own_scheme(dataset16, serve, root):
    site = serve(Hub, dataset16)
    environment = {**os.environ, "HF_ENDPOINT": site.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-c", HUB], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([batch["keys"] for batch in take(str(dataset16), 2)])
    shards = [line for line in site.asked if "/shards/" in line and line.startswith("GET")]
    assert shards
    assert all("bytes=" in line for line in shards)


def test_a_server_that_is_damaged_on_the_way_is_a_bad_sample(dataset16, serve, tmp_path):
    """Received bytes are checked against the manifest: a proxy that changes a byte costs one sample, which is named."""

    class Proxy(Ranges):
        def translate_path(self, path: str) -> str:
            return super().translate_path(path.replace("/shards/", "/damaged/"))

    folder = tmp_path / "site"
    folder.mkdir()
    for path in dataset16.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "damaged").mkdir()
    for path in (dataset16 / "shards").iterdir():
        data = bytearray(path.read_bytes())
        if path.name == "train-000000.tar":
            data[2000] ^= 1
        (folder / "damaged" / path.name).write_bytes(data)
    loader = ShardLoader(serve(Proxy, folder).url, "train", 12, 5)
    batch = next(loader)
    loader.close()
    assert batch["valid"].sum() == 11
    assert "sha256" in next(iter(loader.bad.values()))


def test_a_dataset_on_the_web_is_verified(dataset16, serve):
    """This needs a server that lists its folders, as this one does."""
    report = verify(serve(Ranges, dataset16).url)
    assert report.counts["samples"] == 16
    assert report.tree_sha256 == verify(str(dataset16)).tree_sha256
