"""The rows of sessions in the catalog, each as the file of its session says."""

import sqlite3
import time

from offload.errors import ConfigError
from offload.sessions.schema import checksum
from offload.sessions.session_file import SessionFile


def refuse_taken(db: sqlite3.Connection, name: str) -> None:
    """Raise ConfigError if there is a session of that name."""
    if db.execute("SELECT 1 FROM sessions WHERE name = ?", (name,)).fetchone() is not None:
        raise ConfigError(f"there is a session {name!r} already; overwrite replaces it")


def insert_row(db: sqlite3.Connection, file: SessionFile, file_bytes: int) -> None:
    """Add the row of a session, whose blocks are linked, as its file describes it."""
    values = (
        file.identity,
        file.name,
        file.namespace.digest,
        file.num_tokens,
        len(file.rows),
        file.num_chunks,
        file_bytes,
        file.created_at,
        file.expires_at,
        int(file.is_pinned),
    )
    db.execute(
        "INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*values, time.time(), checksum(*values)),
    )
