"""``RemoteSessions``: sessions in an object store, which any machine can take over."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload.errors import ConfigError
from offload.sessions import remote_garbage
from offload.sessions.remote_fetch import FetchReport, fetch_session
from offload.sessions.remote_garbage import GarbageReport
from offload.sessions.remote_leases import RemoteLeases
from offload.sessions.remote_listing import RemoteInfo, list_remote
from offload.sessions.remote_local import open_root
from offload.sessions.remote_log import ManifestLog
from offload.sessions.remote_publish import Publisher, PublishReport
from offload.sessions.store import SessionStore
from offload.tiers.remote_bucket import Bucket, Patience

Progress = Callable[[int, int], object]


def _silent(done: int, total: int) -> None:
    return


class RemoteSessions:
    """Sessions below one URL of an object store, for any number of machines.

    A session is published from a local ``SessionStore`` and fetched into one. Chunks that several
    sessions share are there once. At any time one owner may write a session: another that takes it
    over starts a new epoch, and whatever the old one publishes afterwards is refused.

    Whoever may write to the bucket is trusted: checksums find damage, not forgery. Any thread may
    call any method.

    Parameters
    ----------
    url : str or Bucket
        See ``Bucket``; a bucket is closed with this object.
    owner : str, optional
        Names this owner to others. By default host, process and a random number.
    lease_s : float
        For how long others leave a session alone that was taken or published.
    grace_s : float
        For how long garbage is kept, see ``remote_garbage``; a publication that takes longer than
        half of it fails. The same for everybody who uses the store.
    num_threads : int
        Requests under way at a time.
    compress : bool
        Upload with zstandard level 1 what that makes smaller.
    patience : Patience, optional
    options : mapping, optional
        Of ``obstore``.
    clock : callable
        Seconds since 1970.

    Raises
    ------
    ConfigError
        The URL or an argument is impossible.
    """

    def __init__(
        self,
        url: str | Bucket,
        *,
        owner: str | None = None,
        lease_s: float = 300.0,
        grace_s: float = 86_400.0,
        num_threads: int = 32,
        compress: bool = True,
        patience: Patience | None = None,
        options: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not (lease_s > 0 and grace_s > 0 and num_threads >= 1):
            raise ConfigError(
                f"lease_s, grace_s and num_threads are positive, not {lease_s}, {grace_s} and "
                f"{num_threads}"
            )
        bucket = url if isinstance(url, Bucket) else None
        self._bucket = bucket or Bucket(str(url), patience=patience, options=options)
        self._log = ManifestLog(self._bucket)
        owner = owner or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._leases = RemoteLeases(self._log, owner, lease_s, clock)
        self._publisher = Publisher(
            self._bucket, self._leases, clock, grace_s, num_threads, compress
        )
        self._grace_s = grace_s
        self._num_threads = num_threads
        self._clock = clock
        self._seen: dict[str, str] = {}
        """The session file that this owner has last published or fetched, by name."""

    @property
    def owner(self) -> str:
        """What others are told when they find a session taken."""
        return self._leases.owner

    def publish(
        self,
        store: SessionStore | str | Path,
        name: str,
        *,
        overwrite: bool = False,
        rewrite: bool = False,
        progress: Progress = _silent,
    ) -> PublishReport:
        """Upload a session of a local store; this owner has it afterwards.

        What others see changes at the very end, at once. On an error it is as before.

        Parameters
        ----------
        store : SessionStore or path
            Where the session was saved.
        name : str
        overwrite : bool
            Replace a session that somebody else has published, and that this one does not go on
            from.
        rewrite : bool
            Upload also what the object store has already: it may be damaged there.
        progress : callable
            Told blocks done and blocks in all.

        Raises
        ------
        SessionNotFound
            There is none in the local store.
        SessionInUse
            Another owner has it, or has taken it over meanwhile.
        ConfigError
            It would replace another session.
        CorruptChunk, StorageError, TransferTimeout
        """
        seen = self._seen.get(name)
        report, manifest = self._publisher.publish(
            store, name, seen, progress, overwrite=overwrite, rewrite=rewrite
        )
        self._seen[name] = manifest.file
        return report

    def fetch(
        self,
        store: SessionStore | str | Path,
        name: str,
        *,
        take: bool = True,
        overwrite: bool = False,
        trusted: bool = True,
        progress: Progress = _silent,
    ) -> FetchReport:
        """Save a session of the object store to a local one.

        Parameters
        ----------
        store : SessionStore or path
        name : str
        take : bool
            Become its owner, to publish it later; False: only read it.
        overwrite : bool
            Replace a local session of that name.
        trusted : bool
            Let its tokens find its chunks, and search by its indexes.
        progress : callable
            Told chunks done and chunks in all.

        Raises
        ------
        SessionNotFound
        SessionInUse
            Another owner has it; ``take=False`` reads it all the same.
        CorruptChunk
            An object is damaged or missing; the local store is as before.
        DiskFull, StorageError, ConfigError
        """
        manifest = self._leases.take_live(name) if take else self._log.find(name, self._clock())

        def advance(done: int, total: int) -> None:
            if take:
                self._leases.keep(name)
            progress(done, total)

        try:
            with open_root(store) as root:
                report = fetch_session(
                    root,
                    self._bucket,
                    manifest,
                    advance,
                    num_threads=self._num_threads,
                    overwrite=overwrite,
                    trusted=trusted,
                )
        except BaseException as error:
            if take:
                self._leases.let_go(name, error)
            raise
        self._seen[name] = manifest.file
        return report

    def list(self) -> list[RemoteInfo]:
        """Return the sessions that can be fetched, by name."""
        return list_remote(self._log, self._clock())

    def take(self, name: str) -> int:
        """Become the owner of a session; returns the epoch.

        Raises
        ------
        SessionNotFound
        SessionInUse
        """
        return self._leases.take_live(name).epoch

    def renew(self, name: str) -> None:
        """Keep a session for another ``lease_s``.

        Raises
        ------
        SessionInUse
            It is not, or no longer, this owner's.
        """
        self._leases.change(name)

    def release(self, name: str) -> None:
        """Let others take a session at once; nothing happens if it is not this owner's."""
        self._leases.release(name)

    def delete(self, name: str) -> None:
        """Delete a session; ``collect`` gives back the room of what no other needs.

        Raises
        ------
        SessionNotFound
        SessionInUse
            Another owner has it.
        """
        if self._leases.held(name) is None:
            self._leases.take_live(name)
        self._leases.change(name, is_deleted=True, lease_until=0.0)
        self._leases.forget(name)
        self._seen.pop(name, None)

    def collect(self) -> GarbageReport:
        """Remove what no session needs; see ``remote_garbage``. To be called now and then."""
        return remote_garbage.collect(self._bucket, self._log, self._grace_s, self._clock)

    def close(self) -> None:
        """End what is under way; sessions stay this owner's until their leases end. Idempotent."""
        self._bucket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
