"""The SQLite file behind ``HttpStore``: private, bounded, and gone through for what is too old."""

import os
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any, Final

from offload.errors import StorageError

_FILE: Final = "http.sqlite3"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS responses (
    tenant TEXT, id TEXT, previous TEXT, session TEXT, body TEXT, input TEXT, used_s REAL,
    PRIMARY KEY (tenant, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS conversations (
    tenant TEXT, id TEXT, body TEXT, used_s REAL, PRIMARY KEY (tenant, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (
    position INTEGER PRIMARY KEY, tenant TEXT, conversation TEXT, id TEXT, body TEXT,
    UNIQUE (tenant, conversation, id));
CREATE TABLE IF NOT EXISTS answers (
    tenant TEXT, id TEXT, session TEXT, opening TEXT, token_ids BLOB, used_s REAL,
    PRIMARY KEY (tenant, id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS responses_by_use ON responses (used_s);
CREATE INDEX IF NOT EXISTS conversations_by_use ON conversations (used_s);
CREATE INDEX IF NOT EXISTS answers_by_use ON answers (used_s);
"""
_TIMED: Final = ("responses", "conversations", "answers")
_ORPHANS: Final = """DELETE FROM items WHERE NOT EXISTS (
    SELECT 1 FROM conversations WHERE conversations.tenant = items.tenant
    AND conversations.id = items.conversation)"""
_PRUNE_EVERY: Final = 256
"""Writes between two looks for rows that are too old or too many."""


class HttpTables:
    """Statements on the file, from any thread, one at a time.

    Parameters
    ----------
    folder : Path
        Made, private, if it is missing.
    ttl_s : float
        Rows that were not used so long are deleted.
    max_rows : int
        Of each kind; the least recently used go.
    max_bytes : int
        Of the file, as of the last look; the least recently used tenth of each kind goes.

    Raises
    ------
    StorageError
        The file cannot be used.
    """

    def __init__(self, folder: Path, ttl_s: float, max_rows: int, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / _FILE
        # SQLite gives its journal the mode of the file, so the file comes first.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        self._lock = threading.Lock()
        self._ttl_s, self._max_rows, self._max_bytes = ttl_s, max_rows, max_bytes
        self._num_writes = 0
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA secure_delete = ON")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise StorageError(f"cannot use {path}: {error}") from error
        self.prune()

    def close(self) -> None:
        """Close the file. Idempotent."""
        with self._lock:
            self._db.close()

    def prune(self) -> None:
        """Delete what is too old, and what is too much."""
        is_too_big = self._used_bytes() > self._max_bytes
        for table in _TIMED:
            self.run(f"DELETE FROM {table} WHERE used_s < ?", time.time() - self._ttl_s)
            ((num_rows,),) = self.run(f"SELECT count(*) FROM {table}")
            surplus = max(num_rows - self._max_rows, -(-num_rows // 10) if is_too_big else 0)
            if surplus > 0:
                # One row after the last that goes, or none: then all go.
                spared = f"SELECT used_s FROM {table} ORDER BY used_s LIMIT 1 OFFSET ?"
                limit = f"coalesce(({spared}), 1e30)"
                self.run(f"DELETE FROM {table} WHERE used_s < {limit}", surplus)
        self.run(_ORPHANS)

    def _used_bytes(self) -> int:
        ((pages,),), ((free,),) = self.run("PRAGMA page_count"), self.run("PRAGMA freelist_count")
        ((page_bytes,),) = self.run("PRAGMA page_size")
        return int((pages - free) * page_bytes)

    def run(self, statement: str, *values: Any) -> list[Any]:
        """Return the rows of a statement.

        Raises
        ------
        StorageError
            The disk is full, or failed.
        """
        try:
            with self._lock:
                return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"stored responses: {error}") from error

    def write(self, statement: str, *values: Any) -> None:
        """Add something, and look now and then for what has to go."""
        self.run(statement, *values)
        self._num_writes += 1
        if self._num_writes % _PRUNE_EVERY == 0:
            self.prune()
