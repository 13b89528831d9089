"""The SQLite catalog of a root: one connection, its transactions, and its settings."""

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offload.errors import ClosedError, CorruptCatalog, DiskFull, StorageError
from offload.sessions.schema import TABLES, VERSION, check_row, checksum

_BUSY_S = 60.0
_SYNCHRONOUS = {"none": "OFF", "relaxed": "NORMAL", "strict": "FULL"}
_WAL_BYTES = 1 << 20

Row = tuple[Any, ...]


class Catalog:
    """One connection to the database. Any thread may call any method; transactions take turns.

    Several processes may have the same catalog open: SQLite's write-ahead log orders them.

    Parameters
    ----------
    path : Path
        Made if it is missing.
    durability : {"none", "relaxed", "strict"}
        What of the last transactions a power cut may undo: ``strict`` nothing.

    Raises
    ------
    CorruptCatalog
        The file is no catalog, or damaged where SQLite or we can see it.
    """

    def __init__(self, path: Path, durability: str) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._is_open = True
        with _translated(path):
            _make_private(path)
            self._db = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up(_SYNCHRONOUS[durability])
            except BaseException:
                self._db.close()
                raise

    def _set_up(self, synchronous: str) -> None:
        self._db.execute("PRAGMA cell_size_check = ON")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {synchronous}")
        self._db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        self._db.execute("PRAGMA wal_autocheckpoint = 256")
        self._db.execute("BEGIN IMMEDIATE")
        [found] = self._db.execute("PRAGMA user_version").fetchone()
        [num_tables] = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if found == 0 and num_tables == 0:
            for statement in TABLES.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
        elif found != VERSION:
            raise CorruptCatalog(
                f"{self.path} has version {found}, this code reads {VERSION}; "
                "`offload fsck --rebuild` makes a new catalog from the files"
            )
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Read and write all or nothing, alone among all processes.

        Raises
        ------
        CorruptCatalog
        DiskFull
        StorageError
            Another process kept the catalog locked for a minute.
        """
        with self._lock, _translated(self.path):
            self._check_open()
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def rows(self, query: str, *values: object) -> list[Row]:
        """Return what a query finds."""
        with self._lock, _translated(self.path):
            self._check_open()
            return self._db.execute(query, values).fetchall()

    @property
    def num_bytes(self) -> int:
        """Bytes of the database and its log."""
        paths = (self.path.with_name(self.path.name + end) for end in ("", "-wal", "-shm"))
        return sum(path.stat().st_size for path in paths if path.exists())

    def close(self) -> None:
        """Close the connection. Idempotent; in a forked child it is not ours to close."""
        with self._lock:
            if self._is_open and os.getpid() == self._pid:
                self._is_open = False
                self._db.close()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ClosedError("the session store is closed")
        if os.getpid() != self._pid:
            raise ClosedError("a session store cannot be used in a forked process; open it again")


def get_meta(db: sqlite3.Connection, key: str) -> str | None:
    """Return a setting of the root, or None."""
    row = db.execute("SELECT value, checksum FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    check_row("meta", (key, row[0]), row[1])
    return str(row[0])


def set_meta(db: sqlite3.Connection, key: str, value: str) -> None:
    """Keep a setting of the root, for all processes."""
    db.execute("REPLACE INTO meta VALUES (?, ?, ?)", (key, value, checksum(key, value)))


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            raise DiskFull(f"{path}: {error}") from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
            raise StorageError(f"{path}: {error} ({name})") from error
        raise CorruptCatalog(f"{path}: {error}; try `offload fsck --rebuild`") from error
    except (sqlite3.DatabaseError, OverflowError, UnicodeDecodeError) as error:
        raise CorruptCatalog(f"{path}: {error}; try `offload fsck --rebuild`") from error


def _make_private(path: Path) -> None:
    """Make the file before SQLite does, so that it and its log are for the owner only."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
