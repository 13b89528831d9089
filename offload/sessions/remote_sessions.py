"""``RemoteSessions``: sessions in an object store, which any machine can take over."""

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from offload.errors import ConfigError, CorruptChunk, SessionNotFound
from offload.sessions import remote_garbage
from offload.sessions.opening import describe_session
from offload.sessions.remote_fetch import FetchReport, fetch_session
from offload.sessions.remote_garbage import GarbageReport
from offload.sessions.remote_leases import RemoteLeases
from offload.sessions.remote_listing import RemoteInfo, list_remote, read_newest
from offload.sessions.remote_local import open_root
from offload.sessions.remote_log import ManifestLog
from offload.sessions.remote_manifest import Manifest
from offload.sessions.remote_publish import Publisher, PublishReport, goes_on
from offload.sessions.session_file import SessionFile
from offload.sessions.store import SessionStore
from offload.tiers.remote_bucket import Bucket, Patience

Progress = Callable[[int, int], object]
Claim = Literal["current", "news", "deleted"]
Names = list[str]  # inside the class, ``list`` is its method


def _silent(done: int, total: int) -> None:
    return


def _anything(file: SessionFile, notes: Mapping[str, Any]) -> None:
    return


def _never() -> bool:
    return False


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
        self._seen: dict[str, tuple[str, int]] = {}
        """The session file that this owner has last published or fetched, and the version of the
        manifest that named it, by name."""
        self._listed: dict[str, Manifest] = {}

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
        notes: Mapping[str, Any] | None = None,
        may_release: Callable[[], bool] = _never,
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
        notes : mapping, optional
            Told to whoever fetches it; as JSON has it.
        may_release : callable
            Asked when all is uploaded: whether others may take it from now on.

        Raises
        ------
        SessionNotFound
            There is none in the local store.
        SessionInUse
            Another owner has it, or has taken it over meanwhile; or it would replace what another
            has published.
        CorruptChunk, StorageError, TransferTimeout
        """
        seen, _ = self._seen.get(name, (None, 0))
        report, manifest = self._publisher.publish(
            store,
            name,
            seen,
            progress,
            overwrite=overwrite,
            rewrite=rewrite,
            notes=notes or {},
            may_release=may_release,
        )
        self._seen[name] = manifest.file, manifest.number
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
        check: Callable[[SessionFile, Mapping[str, Any]], object] = _anything,
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
        check : callable
            Given its file and notes, before its chunks are read; raises an error if this session
            is not wanted.

        Raises
        ------
        SessionNotFound
        SessionInUse
            Another owner has it; ``take=False`` reads it all the same.
        CorruptChunk
            An object is damaged or missing; the local store is as before.
        DiskFull, StorageError, ConfigError
        """
        was_ours = self._leases.held(name) is not None
        manifest = self._owned(name) if take else self._log.find(name, self._clock())

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
                    check=check,
                )
        except BaseException as error:
            if take and not was_ours:
                self._leases.let_go(name, error)
            raise
        self._seen[name] = manifest.file, manifest.number
        return report

    def list(self) -> list[RemoteInfo]:
        """Return the sessions that can be fetched, by name.

        Manifests that an earlier call has read are not read again.
        """
        self._listed = read_newest(self._log, self._listed)
        return list_remote(self._listed.values(), self._clock())

    def deleted(self) -> Names:
        """Return the sessions that were found deleted when ``list`` was called last."""
        return [each.name for each in self._listed.values() if each.is_deleted]

    def is_news(self, found: RemoteInfo) -> bool:
        """Whether a session was published since this owner has last published or fetched it.

        False if it never has: nobody knows, then, whether what is here goes on from it.
        """
        file, number = self._seen.get(found.name, (found.file, 0))
        return found.file != file and found.number > number

    def take(self, name: str) -> int:
        """Become the owner of a session; returns the epoch.

        Raises
        ------
        SessionNotFound
        SessionInUse
        """
        return self._leases.take_live(name).epoch

    def claim(self, store: SessionStore | str | Path, name: str, *, is_new: bool = True) -> Claim:
        """Become the owner of a session.

        Parameters
        ----------
        store : SessionStore or path
            Which may have it already.
        name : str
        is_new : bool
            It need not exist yet.

        Returns
        -------
        {"current", "news", "deleted"}
            Whether the local store has all that is published; others have published what this owner
            has not seen, and what the local store has does not go on from it; or somebody has
            deleted it, and nobody published it since.

        Raises
        ------
        SessionInUse
            Another owner has it; ``left_s`` says for how long.
        SessionNotFound
        """
        manifest = self._leases.take(name) if is_new else self._leases.take_live(name)
        seen, _ = self._seen.get(name, (None, 0))
        if manifest.is_deleted:
            return "deleted"
        if not manifest.is_live(self._clock()) or manifest.file == seen:
            return "current"
        try:
            with open_root(store) as root:
                if not goes_on(describe_session(root, name), manifest):
                    return "news"
        except (SessionNotFound, CorruptChunk):
            return "news"
        self._seen[name] = manifest.file, manifest.number
        return "current"

    def keep(self, name: str) -> None:
        """Renew a lease of which half is over; to be called again and again during long work.

        Raises
        ------
        SessionInUse
            It is no longer this owner's.
        """
        self._leases.keep(name)

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

    def _owned(self, name: str) -> Manifest:
        """Return the manifest of a session that can be opened, as its owner."""
        held = self._leases.held(name)
        if held is not None and held.is_live(self._clock()):
            return held
        return self._leases.take_live(name)

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
