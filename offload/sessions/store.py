"""``SessionStore``: sessions in one root folder, for any number of processes."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from offload.config import parse_size
from offload.errors import CorruptCatalog, SessionInUse, SessionNotFound
from offload.sessions import fsck, opening, saving
from offload.sessions.archive_export import ExportReport, export_session
from offload.sessions.archive_import import ImportReport, import_session
from offload.sessions.changing import change_session
from offload.sessions.checking import BadRecord, Expected, RecordChecker, expected_records
from offload.sessions.garbage import forget_session, try_collect
from offload.sessions.ledger import Usage
from offload.sessions.listing import SessionInfo, list_sessions
from offload.sessions.names import check_name, expiry
from offload.sessions.opening import Held
from offload.sessions.paths import default_root
from offload.sessions.quarantine import quarantine_records
from offload.sessions.rebuild import rebuild
from offload.sessions.root import Root
from offload.sessions.saving import Content, Saved
from offload.sessions.schema import check_session_row
from offload.sessions.session_file import SessionFile
from offload.tiers.io_engine import IoEngine
from offload.types import ChunkLayout

_LOG = logging.getLogger(__name__)

_THREADS = 4
_MAX_REPAIRS = 8
"""A root where more than so many reads in a row meet damage has no prefix to offer."""

_BadRecords = list[BadRecord]  # inside the class, ``list`` is its method

Progress = Callable[[int, int], object]
"""Told chunks done, and chunks in all."""


def _silent(done: int, total: int) -> None:
    return


def _parse_floor(size: int | str) -> int:
    # A limit of nothing is refused as a slip; no floor is a choice.
    return 0 if str(size).strip() == "0" else parse_size(size)


class SessionStore:
    """Saved sessions below one root folder.

    Several stores, in several processes, may be open on one root. What a store lends to caches
    stays in place until the store is closed or its process ends, however it ends. Any thread may
    call any method; a forked process must open its own.

    Parameters
    ----------
    root : path, optional
        Default: ``sessions`` in the user's cache folder.
    quota : int or str, optional
        Hard limit of all that is below the root, such as ``"200GiB"``, for all processes and until
        it is set again. A new root gets half of what is free.
    min_free : int or str, optional
        What is to stay free on the device; 0 or ``"0"``: nothing. 1 GiB on a new root.
    durability : {"none", "relaxed", "strict"}
        What survives a power cut: perhaps the session saved last but never a wrong one
        (``none``), its content if the catalog was written (``relaxed``), or every session whose
        ``save`` returned (``strict``). A killed process loses nothing in any of them.
    salt : str
        Of a tenant: with another salt, sessions cannot be opened and prefixes are not found.
    deadline_s : float
        Longest wait for one transfer.
    key : bytes, optional
        32 random bytes: everything that tells content is encrypted, as ``docs/encryption.md`` says.
        Of a new root; one that was made without a key stays without, and one that was made with a
        key opens with no other.

    Raises
    ------
    ConfigError
        The root cannot be used, an argument is impossible, or the key is not that of the root.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        quota: int | str | None = None,
        min_free: int | str | None = None,
        durability: str = "relaxed",
        salt: str = "",
        deadline_s: float = 120.0,
        key: bytes | None = None,
    ) -> None:
        quota_bytes = None if quota is None else parse_size(quota)
        min_free_bytes = None if min_free is None else _parse_floor(min_free)
        path = default_root() if root is None else Path(root)
        self.salt = salt
        try:
            self._root = Root(path, durability, deadline_s, key)
        except CorruptCatalog as error:
            _LOG.warning("%s; making a new catalog from the files", error)
            rebuild(path, key=key)
            self._root = Root(path, durability, deadline_s, key)
        try:
            self._root.ledger.configure(quota_bytes, min_free_bytes)
        except BaseException:
            self._root.close()
            raise

    @property
    def path(self) -> Path:
        """The root folder."""
        return self._root.paths.root

    @property
    def is_encrypted(self) -> bool:
        """Whether its content is."""
        return self._root.sealer is not None

    def list(self) -> list[SessionInfo]:
        """Return all sessions, by name. Those that have expired are removed."""
        self._remove_expired()
        return list_sessions(self._root.catalog)

    def info(self, name: str) -> SessionInfo:
        """Return what is known about a session.

        Raises
        ------
        SessionNotFound
        """
        identity = self._root.identify(name)
        found = list_sessions(self._root.catalog, name)
        if not found:
            raise SessionNotFound(f"session {name!r} ({identity}) has expired, or was deleted")
        return found[0]

    def describe(self, name: str) -> SessionFile:
        """Return what the file of a session says: its namespace, tokens, tails."""
        return opening.describe_session(self._root, name)

    def usage(self) -> Usage:
        """Return how much space there is, and who has it."""
        return self._root.ledger.usage()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Never evict a session to make room, or allow it again."""
        change_session(self._root, name, {"is_pinned": pinned})

    def set_ttl(self, name: str, ttl_s: float | None) -> None:
        """Let a session expire so many seconds from now; None: never."""
        change_session(self._root, name, {"expires_at": expiry(ttl_s)})

    def rename(self, name: str, new_name: str) -> None:
        """Give a session another name.

        Raises
        ------
        ConfigError
            The name is taken, or impossible.
        """
        change_session(self._root, name, {"name": check_name(new_name)})

    def delete(self, name: str, *, force: bool = False) -> None:
        """Delete a session. Chunks that others need stay.

        Parameters
        ----------
        name : str
        force : bool
            Also while a cache has it open; the cache goes on, and the space comes back later.

        Raises
        ------
        SessionNotFound
        SessionInUse
        """
        with self._root.catalog.transaction() as db:
            identity = self._root.identify(name)
            query = "SELECT count(*) FROM leases WHERE session = ? AND segment IS NULL"
            [num_open] = db.execute(query, (identity,)).fetchone()
            if num_open and not force:
                raise SessionInUse(
                    f"session {name!r} is open in {num_open} caches; force deletes it all the same"
                )
            forget_session(db, identity)
        try_collect(self._root.catalog, self._root.paths)

    def verify(self, name: str, progress: Progress = _silent) -> fsck.FsckReport:
        """Read a whole session and compare it with its checksums; quarantine what is bad.

        Raises
        ------
        SessionNotFound
        CorruptChunk
            The session's own file is damaged.
        """
        started = time.perf_counter()
        report = fsck.FsckReport(num_sessions=1)
        fsck.check_sessions(self._root, [self.describe(name)], report, progress)
        self.quarantine(report.new_records)
        report.seconds = time.perf_counter() - started
        return report

    def fsck(self, *, repair: bool = False, progress: Progress = _silent) -> fsck.FsckReport:
        """Verify everything below the root; see ``offload.sessions.fsck``."""
        return fsck.fsck(self._root, repair=repair, progress=progress)

    def save(
        self,
        name: str,
        content: Content,
        *,
        ttl_s: float | None = None,
        pin: bool = False,
        progress: Progress = _silent,
    ) -> Saved:
        """Save a session; see ``OffloadedCache.save``, which calls this."""
        return saving.save(
            self._root,
            check_name(name),
            content,
            expires_at=expiry(ttl_s),
            is_pinned=pin,
            progress=progress,
        )

    def export(
        self,
        name: str,
        path: str | Path,
        progress: Progress = _silent,
        *,
        overwrite: bool = False,
    ) -> ExportReport:
        """Write a session to a file, ``NAME.kv.tar.zst``; see ``export_session``."""
        return export_session(self._root, name, Path(path), progress, overwrite=overwrite)

    def import_(
        self,
        path: str | Path,
        name: str | None = None,
        progress: Progress = _silent,
        *,
        overwrite: bool = False,
        trust_prefixes: bool = False,
    ) -> ImportReport:
        """Save the session that ``export`` wrote to a file; see ``import_session``."""
        self._remove_expired()  # their names are free
        return import_session(
            self._root,
            Path(path),
            name,
            progress,
            overwrite=overwrite,
            trust_prefixes=trust_prefixes,
        )

    def open(self, name: str) -> tuple[SessionFile, Held]:
        """Open a session and hold its chunks in place; see ``OffloadedCache.load``."""
        try:
            return opening.open_session(self._root, name)
        except SessionNotFound:
            self._remove_expired()
            raise

    def find_prefix(
        self,
        model_digest: bytes,
        chunk_tokens: int,
        token_ids: Tensor,
        namespace_of: Callable[[ChunkLayout], bytes],
        layers: Sequence[int],
    ) -> tuple[ChunkLayout, Held] | None:
        """Hold the longest beginning of some rows that is known and good.

        Every record is read and verified; at a bad one the prefix ends, and it is set aside. See
        ``OffloadedCache.reuse``, which calls this.
        """
        root = self._root
        for _ in range(_MAX_REPAIRS):
            found = opening.find_prefix(root, model_digest, chunk_tokens, token_ids, namespace_of)
            if found is None:
                return None
            is_good = False
            try:
                bad = self._check(*found, layers)
                self.quarantine(bad)
                is_good = not bad
            finally:
                if not is_good:
                    found[1].release()
            if is_good:
                return found
        return None

    def quarantine(self, bad: Iterable[BadRecord]) -> None:
        """Set damaged records aside, so that no session and no prefix uses them."""
        quarantine_records(self._root.catalog, self._root.paths, bad)

    def recheck(
        self, path: Path, layout: ChunkLayout, fingerprint: bytes, expected: Iterable[Expected]
    ) -> None:
        """Read records once more, one by one, and set those aside that are bad.

        Parameters
        ----------
        path : Path
            Of a segment.
        layout : ChunkLayout
        fingerprint : bytes
        expected : iterable of (index, ChunkInfo)
        """
        with closing(IoEngine(1, deadline_s=self._root.deadline_s)) as engine:
            fmt = self._root.format_of(layout, fingerprint)
            checker = RecordChecker(path, fmt, engine, self._root.deadline_s)
            self.quarantine(list(checker.check(expected, lambda count: None)))

    def close(self) -> None:
        """Let go of everything that this store lent. Idempotent."""
        self._root.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def _check(self, layout: ChunkLayout, held: Held, layers: Sequence[int]) -> _BadRecords:
        root, fmt = self._root, self._root.format_of(layout, held.fingerprint)
        expected = expected_records(held.rows, held.shapes, layers, layout.chunk_tokens)
        bad: _BadRecords = []
        with closing(IoEngine(_THREADS, deadline_s=root.deadline_s)) as engine:
            for segment, records in expected.items():
                checker = RecordChecker(root.paths.segment(segment), fmt, engine, root.deadline_s)
                bad += checker.check(sorted(records.items()), lambda count: None)
        return bad

    def _remove_expired(self) -> None:
        with self._root.catalog.transaction() as db:
            expired = db.execute(
                "SELECT * FROM sessions s WHERE expires_at < ? AND NOT EXISTS "
                "(SELECT 1 FROM leases WHERE session = s.id)",
                (time.time(),),
            ).fetchall()
            for row in expired:
                check_session_row(row)  # a flipped bit must not end a session
                forget_session(db, row[0])
        if expired:
            try_collect(self._root.catalog, self._root.paths)
