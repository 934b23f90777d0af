"""A web server on this machine that serves a folder, and can misbehave on purpose."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Site:
    """The requests that a server has received, and the faults that it must show.

    Args:
        url: of the folder.
        asked: "METHOD /path" of every request.
        faults: {path: faults of its next GETs}, each a status, "cut" (half the body, then the connection ends) or
            "short" (half the body, and a length that fits it, after HEAD has announced the whole).
    """

    url: str = ""
    asked: list[str] = field(default_factory=list)
    faults: dict[str, list[int | str]] = field(default_factory=dict)


class _Handler(SimpleHTTPRequestHandler):
    """Python's own handler, which does not support ranges."""

    def __init__(self, site: Site, *args, **more):
        self.site = site
        super().__init__(*args, **more)

    def do_GET(self) -> None:
        self.site.asked.append(f"GET {self.path}")
        waiting = self.site.faults.get(self.path.partition("?")[0], [])
        if not waiting:
            return super().do_GET()
        fault = waiting.pop(0)
        if isinstance(fault, int):
            return self.send_error(fault)
        body = Path(self.translate_path(self.path)).read_bytes()
        half = body[: len(body) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body if fault == "cut" else half)))
        self.end_headers()
        self.wfile.write(half)
        self.close_connection = True
        return None

    def do_HEAD(self) -> None:
        self.site.asked.append(f"HEAD {self.path}")
        super().do_HEAD()

    def log_message(self, *args) -> None:
        """Log nothing."""


@contextmanager
def web_server(folder: Path) -> Iterator[Site]:
    """Yield the Site that serves a folder."""
    site = Site()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, site, directory=str(folder)))
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
