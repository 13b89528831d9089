"""``SharedSessions``: who writes a session when several daemons share it, and what each sees."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from offload.daemon.errors import Draining, SessionBusy
from offload.daemon.sharing.entry import Entry, Fetched, Key
from offload.daemon.sharing.exchange import Exchange
from offload.daemon.sharing.rounds import Rounds
from offload.daemon.sharing.sharing_settings import SharingSettings
from offload.daemon.sharing.sharing_state import SharingState, SharingTally
from offload.daemon.sharing.strands import Strands
from offload.daemon.sharing.tending import Tending
from offload.errors import OffloadError

if TYPE_CHECKING:
    from offload.sessions.remote_listing import RemoteInfo

    Listing = list[RemoteInfo] | None  # inside the class, ``list`` is its method

_LOG = logging.getLogger(__name__)

_THREADS = 4
_LOOKS = 4
"""Looks at what is held, for each lease: a lease is renewed when half of it is over."""

_LEAST_LOOK_S = 0.05
_REPORT_S = 5.0
_PAUSES_S = (0.05, 0.5)
"""First and longest between two tries to take a session."""

_RETRY_S = 1.0
_SWEEP_S = 600.0
"""Between two looks for sessions that others have deleted."""

_COLLECT_S = 6 * 3600.0
"""Between two collections of garbage, which is kept for a day anyway."""


class SharedSessions:
    """Leases of sessions, and the threads that fetch and publish them.

    A session is taken when the first request for it comes, and given back when the last has ended
    and what it has made is published. What is done for one session is done in order, on a thread of
    a small pool: never on the engine's, nor on that of an event loop. Nothing here decides what may
    be reused: equal tokens do.

    Invariant: who holds a session has the newest version of its manifest. Any thread may call.

    Parameters
    ----------
    settings : SharingSettings
    exchange : Exchange
    tally : SharingTally
    publish_interval_s : float
        Longest time that what a long answer has made is not published.
    """

    def __init__(
        self,
        settings: SharingSettings,
        exchange: Exchange,
        tally: SharingTally,
        publish_interval_s: float,
    ) -> None:
        self._settings = settings
        self._exchange = exchange
        self._tally = tally
        self._tending = Tending(settings, exchange, tally, publish_interval_s)
        self._lock, self._entries = self._tending.lock, self._tending.entries
        self._strands = Strands(_THREADS, "offload-daemon-sharing")
        self._closing = threading.Event()
        look_s = min(settings.lease_s / _LOOKS, publish_interval_s)
        self._rounds = Rounds(
            (max(_LEAST_LOOK_S, look_s), self._look),
            (_SWEEP_S, self._sweep),
            (_COLLECT_S, self._collect),
        )

    def start(self) -> None:
        """Start to renew leases. Once only."""
        self._rounds.start()

    async def enter(self, key: Key, *, is_new: bool = True) -> Fetched | None:
        """Have a session for one request more; ``leave`` has to follow, however this ends.

        Parameters
        ----------
        key : Key
        is_new : bool
            Take it also if nobody has published it, so that nobody else makes it.

        Returns
        -------
        Fetched or None
            What was fetched for it.

        Raises
        ------
        SessionBusy
            Another replica has it; says for how long.
        StorageError
            The object store cannot be reached, and it is required.
        Draining
        """
        with self._lock:
            entry = self._entries.setdefault(key, Entry(key))
            entry.num_users += 1
        until, pause_s = time.monotonic() + self._settings.wait_s, _PAUSES_S[0]
        while True:
            try:
                return await self._acquire(entry, is_new)
            except SessionBusy:
                # Most often its owner is about to publish what a request has just left.
                if time.monotonic() + pause_s > until:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSES_S[1])

    def leave(self, key: Key) -> None:
        """Note that a request has ended; what the last one leaves is published."""
        with self._lock:
            entry = self._entries[key]
            entry.num_users -= 1
            entry.num_left += 1
            if not entry.num_users and not self._closing.is_set():
                self._strands.post(key, self._tending.settle, entry)

    @asynccontextmanager
    async def use(
        self, key: Key, *, is_new: bool = False, is_changed: bool = False
    ) -> AsyncIterator[None]:
        """``enter`` and ``leave`` around something that is done with a session.

        ``is_changed``: it is to be published again even if no token was added.
        """
        try:
            await self.enter(key, is_new=is_new)
            yield
            if is_changed:
                with self._lock:
                    self._entries[key].stamp = None
        finally:
            self.leave(key)

    async def publish(self, key: Key) -> None:
        """Publish what there is of a session that was entered.

        Raises
        ------
        StorageError
            That cannot be done now, and the object store is required.
        """
        with self._lock:
            future = self._strands.submit(key, self._tending.try_publish, self._entries[key])
        error = await asyncio.wrap_future(future)
        if error is not None and self._settings.is_required:
            raise error

    async def delete(self, key: Key) -> bool:
        """Delete a session that was entered for everybody; return whether there was one.

        Raises
        ------
        SessionBusy
            Others use it.
        OffloadError
            It is not deleted.
        """
        with self._lock:
            entry = self._entries[key]
            if entry.num_users > 1:
                raise SessionBusy(f"a request is adding to session {key[1]!r}")
            future = self._strands.submit(key, self._tending.delete, entry)
        return await asyncio.wrap_future(future)

    def list(self, tenant: str) -> "Future[Listing] | None":
        """Begin to list what a tenant has published; None: that is not known now."""
        with self._lock:
            if self._closing.is_set() or self._tally.is_resting:
                return None
            return self._strands.submit(tenant, self._list, tenant)

    def is_newer(self, key: Key, info: "RemoteInfo") -> bool:
        """Whether others have published more of a session than this replica knows of."""
        with self._lock:
            entry = self._entries.get(key)
            return (entry is None or not entry.is_held) and self._exchange.is_news(key[0], info)

    def state(self) -> SharingState:
        """Return what was counted."""
        with self._lock:
            held = sum(entry.is_held for entry in self._entries.values())
            unpublished = sum(entry.has_news for entry in self._entries.values())
        return self._tally.state(held, unpublished)

    def drain(self, timeout_s: float) -> int:
        """Publish what is not published, and give sessions back; return how many could not be.

        No request is under way any more. Blocks; tries again what fails; the log tells how far it
        is.
        """
        until = time.monotonic() + timeout_s
        while True:
            self._settle_all(until)
            num_left = self.state().num_unpublished
            if not num_left or time.monotonic() + _RETRY_S >= until:
                break
            self._closing.wait(_RETRY_S)
        if num_left:
            _LOG.warning("%d sessions are not published; they stay on the local disk", num_left)
        return num_left

    def close(self, timeout_s: float) -> None:
        """End, after ``drain`` if there is time for it. Idempotent.

        The engine's thread has ended.
        """
        if self._closing.is_set():
            return
        if timeout_s > 0:
            self.drain(timeout_s)
        with self._lock:
            self._closing.set()
        self._exchange.close()
        self._strands.close()
        self._rounds.close()

    async def _acquire(self, entry: Entry, is_new: bool) -> Fetched | None:
        with self._lock:
            if self._closing.is_set():
                raise Draining("the engine is going down")
            if entry.is_held:
                return None
            future = self._strands.submit(entry.key, self._tending.acquire, entry, is_new)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                raise Draining("the engine is going down") from None  # and drops what waits
            raise

    def _settle_all(self, until_s: float) -> None:
        with self._lock:
            waiting = {
                self._strands.post(key, partial(self._tending.settle, entry, is_last=True))
                for key, entry in self._entries.items()
            }
        total = len(waiting)
        while waiting and (left_s := until_s - time.monotonic()) > 0:
            _, waiting = wait(waiting, min(left_s, _REPORT_S))
            if waiting:
                _LOG.info("sessions published: %d of %d", total - len(waiting), total)

    def _list(self, tenant: str) -> "Listing":
        try:
            found = self._exchange.list(tenant)
            self._exchange.sweep(tenant, self._is_used)
            return found
        except OffloadError as error:
            self._tally.fail(error)
            return None

    def _look(self) -> None:
        """Have everything tended that is used, or not published."""
        with self._lock:
            for key, entry in self._entries.items():
                is_of_interest = entry.num_users or entry.has_news
                if is_of_interest and not entry.is_due and not self._closing.is_set():
                    entry.is_due = True
                    self._strands.post(key, self._tending.tend, entry)

    def _sweep(self) -> None:
        """Remove here what others have deleted."""
        for tenant in self._exchange.tenants:
            self.list(tenant)

    def _collect(self) -> None:
        with self._lock:
            if not self._closing.is_set():
                self._strands.post("", self._exchange.collect)

    def _is_used(self, key: Key) -> bool:
        with self._lock:
            return key in self._entries
