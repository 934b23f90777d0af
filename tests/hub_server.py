"""A local hub: the part of Hugging Face's interface that is needed to read one dataset's files."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, failures: list[int], *args):
        self.folder, self.failures = folder, failures
        super().__init__(*args)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if match := re.fullmatch(r"/api/datasets/u/d/tree/main/?(.*)", path):
            self._send(json.dumps(self._tree(self.folder / match[1], "recursive=true" in query)).encode())
        elif path.startswith("/api/datasets/u/d"):
            self._send(json.dumps({"id": "u/d", "sha": "a" * 40, "siblings": []}).encode())
        elif match := re.fullmatch(r"/datasets/u/d/resolve/main/(.*)", path):
            self._file(self.folder / match[1])
        else:
            self._send(b"", 404)

    do_HEAD = do_GET

    def _tree(self, folder: Path, recursive: bool) -> list[dict]:
        found = []
        for path in sorted(folder.rglob("*") if recursive else folder.iterdir()):
            digest = hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else "0" * 40
            kind, size = ("file", path.stat().st_size) if path.is_file() else ("directory", 0)
            found.append({"type": kind, "path": str(path.relative_to(self.folder)), "size": size, "oid": digest})
        return found

    def _file(self, path: Path) -> None:
        if self.failures:
            self._send(b"", self.failures.pop())
            return
        first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        part = path.read_bytes()[int(first) : int(last) + 1]
        self._send(part, 206, {"Content-Range": f"bytes {first}-{last}/{path.stat().st_size}"})

    def _send(self, body: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Log nothing."""


@contextmanager
def hub(folder: Path, failures: list[int]) -> Iterator[str]:
    """Yield the address of a hub whose dataset `u/d` is a folder; its next file requests fail with these statuses."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folder, failures))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
