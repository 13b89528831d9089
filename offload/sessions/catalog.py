"""The SQLite catalog of a root: one connection, its transactions, and its settings."""

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path
from typing import Any

from offload.errors import (
    ClosedError,
    ConfigError,
    CorruptCatalog,
    DiskFull,
    OffloadError,
    StorageError,
)
from offload.sessions.paths import allocated_bytes, remove
from offload.sessions.schema import (
    SEALED_VERSION,
    VERSION,
    check_row,
    check_schema,
    checksum,
    statements,
)
from offload.tiers.punch import reserve
from offload.tiers.syscalls import as_storage_error

_LOG = logging.getLogger(__name__)

_BUSY_S = 60.0
_SYNCHRONOUS = {"none": "OFF", "relaxed": "NORMAL", "strict": "FULL"}
_WAL_BYTES = 1 << 20
_NO_SPACE = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
_NO_FAULT_OF_THE_FILE = tuple(
    f"SQLITE_{name}"
    for name in ("BUSY", "LOCKED", "PROTOCOL", "IOERR", "CANTOPEN", "READONLY", "PERM", "NOMEM")
)

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
    may_create : bool
        Whether an empty catalog is a new one, or one that has lost everything.
    is_sealed : bool
        Whether it is that of a root whose content is encrypted.

    Raises
    ------
    CorruptCatalog
        The file is no catalog, or damaged where SQLite or we can see it.
    ConfigError
        A newer version of this package has made it, or it is encrypted where it should not be, or
        the other way round.
    """

    def __init__(
        self, path: Path, durability: str, *, may_create: bool = True, is_sealed: bool = False
    ) -> None:
        self.path = path
        self._version = SEALED_VERSION if is_sealed else VERSION
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._is_open = True
        with _translated(path):
            _make_private(path)
            self._db = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._set_up(_SYNCHRONOUS[durability], may_create)
            except BaseException:
                self._db.close()
                raise

    def _set_up(self, synchronous: str, may_create: bool) -> None:
        self._db.execute("PRAGMA cell_size_check = ON")
        self._db.execute("PRAGMA trusted_schema = OFF")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {synchronous}")
        self._db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        self._db.execute("PRAGMA wal_autocheckpoint = 256")
        self._db.execute("BEGIN IMMEDIATE")
        [found] = self._db.execute("PRAGMA user_version").fetchone()
        [num_tables] = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if found == 0 and num_tables == 0:
            if not may_create:
                raise CorruptCatalog(f"{self.path} is missing or empty, though there are sessions")
            for statement in statements():
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {self._version}")
        elif found in (VERSION, SEALED_VERSION) and found != self._version:
            # As a number, so that versions of this package without encryption stay away.
            kind = "encrypted" if found == SEALED_VERSION else "not encrypted"
            raise ConfigError(f"{self.path} is that of a session store that is {kind}")
        elif found > SEALED_VERSION:
            # Not CorruptCatalog: a rebuild would take what a newer version has written for damage.
            raise ConfigError(
                f"{self.path} has version {found}, this code reads {VERSION}; if no newer version "
                "of this package has used it, `offload fsck --rebuild` makes a new one"
            )
        elif found != self._version:
            raise CorruptCatalog(
                f"{self.path} has version {found}, this code reads {VERSION}; "
                "`offload fsck --rebuild` makes a new catalog from the files"
            )
        check_schema(self._db)
        self._db.execute("COMMIT")
        self._reserve_log()

    def _reserve_log(self) -> None:
        """Set space aside for the log, so that sessions on a full disk can be opened.

        SQLite has no lock on its log that closing this descriptor could drop.
        """
        log = self.path.with_name(self.path.name + "-wal")
        try:
            fd = os.open(log, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return  # where memory cannot be shared, SQLite keeps a journal instead
        try:
            code = reserve(fd, _WAL_BYTES)
        finally:
            os.close(fd)
        if code:
            _LOG.debug("no space set aside for %s: %s", log, os.strerror(code))

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
        """Bytes that the database and its log take up."""
        return sum(map(allocated_bytes, catalog_files(self.path)))

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


def catalog_files(path: Path) -> list[Path]:
    """Return the names of a database and of what SQLite keeps beside it."""
    return [path.with_name(path.name + end) for end in ("", "-wal", "-shm")]


def remove_catalog(path: Path) -> None:
    """Remove a database that nobody has open, if it is there."""
    for file in catalog_files(path):
        remove(file)


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
    """Turn SQLite's errors, and the system's, into ours."""
    try:
        yield
    except OffloadError:
        raise
    except OSError as error:
        raise as_storage_error(error, f"{path}, or a file beside it") from error
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name in _NO_SPACE:
            raise DiskFull(ENOSPC, f"{path}: {error} ({name})") from error
        if name.startswith(_NO_FAULT_OF_THE_FILE):
            raise StorageError(f"{path}: {error} ({name})") from error
        raise CorruptCatalog(f"{path}: {error}; try `offload fsck --rebuild`") from error
    except (OverflowError, UnicodeDecodeError) as error:
        raise CorruptCatalog(f"{path}: {error}; try `offload fsck --rebuild`") from error


def _make_private(path: Path) -> None:
    """Make the file before SQLite does, so that it and its log are for the owner only.

    One that is there is not opened: closing it would drop every POSIX lock this process has on it,
    and other processes would take a connection that is open here for closed.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, flags, 0o600))
    if path.is_symlink():
        raise ConfigError(f"{path} is a link; a catalog lies in its root")
