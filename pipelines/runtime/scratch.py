"""Scratch databases on this machine, for data that would take gigabytes of the driver's memory."""

from __future__ import annotations

import sqlite3

CACHE_MB = 32


def scratch() -> sqlite3.Connection:
    """Return an empty database in a temporary file, which is deleted when the connection closes."""
    connection = sqlite3.connect("", isolation_level=None)
    for pragma in (f"cache_size = {-CACHE_MB * 1024}", "journal_mode = OFF", "synchronous = OFF"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("BEGIN")  # never committed: nobody else reads it, and a commit would write cached pages to disk
    return connection
