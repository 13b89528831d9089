"""Who may write a session: one owner at a time, for a while, and never two."""

import threading
from collections.abc import Callable
from typing import Any

from offload.errors import OffloadError, SessionInUse
from offload.sessions.remote_log import ManifestLog
from offload.sessions.remote_manifest import Manifest


class RemoteLeases:
    """The sessions that this owner may write.

    A lease says until when others leave a session alone; clocks may differ, so that is a courtesy.
    What keeps two owners from both writing are the versions of the manifest: an owner goes on from
    the version that it knows, and fails as soon as there is another. Any thread may call any
    method.

    Parameters
    ----------
    log : ManifestLog
    owner : str
        Told to those who find a session taken.
    lease_s : float
    clock : callable
        Seconds since 1970.
    """

    def __init__(
        self, log: ManifestLog, owner: str, lease_s: float, clock: Callable[[], float]
    ) -> None:
        self.owner = owner
        self._log = log
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[str, Manifest] = {}

    def held(self, name: str) -> Manifest | None:
        """Return the manifest as this owner has last written it, if it has the session."""
        with self._lock:
            return self._held.get(name)

    def take(self, name: str) -> Manifest:
        """Become the owner of a session, which need not exist.

        Raises
        ------
        SessionInUse
            It has another owner whose lease has not ended, or somebody was faster.
        """
        known = self._log.newest(name) or Manifest(name, 0, 0, "")
        left_s = known.lease_until - self._clock()
        if left_s > 0 and known.owner != self.owner:
            raise SessionInUse(
                f"session {name!r} belongs to {known.owner} (epoch {known.epoch}) for another "
                f"{left_s:.0f} s",
                left_s,
            )
        return self._append(known, epoch=known.epoch + 1, owner=self.owner)

    def take_live(self, name: str) -> Manifest:
        """Become the owner of a session that can be opened.

        Raises
        ------
        SessionNotFound
        SessionInUse
            As ``take``.
        """
        self._log.find(name, self._clock())
        manifest = self.take(name)
        if not manifest.is_live(self._clock()):  # deleted just now
            self.release(name)
            self._log.find(name, self._clock())
        return manifest

    def change(self, name: str, **changes: Any) -> Manifest:
        """Write the next version of a session that this owner has, and renew the lease.

        Raises
        ------
        SessionInUse
            The session is not, or no longer, this owner's. Nothing was written, and it is let go.
        """
        known = self.held(name)
        if known is None:
            raise SessionInUse(f"session {name!r} does not belong to {self.owner}; take it first")
        return self._append(known, **changes)

    def keep(self, name: str) -> None:
        """Renew a lease of which half is over; to be called again and again during long work.

        Raises
        ------
        SessionInUse
            As ``change``.
        """
        known = self.held(name)
        if known is None or known.lease_until - self._clock() < self._lease_s / 2:
            self.change(name)

    def release(self, name: str) -> None:
        """Let others take a session at once; nothing happens if it is not this owner's."""
        if self.held(name) is not None:
            self._append(self._held[name], lease_until=0.0)
            self.forget(name)

    def let_go(self, name: str, error: BaseException) -> None:
        """Release a session because of an error; notes on it if that fails, too."""
        try:
            self.release(name)
        except OffloadError as another:
            error.add_note(f"the session stays ours until its lease ends: {another}")

    def forget(self, name: str) -> None:
        """Behave as if the session had never been taken; others wait for the lease to end."""
        with self._lock:
            self._held.pop(name, None)

    def _append(self, known: Manifest, **changes: Any) -> Manifest:
        changes = {"lease_until": self._clock() + self._lease_s, **changes}
        try:
            written = self._log.append(known, **changes)
        except SessionInUse:
            self.forget(known.name)
            raise
        with self._lock:
            self._held[known.name] = written
        return written
