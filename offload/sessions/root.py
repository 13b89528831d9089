"""One root folder, opened: its paths, its catalog, its ledger, and who we are in it."""

import fcntl
import logging
import os
import sqlite3
from pathlib import Path

from offload.errors import ConfigError, CorruptCatalog, SessionInUse
from offload.sessions.catalog import Catalog
from offload.sessions.garbage import collect
from offload.sessions.leases import bury_dead_owners
from offload.sessions.ledger import Ledger
from offload.sessions.owners import OwnerLock
from offload.sessions.paths import RootPaths, new_id
from offload.sessions.schema import check_row

_LOG = logging.getLogger(__name__)

DURABILITIES = ("none", "relaxed", "strict")


class Root:
    """A root folder in use by one owner. Any thread may call any method.

    Opening it buries owners that died, with what they were writing. The root stays locked, shared,
    so that nobody replaces the catalog meanwhile.

    Parameters
    ----------
    path : Path
        Made, for the user only, if it is missing.
    durability : {"none", "relaxed", "strict"}
    deadline_s : float
        Longest wait for one transfer.

    Raises
    ------
    ConfigError
        The folder cannot be used.
    CorruptCatalog
        The catalog is damaged where it shows.
    SessionInUse
        Somebody is making a new catalog just now.
    """

    def __init__(self, path: Path, durability: str = "relaxed", deadline_s: float = 120.0) -> None:
        if durability not in DURABILITIES:
            known = ", ".join(DURABILITIES)
            raise ConfigError(f"unknown durability {durability!r}; known: {known}")
        self.paths = RootPaths(Path(path).expanduser().absolute())
        self.deadline_s = deadline_s
        self.owner = new_id()
        self.syncs = durability != "none"
        self.is_strict = durability == "strict"
        self._pid = os.getpid()
        self.paths.make()
        self._lock_fd = lock_root(self.paths, exclusive=False)
        try:
            self.catalog = Catalog(self.paths.catalog, durability)
            try:
                self._register()
            except BaseException:
                self.catalog.close()
                raise
        except BaseException:
            os.close(self._lock_fd)
            raise
        self.ledger = Ledger(self.catalog, self.paths, self.owner)

    def _register(self) -> None:
        self._owner_lock = OwnerLock(self.paths.owner(self.owner))
        try:
            with self.catalog.transaction() as db:
                db.execute("INSERT INTO owners VALUES (?, ?)", (self.owner, os.getpid()))
                num_dead = bury_dead_owners(db, self.paths, self.owner)
            collect(self.catalog, self.paths)
        except BaseException:
            self._owner_lock.close()
            raise
        if num_dead:
            _LOG.info("%s: cleaned up after %d dead owners", self.paths.root, num_dead)

    def find(self, name: str) -> str | None:
        """Return the identity of the session with a name, or None."""
        rows = self.catalog.rows("SELECT * FROM sessions WHERE name = ?", name)
        if not rows:
            return None
        check_session_row(rows[0])
        return str(rows[0][0])

    def close(self) -> None:
        """Give up every lease. Idempotent; in a forked child they are not ours to give up."""
        if self._lock_fd < 0 or os.getpid() != self._pid:
            return
        try:
            with self.catalog.transaction() as db:
                _resign(db, self.owner)
            collect(self.catalog, self.paths)
        finally:
            self.catalog.close()
            self._owner_lock.close()
            os.close(self._lock_fd)
            self._lock_fd = -1


def check_session_row(row: tuple[object, ...]) -> None:
    """Raise CorruptCatalog if a row of ``sessions`` is not what was written."""
    stored = row[-1]
    if not isinstance(stored, int):
        raise CorruptCatalog(f"catalog: a session has the checksum {stored!r}")
    check_row("sessions", row[:-2], stored)


def lock_root(paths: RootPaths, *, exclusive: bool) -> int:
    """Lock a root, to use it (shared) or to replace its catalog; return the descriptor.

    Raises
    ------
    SessionInUse
        It is locked in a way that does not allow this.
    """
    fd = os.open(paths.rebuild_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        who = "in use by another cache or process" if exclusive else "being rebuilt"
        raise SessionInUse(f"{paths.root} is {who}") from error
    return fd


def _resign(db: sqlite3.Connection, owner: str) -> None:
    for table in ("leases", "reservations"):
        db.execute(f"DELETE FROM {table} WHERE owner = ?", (owner,))
    db.execute("DELETE FROM owners WHERE id = ?", (owner,))
