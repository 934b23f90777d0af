"""An S3 server on this machine (moto's) of whose requests a fixed share fails, in every way that a store fails.

Which requests fail is drawn from a seed for each kind of request by itself; the first of each kind always fails, so
that a short run meets every kind too.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

_ANSWERS = {
    "slow_down": ("503 Slow Down", "SlowDown"),
    "internal": ("500 Internal Server Error", "InternalError"),
}


class Flaky:
    """A WSGI application in front of another one.

    Args:
        app: answers the requests that do not fail.
        share: of the requests that fail.
        seed: of the draw.

    `refuse` holds kinds of requests of which all fail; `read` the paths that were asked for; `delay_s` is what each
    answer takes.
    """

    def __init__(self, app: Any, share: float, seed: int):
        self.app, self.share, self.seed = app, share, seed
        self.refuse: set[str] = set()
        self.delay_s = 0.0
        self.asked: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.read: list[str] = []
        self._draws: dict[str, Random] = {}
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        kind = _kind(environ)
        fault = self._fault(kind)
        time.sleep(self.delay_s)
        if kind == "get":
            self.read.append(environ["PATH_INFO"])
        if fault == "cut":
            return _cut(self.app(environ, start_response))
        if fault is None:
            return self.app(environ, start_response)
        status, code = _ANSWERS[fault]
        body = b"" if kind == "head" else f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
        # The body of a put was not read: the connection cannot be used again.
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body))), ("Connection", "close")]
        start_response(status, headers)
        return [body]

    def _fault(self, kind: str) -> str | None:
        with self._lock:
            self.asked[kind] += 1
            draw = self._draws.setdefault(kind, Random(f"{self.seed} {kind}"))
            first = self.share and not self.failed[kind]
            how = draw.choice([*_ANSWERS, "cut"] if kind == "get" else [*_ANSWERS])
            if not (draw.random() < self.share or first or kind in self.refuse):
                return None
            self.failed[kind] += 1
            return how


def _kind(environ: dict[str, Any]) -> str:
    """Return one of list, head, get, put, part, begin, complete, abort, delete, other."""
    method, query = environ["REQUEST_METHOD"], environ.get("QUERY_STRING", "")
    is_bucket = environ["PATH_INFO"].strip("/").count("/") == 0
    if method == "GET":
        return "list" if is_bucket else "get"
    if "uploadId=" in query:
        return {"PUT": "part", "POST": "complete", "DELETE": "abort"}.get(method, "other")
    if method == "POST":
        return "begin" if "uploads" in query else "delete" if "delete" in query else "other"
    return "other" if is_bucket else method.lower()


def _cut(answer: Any) -> Iterator[bytes]:
    """Yield half of a body whose full length was announced; the client sees a broken connection."""
    body = b"".join(answer)
    yield body[: len(body) // 2]


@contextmanager
def object_store(share: float = 0.05, seed: int = 0) -> Iterator[tuple[str, Flaky]]:
    """Yield (the address of the server, the Flaky in front of it)."""
    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].reset()  # moto's stores are the process's
    flaky = Flaky(DomainDispatcherApplication(create_backend_app), share, seed)
    server = make_server("127.0.0.1", 0, flaky, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}", flaky
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use(monkeypatch: Any, address: str) -> None:
    """Point all S3 clients of this process and its children at the store, without client retries that hide failures."""
    found = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "secret-that-nobody-may-see",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # cached clients of another test use that test's store
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
