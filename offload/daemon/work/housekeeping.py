"""What is done about sessions as time passes, between two steps of the model."""

import logging
import time
from collections.abc import Iterator

from offload.daemon.engine_settings import SessionSettings
from offload.daemon.work.persistence import Persistence
from offload.daemon.work.residency import demote_from_device
from offload.daemon.work.session_book import Session, SessionBook
from offload.daemon.work.tally import Tally
from offload.errors import OffloadError

_LOG = logging.getLogger(__name__)

_PERIOD_S = 0.5
_LEFTOVER_S = 60.0
"""How long what a session has left behind is kept, in case it comes back."""

_SLICE_BYTES = 8 << 20
"""Of what a session has gained, after which it is saved at once: all others wait meanwhile."""

_RETRY_S = 10.0
"""After a save that failed."""


class Housekeeping:
    """Saves, moves, evicts and expires sessions. Used by the engine's thread.

    Parameters
    ----------
    settings : SessionSettings
    book : SessionBook
    persistence : Persistence
    tally : Tally
    token_bytes : int
        Of one token's keys and values.
    """

    def __init__(
        self,
        settings: SessionSettings,
        book: SessionBook,
        persistence: Persistence,
        tally: Tally,
        token_bytes: int,
    ) -> None:
        self._settings = settings
        self._book = book
        self._persistence = persistence
        self._tally = tally
        self._slice_tokens = max(1, _SLICE_BYTES // max(1, token_bytes))
        self._next_s = 0.0

    @property
    def next_s(self) -> float:
        """When to ``tick`` next, of ``time.monotonic``."""
        return self._next_s

    def tick(self) -> None:
        """Do the next thing that is due; at most one that takes long."""
        now = time.monotonic()
        if now < self._next_s:
            return
        try:
            if self.work():
                return  # there may be more: the next step of the model comes first
        except OffloadError as error:
            _LOG.warning("sessions are not tended now: %s", error)
        self._next_s = now + _PERIOD_S
        self._persistence.write_notes()

    def work(self) -> bool:
        """Do the next thing that is due, if anything is; return whether it was."""
        return any(True for _ in self._due(time.time()))

    def _due(self, now: float) -> Iterator[None]:
        """Do what is due; yield after each thing."""
        for branch in list(self._book.branches):
            if branch.session is None and not branch.is_busy and now - branch.used_s > _LEFTOVER_S:
                self._book.close_branch(branch)
                yield
        for session in self._book:
            if session.is_busy:
                self._note_dirty(session, now)
                if self._is_slice(session) and self._save(session, now):
                    yield
            elif session.expires_s is not None and session.expires_s < now:
                self._tally.evictions["none"] += 1
                self._persistence.delete(session, "expired")
                yield
            elif self._tend(session, now):
                yield

    def _tend(self, session: Session, now: float) -> bool:
        """Do what is due for an idle session; return whether that was anything."""
        branch, settings = session.branch, self._settings
        if branch is None:
            return False
        self._note_dirty(session, now)
        idle_s = now - branch.used_s
        to_disk = settings.idle_to_disk_s
        if to_disk is not None and idle_s > to_disk and settings.persist != "never":
            if session.dirty_tokens and not self._save(session, now):
                return False
            self._persistence.evict(session)
            return True
        if self._is_slice(session):
            return self._save(session, now)
        to_host = settings.idle_to_host_s
        if to_host is not None and idle_s > to_host and not branch.is_on_host:
            branch.is_on_host = True
            demote_from_device(branch.cache)
            self._tally.evictions["host"] += 1
            return True
        return False

    def _note_dirty(self, session: Session, now: float) -> None:
        if not session.dirty_tokens:
            session.dirty_since_s = None
        elif session.dirty_since_s is None:
            session.dirty_since_s = now

    def _is_slice(self, session: Session) -> bool:
        """Whether a session has gained so much, or for so long, that it is to be saved."""
        if self._settings.persist == "never":
            return False
        since = session.dirty_since_s
        is_old = since is not None and time.time() - since > self._settings.persist_interval_s
        return is_old or session.dirty_tokens >= self._slice_tokens

    def _save(self, session: Session, now: float) -> bool:
        """Try to save a session, unless that failed a moment ago; return whether it is saved."""
        if session.failed_s is not None and now - session.failed_s < _RETRY_S:
            return False
        is_saved = self._persistence.try_save(session)
        session.failed_s = None if is_saved else now
        if is_saved:
            session.dirty_since_s = None
        return is_saved
