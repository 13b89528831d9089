"""Which known keys and values a prompt can use. Nothing but equal tokens decides, in one realm."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from offload import OffloadedCache
from offload.daemon.requests import CachedTokens, Miss, MissReason
from offload.daemon.served_model import ServedModel
from offload.daemon.work import residency
from offload.daemon.work.persistence import Persistence, Unusable
from offload.daemon.work.session_book import Branch, Realm, Session, SessionBook
from offload.daemon.work.session_stores import SessionStores
from offload.daemon.work.token_log import TokenIds, TokenLog, num_common
from offload.errors import CorruptChunk

_MOST_SAVED = 256
"""Sessions on disk, those used last, whose tokens are compared; the others are found by chunks."""

_END_TOKENS = 8
"""Tokens at the end of an answer that a template may write otherwise in the next prompt."""


@dataclass(frozen=True, slots=True)
class Known:
    """What of a prompt is known already.

    Attributes
    ----------
    branch : Branch
        Busy from now on; it holds the first ``cached.total`` tokens of the prompt and no more.
    cached : CachedTokens
    session : Session or None
        The one whose branch it is or was.
    restored_bytes : int
    restore_s : float
    miss : Miss or None
    """

    branch: Branch
    cached: CachedTokens
    session: Session | None
    restored_bytes: int
    restore_s: float
    miss: Miss | None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A branch or a saved session, and how much of a prompt it has."""

    branch: Branch | None
    session: Session | None
    num_tokens: int
    num_common: int
    num_usable: int
    rank: tuple[int, bool, bool, float]


class Matcher:
    """Finds the longest known beginning of prompts. Used by the engine's thread.

    Parameters
    ----------
    model : ServedModel
    root : OffloadedCache
    book : SessionBook
    stores : SessionStores
    persistence : Persistence
    only_named : bool
        Go on in a session that has a name only for requests that say it: others may share it.
    """

    def __init__(
        self,
        model: ServedModel,
        root: OffloadedCache,
        book: SessionBook,
        stores: SessionStores,
        persistence: Persistence,
        *,
        only_named: bool = False,
    ) -> None:
        self._model = model
        self._root = root
        self._book = book
        self._stores = stores
        self._persistence = persistence
        self._only_named = only_named
        self.can_crop = root._core.can_undo
        """Whether caches can go back to any length; windows and recurrent states cannot."""
        self._can_restore = "disk" in root._core.config.capacities

    def find(
        self,
        realm: Realm,
        ids: TokenIds,
        limit: int,
        hinted: Session | None,
        *,
        is_kept: bool,
        is_new: bool = False,
        setback: MissReason | None = None,
    ) -> Known:
        """Return a branch that holds as much of a prompt as is known.

        Parameters
        ----------
        realm : Realm
        ids : int32 [num_tokens]
        limit : int
            Tokens of it that may be taken as known.
        hinted : Session or None
            Where to look first, and which may be changed.
        is_kept : bool
            False: sessions stay as they are.
        is_new : bool
            The prompt begins a session of its own: others stay as they are.
        setback : str or None
            Why less is known than was thought, if that is so.

        Raises
        ------
        CapacityError
            There is no room for another branch. Nothing has changed.
        """
        started, bad = time.monotonic(), set[int]()
        reason = setback
        while True:
            best = self._best(realm, ids, limit, hinted, bad)
            if best is None or best.num_usable == 0:
                return self._from_chunks(realm, ids, limit, hinted, best, reason, started)
            try:
                return self._take(
                    best, hinted, limit, reason, started, is_kept=is_kept, is_new=is_new
                )
            except Unusable as error:
                reason = error.reason
                bad |= {id(best.branch), id(best.session)}
                if reason == "evicted" and best.session is not None:
                    self._persistence.forget_saved(best.session)

    def num_known(self, realm: Realm, ids: TokenIds, session: Session) -> tuple[int, TokenIds]:
        """Return how many tokens of a prompt a session begins with, and all of the session's."""
        own = self._tokens_of(session)
        return num_common(ids, own), own

    def _best(
        self, realm: Realm, ids: TokenIds, limit: int, hinted: Session | None, bad: set[int]
    ) -> _Candidate | None:
        if limit <= 0:
            return None
        found = [each for each in self._live(realm, ids, limit, hinted, bad) if each.num_common]
        longest = max((each.num_usable for each in found), default=0)
        if self._can_restore and longest < limit:
            found += self._saved(realm, ids, limit, hinted, bad)
        return max(found, key=lambda each: each.rank, default=None)

    def _live(
        self, realm: Realm, ids: TokenIds, limit: int, hinted: Session | None, bad: set[int]
    ) -> Iterator[_Candidate]:
        for branch in self._book.branches:
            if branch.realm == realm and len(branch.tokens) and id(branch) not in bad:
                yield self._candidate(
                    branch, branch.session, branch.tokens.view, ids, limit, hinted
                )

    def _saved(
        self, realm: Realm, ids: TokenIds, limit: int, hinted: Session | None, bad: set[int]
    ) -> Iterator[_Candidate]:
        mine = [
            session
            for session in self._book.of(realm.tenant)
            if session.branch is None
            and session.saved is not None
            and session.realm == realm
            and id(session) not in bad
            and _may_agree(session.head, ids)
        ]
        mine.sort(key=lambda session: (session is not hinted, -session.used_s))
        for session in mine[:_MOST_SAVED]:
            own = self._persistence.saved_ids(session)
            if own is not None and num_common(own, ids):
                yield self._candidate(None, session, own, ids, limit, hinted)

    def _candidate(
        self,
        branch: Branch | None,
        session: Session | None,
        own: TokenIds,
        ids: TokenIds,
        limit: int,
        hinted: Session | None,
    ) -> _Candidate:
        common = num_common(own, ids)
        usable = min(common, limit)
        if not self.can_crop and usable < len(own):
            usable = 0  # a window or a recurrent state cannot go back
        is_idle = branch is not None and not branch.is_busy
        used_s = branch.used_s if branch is not None else 0.0
        rank = (usable, session is not None and session is hinted, is_idle, used_s)
        return _Candidate(branch, session, len(own), common, usable, rank)

    def _take(
        self,
        best: _Candidate,
        hinted: Session | None,
        limit: int,
        reason: MissReason | None,
        started: float,
        *,
        is_kept: bool,
        is_new: bool,
    ) -> Known:
        branch, restored_bytes = best.branch, 0
        usable, lost = best.num_usable, best.num_tokens - best.num_usable
        if branch is None:
            assert best.session is not None
            branch = self._persistence.restore(best.session)
            restored_bytes = residency.num_bytes(branch.cache)
        came_from = "disk" if best.branch is None else "device"
        cached = residency.residency(branch.cache, usable, tail=came_from)
        may_change = is_kept and self._may_change(branch, hinted, lost, is_new=is_new)
        if may_change and not branch.is_busy:
            taken = branch
        else:
            copy = branch.cache.fork()
            taken = Branch(copy, TokenLog(branch.tokens.view), branch.realm)
            self._book.add_branch(taken)
        taken.is_busy = True
        try:
            self._crop(taken, lost)
        except CorruptChunk as error:
            taken.cache._core.report_damage(error)
            self._book.close_branch(taken)
            if not branch.is_busy and taken is not branch:
                self._book.close_branch(branch)
            raise Unusable("corrupt") from error
        except BaseException:
            taken.is_busy = False
            if taken is not branch:
                self._book.close_branch(taken)
            raise
        session = best.session
        miss = None
        if usable < limit:
            is_split = best.num_common < best.num_tokens
            miss = Miss(usable, reason or ("diverged" if is_split else "cold"))
        restore_s = time.monotonic() - started if restored_bytes else 0.0
        return Known(taken, cached, session, restored_bytes, restore_s, miss)

    def _may_change(
        self, branch: Branch, hinted: Session | None, lost: int, *, is_new: bool
    ) -> bool:
        """Whether a prompt may go on in a branch, or needs a copy so that nothing is lost."""
        if branch.session is None or is_new:
            return branch.session is None
        size = self._root._core.config.chunk_tokens
        if hinted is not None:
            return branch.session is hinted and lost <= size
        if self._only_named and not branch.session.is_automatic:
            return False
        return lost <= _END_TOKENS

    def _crop(self, branch: Branch, lost: int) -> None:
        if not lost:
            return
        branch.cache.crop(-lost)
        branch.tokens.truncate(len(branch.tokens) - lost)
        session = branch.session
        if session is not None and session.saved is not None:
            session.saved.is_current &= session.saved.num_tokens <= len(branch.tokens)

    def _from_chunks(
        self,
        realm: Realm,
        ids: TokenIds,
        limit: int,
        hinted: Session | None,
        best: _Candidate | None,
        reason: MissReason | None,
        started: float,
    ) -> Known:
        """Return a new branch, filled with chunks that saved sessions have, of whichever name."""
        cache, count = self._root.fork(), 0
        try:
            if limit > 0 and self.can_crop and self._stores.is_known(realm.tenant):
                count = cache.reuse(
                    torch.from_numpy(ids[: limit + 1].astype("int64")),
                    self._model.model,
                    store=self._persistence.store_of(realm),
                    weights_id=self._model.fingerprint,
                )
        except CorruptChunk:
            reason = reason or "corrupt"
        except BaseException:
            cache.close()
            raise
        branch = Branch(cache, TokenLog(ids[:count]), realm, is_busy=True)
        self._book.add_branch(branch)
        miss = None
        if count < limit or limit <= 0:
            miss = Miss(count, reason or _why_missed(hinted, best))
        size = residency.num_bytes(cache) if count else 0
        took = time.monotonic() - started if count else 0.0
        cached = residency.residency(cache, count)
        return Known(branch, cached, None, size, took, miss)

    def _tokens_of(self, session: Session) -> TokenIds:
        if session.branch is not None:
            return session.branch.tokens.view
        own = None if session.saved is None else self._persistence.saved_ids(session)
        return TokenLog().view if own is None else own


def _may_agree(head: TokenIds | None, ids: TokenIds) -> bool:
    """Whether a session whose first tokens these are is worth reading all of its tokens."""
    return head is None or num_common(head, ids) == min(len(head), len(ids))


def _why_missed(hinted: Session | None, best: _Candidate | None) -> MissReason:
    """Return why nothing of a prompt was found."""
    if best is not None or (hinted is not None and hinted.num_tokens):
        return "diverged"
    return "cold"
