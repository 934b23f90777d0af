"""Scratch databases of this machine, for what would take gigabytes of a driver's memory."""

from __future__ import annotations

import sqlite3

CACHE_MB = 32


def scratch() -> sqlite3.Connection:
    """Return an empty database in a temporary file, which goes with the connection."""
    connection = sqlite3.connect("", isolation_level=None)
    for pragma in (f"cache_size = {-CACHE_MB * 1024}", "journal_mode = OFF", "synchronous = OFF"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("BEGIN")  # never committed: nobody else reads it, and a commit would write what is in memory
    return connection
