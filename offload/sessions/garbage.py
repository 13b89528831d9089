"""Forgetting sessions, and giving back the space of what nobody needs any more.

In two transactions: first the catalog forgets, then files go. A crash between the two leaves
garbage that the catalog knows and counts; never a session whose files are gone.
"""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from offload.errors import CorruptCatalog, StorageError
from offload.sessions.catalog import Catalog
from offload.sessions.paths import RootPaths, allocated_bytes, remove
from offload.sessions.schema import check_row, checksum, integer
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

    A file that cannot be removed or punched stays garbage, and counted; the next call tries again.
    """
    pending = catalog.rows(
        "SELECT EXISTS (SELECT 1 FROM garbage_sessions) OR EXISTS (SELECT 1 FROM garbage_blocks)"
    )
    if not pending[0][0]:
        return
    with catalog.transaction() as db:
        for (identity,) in db.execute("SELECT id FROM garbage_sessions").fetchall():
            with _kept_on_error():
                remove(paths.session(identity))
                db.execute("DELETE FROM garbage_sessions WHERE id = ?", (identity,))
        for segment in _unleased(db):
            with _kept_on_error():
                _collect_segment(db, paths, segment)


def try_collect(catalog: Catalog, paths: RootPaths) -> None:
    """Collect garbage after something that has succeeded, and must not fail because of it."""
    try:
        collect(catalog, paths)
    except StorageError as error:
        _LOG.warning("garbage stays for now: %s", error)


@contextlib.contextmanager
def _kept_on_error() -> Iterator[None]:
    try:
        yield
    except CorruptCatalog:
        raise
    except StorageError as error:
        _LOG.warning("garbage stays for now: %s", error)


def _unleased(db: sqlite3.Connection) -> list[int]:
    """Return the segments with garbage that nobody reads."""
    rows = db.execute(
        "SELECT DISTINCT segment FROM garbage_blocks g WHERE NOT EXISTS "
        "(SELECT 1 FROM leases WHERE segment = g.segment)"
    ).fetchall()
    return [segment for (segment,) in rows]


def _collect_segment(db: sqlite3.Connection, paths: RootPaths, segment: int) -> None:
    row = db.execute("SELECT * FROM segments WHERE id = ?", (segment,)).fetchone()
    if row is None:
        raise CorruptCatalog(f"the catalog has garbage of segment {segment!r}, but no such segment")
    _, name, _, num_layers, num_positions, record_bytes, used_bytes, stored = row
    check_row("segments", row[1:-1], stored)
    path = paths.segment(name)
    if db.execute("SELECT 1 FROM blocks WHERE segment = ? LIMIT 1", (segment,)).fetchone() is None:
        remove(path)
        db.execute("DELETE FROM segments WHERE id = ?", (segment,))
    else:
        dead = _dead_positions(db, segment, num_positions)
        layers = range(0, num_layers * num_positions * record_bytes, num_positions * record_bytes)
        runs = [(first * record_bytes, count * record_bytes) for first, count in _runs(dead)]
        if _punch(path, [(layer + offset, size) for layer in layers for offset, size in runs]):
            # More than the file system gave back is never counted as given back.
            left = used_bytes - len(dead) * num_layers * record_bytes
            write_used_bytes(db, segment, max(left, min(used_bytes, allocated_bytes(path))))
    db.execute("DELETE FROM garbage_blocks WHERE segment = ?", (segment,))


def _dead_positions(db: sqlite3.Connection, segment: int, num_positions: int) -> list[int]:
    """Return the garbage of a segment; CorruptCatalog if that would punch what is alive."""
    rows = db.execute(
        "SELECT position, EXISTS (SELECT 1 FROM blocks b WHERE b.segment = g.segment "
        "AND b.position = g.position) FROM garbage_blocks g WHERE segment = ? ORDER BY position",
        (segment,),
    )
    dead = []
    for position, is_alive in rows:
        if is_alive or not 0 <= integer(position) < num_positions:
            raise CorruptCatalog(
                f"the catalog calls position {position} of segment {segment} garbage, of "
                f"{num_positions}; try `offload fsck --rebuild`"
            )
        dead.append(position)
    return dead


def _punch(path: Path, ranges: Iterable[tuple[int, int]]) -> bool:
    """Give ranges of a file back; False if the file system cannot.

    Space that does not come back now comes back with the last block of the segment.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise as_storage_error(error, f"cannot open {path}") from error
    try:
        for offset, num_bytes in ranges:
            code = punch_hole(fd, offset, num_bytes)
            if code:
                _LOG.warning("cannot punch holes into %s: %s", path, os.strerror(code))
                return False
    finally:
        os.close(fd)
    return True


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
