"""Mend what a check has found wrong with a session: forget it, or make its row again."""

from offload.sessions.garbage import forget_session
from offload.sessions.quarantine import quarantine_file
from offload.sessions.root import Root
from offload.sessions.session_rows import insert_row
from offload.types import round_up


def set_session_aside(root: Root, name: str) -> None:
    """Move the damaged file of a session to quarantine, and forget the session.

    Raises
    ------
    StorageError
        The file cannot be moved.
    """
    with root.catalog.transaction() as db:
        row = db.execute("SELECT id FROM sessions WHERE name = ?", (name,)).fetchone()
        if row is not None:
            quarantine_file(root.paths, root.paths.session(row[0]))
            forget_session(db, row[0])


def restore_row(root: Root, identity: str) -> str | None:
    """Make the damaged row of a session again, from its file.

    Returns
    -------
    str or None
        The name of the session. None: it is gone, or another session has its name by now.

    Raises
    ------
    CorruptChunk
        The file is damaged as well.
    """
    path = root.paths.session(identity)
    with root.catalog.transaction() as db:
        is_there = db.execute("SELECT 1 FROM sessions WHERE id = ?", (identity,)).fetchone()
        if is_there is None:
            return None
        file = root.read_session(identity)
        query = "SELECT 1 FROM sessions WHERE name = ? AND id <> ?"
        if db.execute(query, (file.name, identity)).fetchone() is not None:
            return None
        db.execute("DELETE FROM sessions WHERE id = ?", (identity,))
        insert_row(db, file, round_up(path.stat().st_size))
    return file.name
