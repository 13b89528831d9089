"""One session between the local store and the object store: taken, fetched, published, deleted."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from offload.daemon.sharing.entry import Entry, Fetched, Key
from offload.daemon.sharing.local_side import LocalSide
from offload.daemon.sharing.remotes import Remotes
from offload.daemon.sharing.sharing_state import SharingTally
from offload.errors import CorruptChunk, NamespaceMismatch, OffloadError, SessionNotFound

if TYPE_CHECKING:
    from offload.sessions.remote_listing import RemoteInfo

R = TypeVar("R")

Tenants = list[str]  # inside the class, ``list`` is its method

_LOG = logging.getLogger(__name__)


class Call(Protocol):
    """Has the engine's thread run something, and waits for it."""

    def __call__(self, job: Callable[..., R], *args: Any) -> R:
        """Return what the job returns, or raise what it raises."""
        ...


class Exchange:
    """Does with one session what ``SharedSessions`` has decided. Blocks; for its threads.

    Of one session only one thing is done at a time.

    Parameters
    ----------
    remotes : Remotes
    local : LocalSide
    call : Call
    tally : SharingTally
    """

    def __init__(self, remotes: Remotes, local: LocalSide, call: Call, tally: SharingTally) -> None:
        self._remotes = remotes
        self._local = local
        self._call = call
        self._tally = tally

    def take(self, entry: Entry, *, is_new: bool) -> Fetched | None:
        """Become the owner of a session; fetch it if what is here does not go on from it.

        Raises
        ------
        SessionInUse
            Another replica has it.
        SessionNotFound
            Nobody has published it, and it need not be ours then.
        OffloadError
        """
        tenant, name = entry.key
        path = self._local.path_of(tenant)
        if not path.is_dir():
            self._call(self._local.open, tenant)
        claim = self._remotes.of(tenant).claim(path, name, is_new=is_new)
        if claim == "deleted" and not entry.has_news:
            self._call(self._local.remove, tenant, name)
        if claim != "news":
            return None
        try:
            return self._fetch(entry)
        except OffloadError:
            # The first error is the one to tell; at worst others wait for the lease to end.
            with contextlib.suppress(OffloadError):
                self._remotes.of(tenant).release(name)
            raise

    def publish(self, entry: Entry, may_release: Callable[[], bool]) -> bool:
        """Save a session and publish it, if it has changed; return whether all of it is published.

        Parameters
        ----------
        entry : Entry
        may_release : callable
            Asked at the end: whether others may take it from now on.

        Raises
        ------
        SessionInUse
            It is another replica's by now.
        OffloadError
        """
        tenant, name = entry.key
        remote = self._remotes.of(tenant)
        try:
            version, is_saved = self._call(self._local.save, tenant, name), True
        except OffloadError as error:
            _LOG.warning("a session is not published, as it cannot be saved: %s", error)
            self._tally.add(failures=1)
            version, is_saved = None, False
        if version is None or version.stamp == entry.stamp:
            if may_release():
                remote.release(name)
            return is_saved
        report = remote.publish(
            self._local.path_of(tenant),
            name,
            overwrite=entry.is_replaced,
            rewrite=entry.is_damaged,
            notes=version.notes,
            may_release=may_release,
        )
        entry.stamp, entry.is_replaced, entry.is_damaged = version.stamp, False, False
        self._tally.add(publications=1, published_bytes=report.written_bytes)
        return True

    def keep(self, entry: Entry) -> None:
        """Renew a lease of which half is over; raises SessionInUse if it is another's by now."""
        tenant, name = entry.key
        self._remotes.of(tenant).keep(name)

    def delete(self, entry: Entry) -> bool:
        """Delete a session for everybody; return whether there was one."""
        tenant, name = entry.key
        entry.stamp = None
        try:
            self._remotes.of(tenant).delete(name)
        except SessionNotFound:
            return False
        return True

    def disown(self, entry: Entry) -> None:
        """Give what is here of a session that is another replica's a name of no meaning."""
        entry.stamp = None
        self._call(self._local.disown, *entry.key)

    def list(self, tenant: str) -> "list[RemoteInfo]":
        """Return what a tenant has published."""
        return self._remotes.of(tenant).list()

    def sweep(self, tenant: str, is_used: Callable[[Key], bool]) -> None:
        """Remove here what was found deleted when ``list`` was called last, unless it is used."""
        for name in self._remotes.of(tenant).deleted():
            if not is_used((tenant, name)):
                self._call(self._local.remove, tenant, name)

    def collect(self) -> None:
        """Give back the room in the object store of what no session needs any more."""
        for tenant in self._remotes.tenants:
            try:
                report = self._remotes.of(tenant).collect()
            except OffloadError as error:
                _LOG.warning("shared sessions: garbage is not collected now: %s", error)
            else:
                _LOG.info("shared sessions: %d objects removed", report.num_removed)

    @property
    def tenants(self) -> Tenants:
        """Those whose shared sessions were asked for."""
        return self._remotes.tenants

    def is_news(self, tenant: str, info: "RemoteInfo") -> bool:
        """Whether a session was published since it was last published or fetched here."""
        return self._remotes.of(tenant).is_news(info)

    def close(self) -> None:
        """Have everything fail from now on."""
        self._remotes.close()

    def _fetch(self, entry: Entry) -> Fetched | None:
        """Put what was published in the place of what is here; None: that is of no use."""
        tenant, name = entry.key
        remote = self._remotes.of(tenant)
        notes = self._call(self._local.withdraw, tenant, name)
        is_fetched = False
        try:
            report = remote.fetch(
                self._local.path_of(tenant),
                name,
                overwrite=True,
                check=partial(self._local.check, tenant),
            )
            notes, is_fetched = report.notes, True
        except NamespaceMismatch as error:
            _LOG.info("%s", error)
            entry.is_replaced = True
            return None
        except CorruptChunk as error:
            _LOG.warning("a shared session is damaged, and is written anew: %s", error)
            self._tally.add(failures=1)
            entry.is_replaced = entry.is_damaged = True
            return None
        finally:
            version = self._call(self._local.adopt, tenant, name, notes)
            entry.stamp = version.stamp if version is not None and is_fetched else None
        self._tally.add(fetches=1, fetched_bytes=report.read_bytes)
        return Fetched(report.num_new_tokens, report.read_bytes, report.seconds)
