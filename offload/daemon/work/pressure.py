"""Making room when a tier is full."""

import logging

from offload.daemon.work.persistence import Persistence
from offload.daemon.work.session_book import Branch, SessionBook
from offload.daemon.work.tally import Tally

_LOG = logging.getLogger(__name__)


class Pressure:
    """Takes idle sessions out of memory, those first that were used longest ago.

    Parameters
    ----------
    book : SessionBook
    persistence : Persistence
    tally : Tally
    """

    def __init__(self, book: SessionBook, persistence: Persistence, tally: Tally) -> None:
        self._book = book
        self._persistence = persistence
        self._tally = tally

    def relieve(self) -> bool:
        """Take one idle branch out of memory; return whether there was one.

        A session is saved first. One that cannot be, because the disk is full, is lost: the others
        go on.
        """
        idle = [branch for branch in self._book.idle_branches() if len(branch.tokens)]
        if not idle:
            return False
        self._let_go(idle[0])
        return True

    def _let_go(self, branch: Branch) -> None:
        session = branch.session
        if session is None:
            self._book.close_branch(branch)
        elif self._persistence.try_save(session):
            self._persistence.evict(session)
        else:
            _LOG.warning("a session is lost: there is no room for it in memory or on disk")
            self._tally.evictions["none"] += 1
            self._persistence.delete(session, "evicted")
