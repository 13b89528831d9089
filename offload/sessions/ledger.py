"""Space: the quota of a root, reservations against it, and whom to evict."""

import os
import sqlite3
import time
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC

from offload.config import format_size
from offload.errors import ConfigError, DiskFull
from offload.sessions.catalog import Catalog, get_meta, set_meta
from offload.sessions.garbage import collect, forget_session
from offload.sessions.leases import bury_dead_owners
from offload.sessions.paths import RootPaths, allocated_bytes
from offload.sessions.schema import check_session_row

OVERHEAD_BYTES = 8 << 20
"""Set aside for the catalog, its log, the folders and quarantine; more if these are larger."""
_LOG_BYTES = 4 << 20
DEFAULT_MIN_FREE_BYTES = 1 << 30

_EVICTABLE = (
    "(s.is_pinned = 0 OR coalesce(s.expires_at < ?1, 0)) AND s.id IS NOT ?2 "
    "AND NOT EXISTS (SELECT 1 FROM leases WHERE session = s.id)"
)
"""Of a session ``s``: neither pinned (unless expired), nor the one to keep, nor open."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Space of a root, in bytes.

    Attributes
    ----------
    quota_bytes : int
    used_bytes : int
        All that counts: segments, session files, garbage, reservations, the overhead.
    reserved_bytes : int
        Of saves under way.
    garbage_bytes : int
        Forgotten, but still read by somebody.
    min_free_bytes : int
    free_bytes : int
        Of the file system.
    num_sessions : int
    """

    quota_bytes: int
    used_bytes: int
    reserved_bytes: int
    garbage_bytes: int
    min_free_bytes: int
    free_bytes: int
    num_sessions: int


class Ledger:
    """Keeps a root within its quota. Any thread or process may call any method.

    The quota counts what is on disk, what saves under way have reserved, and an overhead for the
    catalog and folders. It is kept in the catalog, so it holds for every process and after a
    restart.

    Parameters
    ----------
    catalog : Catalog
    paths : RootPaths
    owner : str
    """

    def __init__(self, catalog: Catalog, paths: RootPaths, owner: str) -> None:
        self._catalog = catalog
        self._paths = paths
        self._owner = owner

    def configure(self, quota_bytes: int | None, min_free_bytes: int | None) -> None:
        """Set what is given; on a new root, choose what is not.

        Raises
        ------
        ConfigError
            The quota is smaller than the overhead.
        """
        if quota_bytes is not None and quota_bytes <= OVERHEAD_BYTES:
            raise ConfigError(
                f"quota of {format_size(quota_bytes)}: the catalog alone is granted "
                f"{format_size(OVERHEAD_BYTES)}"
            )
        with self._catalog.transaction() as db:
            if quota_bytes is not None or get_meta(db, "quota_bytes") is None:
                half = max(2 * OVERHEAD_BYTES, self._free_bytes() // 2)
                set_meta(db, "quota_bytes", str(quota_bytes or half))
            if min_free_bytes is not None or get_meta(db, "min_free_bytes") is None:
                given = DEFAULT_MIN_FREE_BYTES if min_free_bytes is None else min_free_bytes
                set_meta(db, "min_free_bytes", str(given))

    def usage(self) -> Usage:
        """Return how much space there is, and who has it."""
        with self._catalog.transaction() as db:
            return self._usage(db)

    def reserve(
        self,
        num_bytes: int,
        segment: str,
        session: str,
        keep: str | None,
        *,
        reservation: str | None = None,
    ) -> None:
        """Set space aside for a save, evicting sessions that are not pinned, open, or ``keep``.

        Expired sessions go first, then the least recently used. Nothing is evicted unless it is
        going to be enough.

        Parameters
        ----------
        num_bytes : int
        segment, session : str
            The files about to be written, which are removed if their owner dies.
        keep : str or None
            Identity of a session that is about to be replaced.
        reservation : str, optional
            Its name; by default that of the session.

        Raises
        ------
        DiskFull
            Says what there is, and what was asked.
        """
        while True:
            with self._catalog.transaction() as db:
                missing = self._missing(db, num_bytes)
                if missing > 0 and bury_dead_owners(db, self._paths, self._owner):
                    missing = self._missing(db, num_bytes)
                if missing <= 0:
                    db.execute(
                        "INSERT INTO reservations VALUES (?, ?, ?, ?, ?)",
                        (reservation or session, self._owner, num_bytes, segment, session),
                    )
                    return
                for victim in self._victims(db, missing, num_bytes, keep):
                    forget_session(db, victim)
            collect(self._catalog, self._paths)

    def cancel(self, reservation: str) -> None:
        """Give back what was set aside."""
        with self._catalog.transaction() as db:
            db.execute("DELETE FROM reservations WHERE id = ?", (reservation,))

    def has_room_aside(self, num_bytes: int) -> bool:
        """Whether so much more can be put into quarantine."""
        usage = self.usage()
        more = self._overhead_bytes(num_bytes) - self._overhead_bytes()
        return usage.used_bytes + more <= usage.quota_bytes

    def _missing(self, db: sqlite3.Connection, num_bytes: int) -> int:
        """Return how many bytes short the quota or the device is."""
        usage = self._usage(db)
        over_quota = usage.used_bytes + num_bytes - usage.quota_bytes
        promised = usage.reserved_bytes + num_bytes + usage.min_free_bytes
        return max(over_quota, promised - usage.free_bytes)

    def _victims(
        self, db: sqlite3.Connection, missing: int, num_bytes: int, keep: str | None
    ) -> list[str]:
        """Return sessions to evict, in order; raises if even all of them would not be enough."""
        candidates = db.execute(
            f"SELECT * FROM sessions s WHERE {_EVICTABLE} "
            "ORDER BY coalesce(expires_at < ?1, 0) DESC, used_at, id",
            (time.time(), keep),
        ).fetchall()
        victims: list[str] = []
        gained = 0
        for row in candidates:
            check_session_row(row)  # a flipped bit must not unpin a session
            victims.append(row[0])
            gained += _gain(db, row[0])
            if gained >= missing:
                return victims
        # What two of them share comes back only with both, and has not been counted.
        if not victims or _gain_of_all(db, keep) < missing:
            raise self._full(db, num_bytes, missing)
        return victims

    def _full(self, db: sqlite3.Connection, num_bytes: int, missing: int) -> DiskFull:
        usage = self._usage(db)
        is_quota = usage.used_bytes + num_bytes > usage.quota_bytes
        return DiskFull(
            EDQUOT if is_quota else ENOSPC,
            f"{self._paths.root}: {format_size(num_bytes)} needed, {format_size(missing)} missing, "
            f"and no session that is neither pinned nor open would free them: "
            f"{format_size(usage.used_bytes)} used of the quota of "
            f"{format_size(usage.quota_bytes)}, {format_size(usage.reserved_bytes)} of it "
            f"reserved, {format_size(usage.garbage_bytes)} deleted but still read; "
            f"{format_size(usage.free_bytes)} free on the device, of which "
            f"{format_size(usage.min_free_bytes)} are to stay free",
        )

    def _usage(self, db: sqlite3.Connection) -> Usage:
        [segments] = db.execute("SELECT coalesce(sum(used_bytes), 0) FROM segments").fetchone()
        num, files = db.execute(
            "SELECT count(*), coalesce(sum(file_bytes), 0) FROM sessions"
        ).fetchone()
        [dead_files] = db.execute(
            "SELECT coalesce(sum(file_bytes), 0) FROM garbage_sessions"
        ).fetchone()
        [dead_blocks] = db.execute(
            "SELECT coalesce(sum(s.num_layers * s.record_bytes), 0) "
            "FROM garbage_blocks g JOIN segments s ON s.id = g.segment"
        ).fetchone()
        [reserved] = db.execute("SELECT coalesce(sum(num_bytes), 0) FROM reservations").fetchone()
        return Usage(
            quota_bytes=int(get_meta(db, "quota_bytes") or 0),
            used_bytes=segments + files + dead_files + reserved + self._overhead_bytes(),
            reserved_bytes=reserved,
            garbage_bytes=dead_blocks + dead_files,
            min_free_bytes=int(get_meta(db, "min_free_bytes") or 0),
            free_bytes=self._free_bytes(),
            num_sessions=num,
        )

    def _overhead_bytes(self, more_aside: int = 0) -> int:
        aside = sum(map(allocated_bytes, self._paths.quarantine.iterdir()))
        return max(OVERHEAD_BYTES, self._catalog.num_bytes + _LOG_BYTES + aside + more_aside)

    def _free_bytes(self) -> int:
        found = os.statvfs(self._paths.root)
        return found.f_bavail * found.f_frsize


def _gain_of_all(db: sqlite3.Connection, keep: str | None) -> int:
    """Return the bytes that come back if every session goes that may."""
    [blocks] = db.execute(
        "SELECT coalesce(sum(g.num_layers * g.record_bytes), 0) "
        "FROM blocks b JOIN segments g ON g.id = b.segment "
        "WHERE NOT EXISTS (SELECT 1 FROM leases WHERE segment = b.segment) "
        "AND NOT EXISTS (SELECT 1 FROM session_blocks m JOIN sessions s ON s.id = m.session "
        f"WHERE m.block = b.id AND NOT ({_EVICTABLE}))",
        (time.time(), keep),
    ).fetchone()
    [files] = db.execute(
        f"SELECT coalesce(sum(file_bytes), 0) FROM sessions s WHERE {_EVICTABLE}",
        (time.time(), keep),
    ).fetchone()
    return int(blocks) + int(files)


def _gain(db: sqlite3.Connection, identity: str) -> int:
    """Return the bytes that come back at once if a session goes."""
    [blocks] = db.execute(
        "SELECT coalesce(sum(g.num_layers * g.record_bytes), 0) FROM "
        "(SELECT DISTINCT block FROM session_blocks WHERE session = ?1) mine "
        "JOIN blocks b ON b.id = mine.block JOIN segments g ON g.id = b.segment "
        "WHERE NOT EXISTS (SELECT 1 FROM session_blocks o "
        "WHERE o.block = mine.block AND o.session <> ?1) "
        "AND NOT EXISTS (SELECT 1 FROM leases WHERE segment = b.segment)",
        (identity,),
    ).fetchone()
    [file_bytes] = db.execute(
        "SELECT file_bytes FROM sessions WHERE id = ?", (identity,)
    ).fetchone()
    return int(blocks) + int(file_bytes)
