"""Change what a session is called, how long it lives, and whether it is pinned."""

import sqlite3
from collections.abc import Mapping
from typing import Any

from offload.errors import ConfigError, SessionInUse
from offload.sessions.paths import new_id, publish, temporary
from offload.sessions.root import Root
from offload.sessions.schema import check_session_row, checksum, integer
from offload.sessions.session_file import renamed, write_session_file
from offload.types import PAGE_BYTES

_MAX_TRIES = 8
"""Others may replace a session while we make room for its new file, but hardly so often."""


def change_session(root: Root, name: str, changes: Mapping[str, Any]) -> None:
    """Change ``name``, ``expires_at`` or ``is_pinned``, in the session's file and in the catalog.

    The new file is written in the transaction that publishes it, so two changes at once cannot
    undo each other.

    Raises
    ------
    ConfigError
        The new name is taken.
    SessionNotFound
    CorruptChunk
        The session's file is damaged.
    DiskFull, StorageError
        Nothing has changed.
    """
    for _ in range(_MAX_TRIES):
        identity = root.identify(name)
        reservation = _reserve_copy(root, identity)
        try:
            with root.catalog.transaction() as db:
                db.execute("DELETE FROM reservations WHERE id = ?", (reservation,))
                row = db.execute("SELECT * FROM sessions WHERE name = ?", (name,)).fetchone()
                if row is not None and row[0] == identity:
                    check_session_row(row, name)
                    _refuse_taken(db, name, changes)
                    _rewrite(root, db, row, changes)
                    return
        except BaseException:
            root.ledger.cancel(reservation)
            raise
    raise SessionInUse(f"session {name!r} was replaced {_MAX_TRIES} times; nothing was changed")


def _refuse_taken(db: sqlite3.Connection, name: str, changes: Mapping[str, Any]) -> None:
    new_name = changes.get("name", name)
    query = "SELECT 1 FROM sessions WHERE name = ? AND name <> ?"
    if db.execute(query, (new_name, name)).fetchone() is not None:
        raise ConfigError(f"there is a session {new_name!r} already")


def _rewrite(
    root: Root, db: sqlite3.Connection, row: tuple[Any, ...], changes: Mapping[str, Any]
) -> None:
    path = root.paths.session(row[0])
    # What the catalog says counts: a crash may have left the file one change ahead.
    known = {"name": row[1], "expires_at": row[8], "is_pinned": bool(row[9])}
    file = renamed(root.read_session(row[0]), **{**known, **changes})
    try:
        file_bytes = write_session_file(temporary(path), file, root.sealer, sync=root.syncs)
        values = (row[0], file.name, *row[2:6], file_bytes, row[7], file.expires_at)
        values = (*values, int(file.is_pinned))
        db.execute(
            "UPDATE sessions SET name = ?, file_bytes = ?, expires_at = ?, is_pinned = ?, "
            "checksum = ? WHERE id = ?",
            (file.name, file_bytes, file.expires_at, values[-1], checksum(*values), row[0]),
        )
        publish(path, durable=root.is_strict)
    except BaseException:
        temporary(path).unlink(missing_ok=True)
        raise


def _reserve_copy(root: Root, identity: str) -> str:
    """Reserve space for a second file of a session, whose new name may take another page."""
    rows = root.catalog.rows("SELECT file_bytes FROM sessions WHERE id = ?", identity)
    size = integer(rows[0][0]) if rows else 0
    reservation = new_id()
    root.ledger.reserve(
        size + PAGE_BYTES, new_id(), identity, keep=identity, reservation=reservation
    )
    return reservation
