"""Leases: what living owners read, and what dead ones left behind."""

import sqlite3
from collections.abc import Iterable

from offload.sessions.owners import is_alive
from offload.sessions.paths import RootPaths, new_id, remove, temporary


def add_lease(
    db: sqlite3.Connection, owner: str, session: str | None, segments: Iterable[int]
) -> str:
    """Keep segments in place until the lease is dropped or its owner dies; return its name.

    Parameters
    ----------
    db : sqlite3.Connection
        In a transaction.
    owner : str
    session : str or None
        The session that is open with it, which is then not evicted.
    segments : iterable of int
    """
    lease = new_id()
    rows = [(owner, lease, session, segment) for segment in [None, *segments]]
    db.executemany("INSERT INTO leases VALUES (?, ?, ?, ?)", rows)
    return lease


def drop_lease(db: sqlite3.Connection, lease: str) -> None:
    """Let go of what a lease kept."""
    db.execute("DELETE FROM leases WHERE lease = ?", (lease,))


def bury_dead_owners(db: sqlite3.Connection, paths: RootPaths, own: str) -> int:
    """Undo what owners that are no longer alive had begun; return how many there were.

    Their leases and reservations go, and the files they were writing: a reservation names them
    before they are made, so none is missed.
    """
    owners = [owner for (owner,) in db.execute("SELECT id FROM owners WHERE id <> ?", (own,))]
    dead = [owner for owner in owners if not is_alive(paths.owner(owner))]
    for owner in dead:
        for segment, session in db.execute(
            "SELECT segment, session FROM reservations WHERE owner = ?", (owner,)
        ).fetchall():
            discard_unpublished(db, paths, segment, session)
        for table in ("leases", "reservations"):
            db.execute(f"DELETE FROM {table} WHERE owner = ?", (owner,))
        db.execute("DELETE FROM owners WHERE id = ?", (owner,))
        remove(paths.owner(owner))
    return len(dead)


def remove_stale_locks(db: sqlite3.Connection, paths: RootPaths) -> None:
    """Remove the files of owners that died before the catalog had heard of them."""
    known = {paths.owner(owner) for (owner,) in db.execute("SELECT id FROM owners")}
    for path in paths.owner_locks():
        if path not in known and not is_alive(path):
            remove(path)


def discard_unpublished(
    db: sqlite3.Connection, paths: RootPaths, segment: str, session: str
) -> None:
    """Remove the files of a reservation; of those the catalog lists, only what is temporary."""
    for path, query in (
        (paths.segment(segment), "SELECT 1 FROM segments WHERE name = ?"),
        (paths.session(session), "SELECT 1 FROM sessions WHERE id = ?"),
    ):
        is_listed = db.execute(query, (path.stem,)).fetchone() is not None
        remove(temporary(path) if is_listed else path)
