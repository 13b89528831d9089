"""What is done for one shared session at a time: taken, published, kept, let go of."""

import logging
import threading
import time

from offload.daemon.errors import SessionBusy
from offload.daemon.sharing.entry import Entry, Fetched, Key
from offload.daemon.sharing.exchange import Exchange
from offload.daemon.sharing.sharing_settings import SharingSettings
from offload.daemon.sharing.sharing_state import SharingTally
from offload.errors import OffloadError, SessionInUse, SessionNotFound

_LOG = logging.getLogger(__name__)


class Tending:
    """The sessions that are used or have something to publish, and what is done about each.

    Methods block, and are called for one session at a time, in order.

    Parameters
    ----------
    settings : SharingSettings
    exchange : Exchange
    tally : SharingTally
    publish_interval_s : float
        Longest time that what a long answer has made is not published.

    Attributes
    ----------
    lock : Lock
        Of ``entries`` and what is in them; never held while something is waited for.
    entries : dict of Key to Entry
    """

    def __init__(
        self,
        settings: SharingSettings,
        exchange: Exchange,
        tally: SharingTally,
        publish_interval_s: float,
    ) -> None:
        self.lock = threading.Lock()
        self.entries: dict[Key, Entry] = {}
        self._settings = settings
        self._exchange = exchange
        self._tally = tally
        self._publish_interval_s = publish_interval_s

    def acquire(self, entry: Entry, is_new: bool) -> Fetched | None:
        """Take a session, and fetch it if others have changed it."""
        if entry.is_held or not entry.num_users:
            return None
        fetched, is_held = None, False
        if self._settings.is_required or not self._tally.is_resting:
            fetched, is_held = self._take(entry, is_new)
        with self.lock:
            entry.is_held, entry.has_news = is_held, True
            entry.publish_at_s = time.monotonic() + self._publish_interval_s
        return fetched

    def _take(self, entry: Entry, is_new: bool) -> tuple[Fetched | None, bool]:
        """Return what was fetched, and whether the session is ours."""
        try:
            fetched = self._exchange.take(entry, is_new=is_new)
        except SessionNotFound:
            return None, False
        except SessionInUse as error:
            left_s = self._settings.lease_s if error.left_s is None else error.left_s
            raise SessionBusy(
                f"session {entry.key[1]!r} is in use by another replica",
                min(left_s, self._settings.lease_s / 2),
            ) from error
        except OffloadError as error:
            self._tally.fail(error)
            if self._settings.is_required:
                raise
            return None, False
        self._tally.succeed()
        return fetched, True

    def settle(self, entry: Entry, *, is_last: bool = False) -> None:
        """Publish what a session has that nobody uses any more, and give it back."""
        if entry.num_users:
            return
        if entry.has_news and (is_last or not self._tally.is_resting):
            self.try_publish(entry)
        with self.lock:
            if not entry.num_users:
                # The lease is not renewed from now on; who comes next takes it again.
                entry.is_held = False
                if not entry.has_news and self.entries.get(entry.key) is entry:
                    del self.entries[entry.key]

    def try_publish(self, entry: Entry) -> OffloadError | None:
        """Publish a session, or let go of it if it is another's by now; return what went wrong."""
        num_left = entry.num_left
        try:
            is_done = self._exchange.publish(entry, lambda: self._may_release(entry, num_left))
        except SessionInUse as error:
            self._lose(entry, error)
        except OffloadError as error:
            self._tally.fail(error)
            return error
        else:
            self._tally.succeed()
            with self.lock:
                is_old = entry.num_users > 0 or entry.num_left != num_left
                entry.has_news = is_old or not is_done
        return None

    def _may_release(self, entry: Entry, num_left: int) -> bool:
        with self.lock:
            # Whoever has left since then may have done so after the save: that is to be published.
            if entry.num_users or entry.num_left != num_left:
                return False
            entry.is_held = False  # who comes from now on takes it again
            return True

    def _lose(self, entry: Entry, error: SessionInUse) -> None:
        """Let go of a session that is another replica's by now."""
        _LOG.warning("session lost to another replica, kept under another name: %s", error)
        self._tally.add(lost_leases=1)
        self._exchange.disown(entry)
        with self.lock:
            entry.is_held = entry.has_news = False

    def delete(self, entry: Entry) -> bool:
        """Delete a session for everybody; return whether there was one."""
        with self.lock:
            entry.is_held = entry.has_news = False
        return self._exchange.delete(entry)

    def tend(self, entry: Entry) -> None:
        """Keep a session that is used, and publish what it has gained for so long."""
        entry.is_due = False
        if not entry.num_users:
            self.settle(entry)
        elif entry.is_held and time.monotonic() >= entry.publish_at_s:
            entry.publish_at_s = time.monotonic() + self._publish_interval_s
            self.try_publish(entry)
        elif entry.is_held:
            try:
                self._exchange.keep(entry)
            except SessionInUse as error:
                self._lose(entry, error)
            except OffloadError as error:
                self._tally.fail(error)
