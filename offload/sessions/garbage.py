"""Forgetting sessions, and giving back the space of what nobody needs any more.

In two transactions: first the catalog forgets, then files go. A crash between the two leaves
garbage that the catalog knows and counts; never a session whose files are gone.
"""

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import groupby

from offload.sessions.catalog import Catalog
from offload.sessions.paths import RootPaths, remove
from offload.sessions.schema import check_row, checksum
from offload.tiers.punch import punch_hole
from offload.tiers.syscalls import as_storage_error

_LOG = logging.getLogger(__name__)


def forget_session(db: sqlite3.Connection, identity: str) -> None:
    """Remove a session from the catalog; what only it needed becomes garbage."""
    db.execute(
        "INSERT INTO garbage_sessions SELECT id, file_bytes FROM sessions WHERE id = ?", (identity,)
    )
    db.execute("DELETE FROM sessions WHERE id = ?", (identity,))
    blocks = db.execute(
        "SELECT DISTINCT block FROM session_blocks WHERE session = ?", (identity,)
    ).fetchall()
    db.execute("DELETE FROM session_blocks WHERE session = ?", (identity,))
    for block in blocks:
        used = db.execute("SELECT 1 FROM session_blocks WHERE block = ? LIMIT 1", block).fetchone()
        if used is None:
            db.execute(
                "INSERT OR IGNORE INTO garbage_blocks "
                "SELECT segment, position FROM blocks WHERE id = ?",
                block,
            )
            db.execute("DELETE FROM blocks WHERE id = ?", block)


def collect(catalog: Catalog, paths: RootPaths) -> None:
    """Remove and punch the files of garbage that nobody holds a lease on.

    A file that cannot be removed stays garbage, and counted; the next call tries again.
    """
    pending = catalog.rows(
        "SELECT (SELECT count(*) FROM garbage_sessions), (SELECT count(*) FROM garbage_blocks), "
        "(SELECT count(*) FROM segments s WHERE NOT EXISTS "
        "(SELECT 1 FROM blocks WHERE segment = s.id))"
    )
    if not any(pending[0]):
        return
    with catalog.transaction() as db:
        for (identity,) in db.execute("SELECT id FROM garbage_sessions").fetchall():
            remove(paths.session(identity))
            db.execute("DELETE FROM garbage_sessions WHERE id = ?", (identity,))
        for segment in _unleased(db):
            _collect_segment(db, paths, segment)


def _unleased(db: sqlite3.Connection) -> list[int]:
    """Return the segments with garbage, or with nothing else, that nobody reads."""
    rows = db.execute(
        "SELECT s.id FROM segments s WHERE NOT EXISTS "
        "(SELECT 1 FROM leases WHERE segment = s.id) AND ("
        "EXISTS (SELECT 1 FROM garbage_blocks WHERE segment = s.id) OR "
        "NOT EXISTS (SELECT 1 FROM blocks WHERE segment = s.id))"
    ).fetchall()
    return [segment for (segment,) in rows]


def _collect_segment(db: sqlite3.Connection, paths: RootPaths, segment: int) -> None:
    row = db.execute("SELECT * FROM segments WHERE id = ?", (segment,)).fetchone()
    _, name, _, num_layers, num_positions, record_bytes, used_bytes, stored = row
    check_row("segments", row[1:-1], stored)
    path = paths.segment(name)
    alive = db.execute("SELECT 1 FROM blocks WHERE segment = ? LIMIT 1", (segment,)).fetchone()
    dead = [
        position
        for (position,) in db.execute(
            "SELECT position FROM garbage_blocks WHERE segment = ? ORDER BY position", (segment,)
        )
    ]
    db.execute("DELETE FROM garbage_blocks WHERE segment = ?", (segment,))
    if alive is None:
        remove(path)
        db.execute("DELETE FROM segments WHERE id = ?", (segment,))
        return
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise as_storage_error(error, f"cannot open {path}") from error
    try:
        for layer in range(num_layers):
            for first, count in _runs(dead):
                offset = (layer * num_positions + first) * record_bytes
                code = punch_hole(fd, offset, count * record_bytes)
                if code:
                    # Its space comes back with the last block of the segment.
                    _LOG.warning("cannot punch holes into %s: %s", path, os.strerror(code))
                    return
    finally:
        os.close(fd)
    used_bytes -= len(dead) * num_layers * record_bytes
    write_used_bytes(db, segment, used_bytes)


def write_used_bytes(db: sqlite3.Connection, segment: int, used_bytes: int) -> None:
    """Note what a segment takes up now."""
    row = db.execute(
        "SELECT name, namespace, num_layers, num_positions, record_bytes FROM segments "
        "WHERE id = ?",
        (segment,),
    ).fetchone()
    db.execute(
        "UPDATE segments SET used_bytes = ?, checksum = ? WHERE id = ?",
        (used_bytes, checksum(*row, used_bytes), segment),
    )


def _runs(positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each run of consecutive numbers."""
    for _, run in groupby(enumerate(positions), lambda pair: pair[1] - pair[0]):
        members = [position for _, position in run]
        yield members[0], len(members)
