"""The tables of the catalog, and checksums for the rows that no record can contradict.

A wrong pointer into a segment is found when the record is read: it names its chunk. What a row says
about a session or a segment itself (its name, when it expires, what it takes up) is checked here,
because SQLite has no checksums of its own.
"""

import json
import sqlite3

import xxhash

from offload.errors import CorruptCatalog

VERSION = 1
SEALED_VERSION = 2
"""Of roots whose content is encrypted; the tables are the same."""

TABLES = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE owners (id TEXT PRIMARY KEY, pid INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE namespaces (
    digest BLOB PRIMARY KEY,
    model BLOB NOT NULL,
    layout TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX namespaces_by_model ON namespaces (model);
CREATE TABLE segments (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    namespace BLOB NOT NULL,
    num_layers INTEGER NOT NULL,
    num_positions INTEGER NOT NULL,
    record_bytes INTEGER NOT NULL,
    used_bytes INTEGER NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE TABLE blocks (
    id INTEGER PRIMARY KEY,
    key BLOB UNIQUE,
    segment INTEGER NOT NULL,
    position INTEGER NOT NULL,
    is_bad INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX blocks_by_segment ON blocks (segment, position);
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    namespace BLOB NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_rows INTEGER NOT NULL,
    num_chunks INTEGER NOT NULL,
    file_bytes INTEGER NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    is_pinned INTEGER NOT NULL,
    used_at REAL NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE session_blocks (
    session TEXT NOT NULL,
    number INTEGER NOT NULL,
    block INTEGER NOT NULL,
    PRIMARY KEY (session, number)
) WITHOUT ROWID;
CREATE INDEX sessions_by_block ON session_blocks (block);
CREATE TABLE leases (owner TEXT NOT NULL, lease TEXT NOT NULL, session TEXT, segment INTEGER);
CREATE INDEX leases_by_segment ON leases (segment);
CREATE TABLE reservations (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    segment TEXT NOT NULL,
    session TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE garbage_blocks (segment INTEGER, position INTEGER, PRIMARY KEY (segment, position))
    WITHOUT ROWID;
CREATE TABLE garbage_sessions (id TEXT PRIMARY KEY, file_bytes INTEGER NOT NULL) WITHOUT ROWID;
"""
"""A block is one chunk of every layer: the same tokens, side by side in one segment. Reference
counts are the rows of ``session_blocks``. Garbage still takes up space, and is counted, until its
file is gone or punched."""


def checksum(*values: object) -> int:
    """Return the checksum of a row, as SQLite stores it (signed)."""
    text = json.dumps([value.hex() if isinstance(value, bytes) else value for value in values])
    return xxhash.xxh3_64_intdigest(text.encode()) - (1 << 63)


def check_row(table: str, values: tuple[object, ...], stored: object) -> None:
    """Raise CorruptCatalog if a row is not what was written."""
    found = checksum(*values)
    if found != stored:
        raise CorruptCatalog(
            f"catalog: a row of {table} has checksum {found}, stored is {stored!r}; "
            "`offload fsck --rebuild` makes a new catalog from the files"
        )


def check_session_row(row: tuple[object, ...], name: object = None) -> None:
    """Raise CorruptCatalog if a row of ``sessions`` is not what was written.

    Parameters
    ----------
    row : tuple
    name : str, optional
        Under which the row was found: an index can be damaged while the row is not.
    """
    check_row("sessions", row[:-2], row[-1])
    if name is not None and row[1] != name:
        raise CorruptCatalog(
            f"catalog: session {row[1]!r} was found under the name {name!r}; "
            "`offload fsck --rebuild` makes a new catalog from the files"
        )


def check_schema(db: sqlite3.Connection) -> None:
    """Raise CorruptCatalog if the tables are not as they were made."""
    found = {sql for (sql,) in db.execute("SELECT sql FROM sqlite_master") if sql is not None}
    if found != set(statements()):
        raise CorruptCatalog(
            "catalog: the tables are not those of this version; "
            "`offload fsck --rebuild` makes a new catalog from the files"
        )


def statements() -> list[str]:
    """Return the statements that make the tables."""
    return [text.strip() for text in TABLES.split(";") if text.strip()]


def integer(value: object) -> int:
    """Return a number of the catalog; CorruptCatalog if it is none."""
    if not isinstance(value, int):
        raise CorruptCatalog(f"the catalog has {value!r} where a number belongs")
    return value
