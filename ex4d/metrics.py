"""Serve the metrics of a run to Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ex4d.errors import ConfigError


@contextmanager
def serving(port: int | None, host: str, collect: Callable[[], Iterator[Any]]) -> Iterator[None]:
    """Serve http://HOST:PORT/metrics inside the block; with port None, serve nothing.

    Args:
        collect: yields the metric families; called at each scrape, in another thread.

    Raises:
        ConfigError: the port is taken.
    """
    if port is None:
        yield
        return
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.registry import Collector

    class Source(Collector):
        def collect(self) -> Iterator[Any]:
            return collect()

    registry = CollectorRegistry()
    registry.register(Source())
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        allowed = f"a free port of metrics_host={host} ({error.strerror or error})"
        raise ConfigError("metrics_port", port, allowed) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
