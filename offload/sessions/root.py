"""One root folder, opened: its paths, its catalog, its ledger, and who we are in it."""

import fcntl
import logging
import os
import sqlite3
from pathlib import Path

from offload.errors import ConfigError, SessionInUse, SessionNotFound, StorageError
from offload.sessions.catalog import Catalog, remove_catalog
from offload.sessions.garbage import collect, try_collect
from offload.sessions.key_file import open_root_key
from offload.sessions.leases import bury_dead_owners, drop_lease, remove_stale_locks
from offload.sessions.ledger import Ledger
from offload.sessions.owners import OwnerLock
from offload.sessions.paths import RootPaths, new_id
from offload.sessions.schema import check_session_row
from offload.sessions.session_file import SessionFile, read_session_file
from offload.tiers.record import RecordFormat
from offload.types import ChunkLayout

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
    key : bytes, optional
        Seals all content; see ``key_file``.

    Attributes
    ----------
    sealer : Sealer or None

    Raises
    ------
    ConfigError
        The folder cannot be used, or a newer version of this package has used it; or the key is
        not that of the root.
    CorruptCatalog
        The catalog is damaged where it shows, or is missing though there are files.
    SessionInUse
        Somebody is making a new catalog just now.
    """

    def __init__(
        self,
        path: Path,
        durability: str = "relaxed",
        deadline_s: float = 120.0,
        key: bytes | None = None,
    ) -> None:
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
            is_new = next(self.paths.data_files(), None) is None
            self.sealer = open_root_key(self.paths, key)
            self.catalog = Catalog(
                self.paths.catalog,
                durability,
                may_create=is_new,
                is_sealed=self.sealer is not None,
            )
            try:
                remove_catalog(self.paths.new_catalog)  # of a rebuild that was killed
                self._register()
            except BaseException:
                self.catalog.close()
                raise
        except BaseException:
            os.close(self._lock_fd)
            raise
        self.ledger = Ledger(self.catalog, self.paths, self.owner)

    def _register(self) -> None:
        self._owner_lock: OwnerLock | None = None
        try:
            with self.catalog.transaction() as db:
                self._owner_lock = OwnerLock(self.paths.owner(self.owner))
                db.execute("INSERT INTO owners VALUES (?, ?)", (self.owner, os.getpid()))
                num_dead = bury_dead_owners(db, self.paths, self.owner)
                remove_stale_locks(db, self.paths)
            collect(self.catalog, self.paths)
        except BaseException:
            if self._owner_lock is not None:
                self._owner_lock.close()
            raise
        if num_dead:
            _LOG.info("%s: cleaned up after %d dead owners", self.paths.root, num_dead)

    def read_session(self, identity: str) -> SessionFile:
        """Return what the file of a session says.

        Raises
        ------
        CorruptChunk
        """
        return read_session_file(self.paths.session(identity), self.sealer)

    def format_of(self, layout: ChunkLayout, fingerprint: bytes) -> RecordFormat:
        """Return what the records of a namespace look like here."""
        return RecordFormat(layout, fingerprint, self.sealer)

    def first_key(self, namespace: bytes) -> bytes:
        """Return what the keys of chunks are chained to, given the digest of their namespace.

        Where content is sealed only who has the key can tell it, so that nobody else can try out
        which tokens the keys in the catalog, and the ids in the records, stand for.
        """
        return namespace if self.sealer is None else self.sealer.derive("chunks", namespace)

    def find(self, name: str) -> str | None:
        """Return the identity of the session with a name, or None."""
        rows = self.catalog.rows("SELECT * FROM sessions WHERE name = ?", name)
        if not rows:
            return None
        check_session_row(rows[0], name)
        return str(rows[0][0])

    def identify(self, name: str) -> str:
        """Return the identity of the session with a name.

        Raises
        ------
        SessionNotFound
        """
        identity = self.find(name)
        if identity is None:
            [[count]] = self.catalog.rows("SELECT count(*) FROM sessions")
            raise SessionNotFound(f"{self.paths.root} has no session {name!r} among its {count}")
        return identity

    def drop_lease(self, lease: str) -> None:
        """Let go of what a lease kept in place, and of its space if nobody else needs it.

        Where the catalog cannot be written, it ends when the root is closed.
        """
        try:
            with self.catalog.transaction() as db:
                drop_lease(db, lease)
        except StorageError as error:
            _LOG.warning("%s: a lease is kept for now: %s", self.paths.root, error)
        else:
            try_collect(self.catalog, self.paths)

    @property
    def is_open(self) -> bool:
        """Whether there are leases to give up; in a forked child they are not ours."""
        return self._lock_fd >= 0 and os.getpid() == self._pid

    def close(self) -> None:
        """Give up every lease. Idempotent; does nothing in a forked child."""
        if not self.is_open:
            return
        try:
            with self.catalog.transaction() as db:
                _resign(db, self.owner)
            collect(self.catalog, self.paths)
        except StorageError as error:
            # Whoever opens the root next finds the lock free, and cleans up after us.
            _LOG.warning("%s: leases are left to the next user: %s", self.paths.root, error)
        finally:
            self.catalog.close()
            if self._owner_lock is not None:
                self._owner_lock.close()
            os.close(self._lock_fd)
            self._lock_fd = -1


def lock_root(paths: RootPaths, *, exclusive: bool) -> int:
    """Lock a root, to use it (shared) or to replace its catalog; return the descriptor.

    Raises
    ------
    SessionInUse
        It is locked in a way that does not allow this.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(paths.rebuild_lock, flags, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot use {paths.root}: {error.strerror}") from error
    try:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        who = "in use by another cache or process" if exclusive else "being rebuilt"
        raise SessionInUse(f"{paths.root} is {who}") from error
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"cannot lock {paths.rebuild_lock}: {error.strerror}") from error
    return fd


def _resign(db: sqlite3.Connection, owner: str) -> None:
    for table in ("leases", "reservations"):
        db.execute(f"DELETE FROM {table} WHERE owner = ?", (owner,))
    db.execute("DELETE FROM owners WHERE id = ?", (owner,))
