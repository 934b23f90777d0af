"""URLs in lists and redirects must not reach the local network, however the address is written."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from web_server import Site, _Handler, web_server

from ex4d import storage, web
from ex4d.errors import ConfigError
from ex4d.synthetic import SyntheticConfig, write_corpus
from pipelines.preprocess import run as preprocess
from pipelines.preprocess.run import PreprocessConfig

SPELLINGS = ("127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "0.0.0.0", "localhost", "rebound.example")
IPV6 = ("[::1]", "[0:0:0:0:0:0:0:1]", "[0:0:0:0:0:ffff:127.0.0.1]", "[0:0:0:0:0:0:0:0]")
PRIVATE = (
    *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("224.0.0.1", "239.255.255.250", "255.255.255.255", "240.0.0.1", "192.0.0.1", "198.18.0.1", "::", "::1"),
    *("fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"),
    *("fec0::1", "192.0.0.192"),  # Python 3.11 calls them global
)


def test_which_addresses_are_public():
    assert [address for address in PRIVATE if web.is_public(address)] == []
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert web.is_public(address)


@pytest.fixture
def rebound(monkeypatch):
    """A host name that resolves to this machine, as an attacker's DNS server may answer at any time."""
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *more, **options: real("127.0.0.1" if host == "rebound.example" else host, *more, **options),
    )


@pytest.mark.parametrize("host", [*SPELLINGS, *IPV6])
def test_no_spelling_reaches_this_machine(host, tmp_path, rebound):
    (tmp_path / "a.mp4").write_bytes(b"secret")
    with web_server(tmp_path) as site:
        url = f"http://{host}:{site.url.rpartition(':')[2]}/a.mp4"
        for ask in (storage.sha256, storage.size, storage.read_bytes):
            # The client does not accept some spellings as a host.
            with web.rules(private="none"), pytest.raises((OSError, ConfigError)):
                ask(url)
        assert site.asked == []


class Redirects(_Handler):
    """Redirects requests for a path in `site.targets`."""

    def do_HEAD(self) -> None:
        self._redirect() or super().do_HEAD()

    def do_GET(self) -> None:
        self._redirect() or super().do_GET()

    def _redirect(self) -> bool:
        target = self.site.targets.get(self.path)
        if target is None:
            return False
        self.send_response(302)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True


@pytest.fixture
def redirects(tmp_path):
    """A function that serves a folder with redirects {path: target}."""
    from functools import partial
    from http.server import ThreadingHTTPServer
    from threading import Thread

    running = []

    def start(folder: Path) -> Site:
        site = Site()
        site.targets = {}
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Redirects, site, directory=str(folder)))
        site.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return site

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_redirect_does_not_lead_to_the_local_network(tmp_path, redirects):
    """A host that the user named may be private; it may redirect only to itself or to public hosts."""
    (tmp_path / "a.bin").write_bytes(b"bytes")
    site = redirects(tmp_path)
    with web_server(tmp_path) as inner:
        port = inner.url.rpartition(":")[2]
        site.targets = {"/own": "/a.bin", "/out": f"http://localhost:{port}/a.bin"}
        assert storage.read_bytes(f"{site.url}/own") == b"bytes"
        for ask in (storage.sha256, storage.exists, storage.read_bytes):
            with pytest.raises(web.PrivateHost):
                ask(f"{site.url}/out")
        assert inner.asked == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, SyntheticConfig(num_videos=2, num_frames=5, size=(32, 32), supersample=1))
    return folder


def test_a_run_refuses_private_hosts_unless_it_is_told_otherwise(corpus, tmp_path):
    names = sorted(path.name for path in corpus.glob("*.mp4"))
    config = PreprocessConfig(
        input=str(tmp_path / "list.txt"),
        output=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        num_frames=5,
        size=(32, 32),
        max_bad_fraction=1.0,
        near_duplicates="off",
    )
    with web_server(corpus) as site:
        (tmp_path / "list.txt").write_text("".join(f"{site.url}/{name}\n" for name in names))
        assert preprocess.run(config, runner_name="inline").counts["videos_rejected"] == 2
        assert site.asked == []
        with pytest.raises(ConfigError, match="allow_private_hosts=true"):
            preprocess.run(replace(config, input=f"{site.url}/"), runner_name="inline")
        assert site.asked == []
        allowed = replace(config, allow_private_hosts=True)
        result = preprocess.run(allowed, runner_name="inline")
        assert result.counts["samples"] == 2
    assert {row["reason"] for row in result.rejects} == set()


def test_a_sidecar_does_not_follow_a_redirect_to_another_host(corpus, tmp_path, redirects):
    """The redirect of a video is followed, as to a hub's store; that of its caption could bring text from anywhere."""
    name = sorted(path.stem for path in corpus.glob("*.mp4"))[0]
    site = redirects(corpus)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "secret.txt").write_text("a secret of the local network")
    with web_server(tmp_path / "inner") as inner, web_server(corpus) as store:
        port, at = (server.url.rpartition(":")[2] for server in (inner, store))
        site.targets = {
            f"/{name}.txt": f"http://localhost:{port}/secret.txt",
            f"/{name}.mp4": f"http://localhost:{at}/{name}.mp4",
        }
        (tmp_path / "list.txt").write_text(f"{site.url}/{name}.mp4\n")
        config = PreprocessConfig(
            input=str(tmp_path / "list.txt"),
            output=str(tmp_path / "out"),
            cache_dir=str(tmp_path / "cache"),
            num_frames=5,
            size=(32, 32),
            allow_private_hosts=True,
        )
        result = preprocess.run(config, runner_name="inline")
        assert (result.rejects, result.counts["samples"]) == ([], 1)
        assert inner.asked == []
    table = pq.read_table(tmp_path / "out" / "manifest.parquet")
    assert "secret" not in str(table.to_pylist())
