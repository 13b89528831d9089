"""Sessions between memory and disk: saved, taken up again, evicted, deleted."""

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from errno import EDQUOT
from typing import Any

import numpy as np
import torch

from offload import OffloadedCache, resume
from offload.daemon.errors import QuotaExceeded
from offload.daemon.requests import MissReason
from offload.daemon.served_model import ServedModel
from offload.daemon.work import residency
from offload.daemon.work.session_book import Branch, Realm, Saved, Session, SessionBook
from offload.daemon.work.session_stores import SessionStores
from offload.daemon.work.tally import Tally
from offload.daemon.work.token_log import TokenIds, TokenLog
from offload.errors import (
    CapacityError,
    ConfigError,
    CorruptChunk,
    NamespaceMismatch,
    OffloadError,
    SessionNotFound,
    StorageError,
)
from offload.sessions.listing import SessionInfo
from offload.sessions.store import SessionStore

_LOG = logging.getLogger(__name__)

HEAD_TOKENS = 64
"""First tokens of a session that are remembered, so that few have to be read to find a prefix."""

_REMEMBERED_IDS = 1 << 24
_REMEMBERED_GONE = 4096
_MOST_STORES = 64
"""Open at a time, unless more are needed; whoever makes salts up makes realms up."""


class Unusable(Exception):
    """What is saved of a session cannot be read.

    Parameters
    ----------
    reason : str
    """

    def __init__(self, reason: MissReason) -> None:
        super().__init__(reason)
        self.reason: MissReason = reason


class Persistence:
    """Moves sessions between memory and their tenants' stores. Used by the engine's thread.

    A failed save leaves the session where it is; it is counted, and tried again later.

    Parameters
    ----------
    model : ServedModel
    root : OffloadedCache
        Empty; all other caches are its forks.
    book : SessionBook
    stores : SessionStores
    tally : Tally
    """

    def __init__(
        self,
        model: ServedModel,
        root: OffloadedCache,
        book: SessionBook,
        stores: SessionStores,
        tally: Tally,
    ) -> None:
        self.is_working = True
        """Whether the last save succeeded."""
        self._model = model
        self._root = root
        self._book = book
        self._stores = stores
        self._tally = tally
        self._loaded: set[str] = set()
        self._unwritten_notes: set[str] = set()
        self._ids: OrderedDict[tuple[str, str], TokenIds] = OrderedDict()
        self._gone: OrderedDict[tuple[str, str], MissReason] = OrderedDict()

    def store_of(self, realm: Realm) -> SessionStore:
        """Return the store of a realm; others that nobody needs are closed, if there are many.

        Raises
        ------
        ConfigError, StorageError
        """
        if realm not in self._stores.realms and len(self._stores.realms) >= _MOST_STORES:
            needed = {branch.realm for branch in self._book.branches}
            for spare in set(self._stores.realms) - needed:
                store = self._stores.of(spare)
                link = self._root._core.links.pop((store.path, store.salt), None)
                if link is not None:
                    link.close()
                self._stores.close_store(spare)
        return self._stores.of(realm)

    def load_tenant(self, tenant: str) -> None:
        """Enter a tenant's saved sessions into the book, the first time."""
        if tenant in self._loaded:
            return
        self._loaded.add(tenant)
        if not self._stores.is_known(tenant):
            return
        notes = self._stores.read_notes(tenant)
        for info in self.store_of(Realm(tenant)).list():
            self._book.add(as_session(tenant, info, notes.get(info.name, {})))

    def save(self, session: Session) -> None:
        """Save what a session has in memory.

        Raises
        ------
        QuotaExceeded
        OffloadError
            It could not be saved; earlier states on disk are as before.
        """
        branch = session.branch
        if branch is None or not len(branch.tokens) or self._is_saved(session):
            return
        num_new = session.dirty_tokens
        try:
            info = self._save(session, branch)
        except OffloadError as error:
            self.is_working = False
            self._tally.failed_persists += 1
            _LOG.warning("session not saved: %s", error)
            if isinstance(error, OSError) and error.errno == EDQUOT:
                raise QuotaExceeded(str(error)) from error
            raise
        self.is_working = True
        share = num_new / max(1, len(branch.tokens))
        self._tally.persists += 1
        self._tally.persisted_bytes += int(info.num_bytes * share)
        session.saved = Saved(info.num_tokens, info.num_bytes, True, time.time())
        session.head = branch.tokens.view[:HEAD_TOKENS].copy()
        self._ids.pop((session.realm.tenant, session.name), None)
        self.note(session)
        self._trim()

    def try_save(self, session: Session) -> bool:
        """Save a session if that is possible; return whether it is saved now."""
        try:
            self.save(session)
        except (OffloadError, OSError):
            return False
        return True

    def restore(self, session: Session) -> Branch:
        """Take up a saved session; its chunks are read when they are attended to.

        Raises
        ------
        Unusable
            It is damaged, gone, or another model's.
        CapacityError
            There is no room for it now.
        """
        cache = self._root.fork()
        try:
            store = self.store_of(session.realm)
            ids = resume.fill(
                cache._core,
                cache.layers,
                store,
                session.name,
                self._model.model,
                self._model.fingerprint,
            )
            if ids is None:
                raise NamespaceMismatch(f"session {session.name!r} was saved without its tokens")
        except BaseException as error:
            cache.close()
            reason = _reason(error)
            if reason is None:
                raise
            _LOG.info("session not taken up: %s", error)
            raise Unusable(reason) from error
        branch = Branch(cache, TokenLog(ids[0].to(torch.int32).numpy()), session.realm)
        self._book.add_branch(branch)
        self._book.bind(session, branch)
        if session.saved is not None:
            session.saved.is_current = True
        self._tally.restores += 1
        self._tally.restored_bytes += residency.num_bytes(cache)
        return branch

    def saved_ids(self, session: Session) -> TokenIds | None:
        """Return the tokens of a saved session; None if its file cannot be read."""
        key = session.realm.tenant, session.name
        if key not in self._ids:
            try:
                ids = self.store_of(session.realm).describe(session.name).token_ids
            except (OffloadError, OSError):
                return None
            if ids is None:
                return None
            self._ids[key] = ids[0].to(torch.int32).numpy()
        self._ids.move_to_end(key)
        while len(self._ids) > 1 and sum(map(len, self._ids.values())) > _REMEMBERED_IDS:
            self._ids.popitem(last=False)
        return self._ids[key]

    def evict(self, session: Session) -> None:
        """Save a session and let go of its memory.

        Raises
        ------
        QuotaExceeded, OffloadError
            It cannot be saved, and stays in memory.
        """
        if session.branch is not None:
            self.save(session)
            self._book.close_branch(session.branch)
            self._tally.evictions["disk"] += 1

    def delete(self, session: Session, reason: MissReason = "cold") -> None:
        """Delete a session in memory and on disk; ``reason`` explains later misses."""
        branch = session.branch
        self._book.remove(session)
        if branch is not None:
            self._book.close_branch(branch)
        key = session.realm.tenant, session.name
        self._ids.pop(key, None)
        if session.saved is not None:
            try:
                self.store_of(session.realm).delete(session.name, force=True)
            except SessionNotFound:
                _LOG.debug("session %r was gone already", session.name)
            except StorageError as error:
                _LOG.warning("a session that was deleted is back after a restart: %s", error)
        if reason != "cold":
            self._gone[key] = reason
            if len(self._gone) > _REMEMBERED_GONE:
                self._gone.popitem(last=False)
        self.note(session)
        self._trim()

    def why_gone(self, tenant: str, name: str) -> MissReason:
        """Return why a tenant has no session of a name."""
        return self._gone.get((tenant, name), "cold")

    def change(self, session: Session) -> None:
        """Tell the store what has been changed about a session: pinned or not, its time to live."""
        if session.saved is not None:
            try:
                store = self.store_of(session.realm)
                store.pin(session.name, session.is_pinned)
                store.set_ttl(session.name, _time_left(session))
            except SessionNotFound:
                self.forget_saved(session)  # it has made room for others
            except StorageError as error:
                _LOG.warning("a session's lifetime is not written down: %s", error)
        self.note(session)

    def forget_saved(self, session: Session) -> None:
        """Note that what is saved of a session is of no use."""
        session.saved = None
        self.forget_ids(session.realm.tenant, session.name)

    def forget_ids(self, tenant: str, name: str) -> None:
        """Note that another session may be saved under a name."""
        self._ids.pop((tenant, name), None)

    def note(self, session: Session) -> None:
        """Remember to write down what the store does not know about a session."""
        self._unwritten_notes.add(session.realm.tenant)

    def write_notes(self) -> None:
        """Write down what has been noted. What cannot be written is lost at the end."""
        while self._unwritten_notes:
            tenant = self._unwritten_notes.pop()
            notes = {each.name: notes_of(each) for each in self._book.of(tenant) if each.saved}
            if not notes and not self._stores.is_known(tenant):
                continue
            try:
                self._stores.write_notes(tenant, notes)
            except StorageError as error:
                _LOG.warning("notes not written: %s", error)

    def _save(self, session: Session, branch: Branch) -> SessionInfo:
        info = branch.cache.save(
            session.name,
            store=self.store_of(session.realm),
            model=self._model.model,
            weights_id=self._model.fingerprint,
            token_ids=torch.from_numpy(branch.tokens.view.astype(np.int64))[None],
            ttl_s=_time_left(session),
            pin=session.is_pinned,
        )
        branch.cache.token_ids = None  # the branch has them
        return info

    def _is_saved(self, session: Session) -> bool:
        """Whether a store has all of a session: it may have made room for others meanwhile."""
        if session.saved is None or session.dirty_tokens or not session.saved.is_current:
            return False
        try:
            return self.store_of(session.realm).info(session.name).num_tokens > 0
        except SessionNotFound:
            return False

    def _trim(self) -> None:
        """Let the stores have back what no cache in memory needs any more."""
        engine = self._root._core._family.engine
        if engine is not None and engine.is_in_use:
            with engine.lock:
                for link in self._root._core.links.values():
                    link.trim(engine)


def _reason(error: BaseException) -> MissReason | None:
    """Return what an error says about a saved session; None if it is about something else."""
    if isinstance(error, CapacityError):
        return None
    if isinstance(error, SessionNotFound):
        return "evicted"
    if isinstance(error, ConfigError):
        return "incompatible"
    return "corrupt" if isinstance(error, CorruptChunk | StorageError) else None


def _time_left(session: Session) -> float | None:
    return None if session.expires_s is None else max(1.0, session.expires_s - time.time())


def as_session(tenant: str, info: SessionInfo, notes: Mapping[str, Any]) -> Session:
    """Return a session that a store has, given the notes on it."""
    head = notes.get("head")
    ttl_s = notes.get("ttl_s")
    if ttl_s is None and info.expires_at is not None:
        ttl_s = info.expires_at - info.used_at
    return Session(
        Realm(tenant, notes.get("cache_salt")),
        info.name,
        is_automatic=bool(notes.get("is_automatic")),
        is_pinned=info.is_pinned,
        ttl_s=ttl_s,
        created_s=float(notes.get("created_s", info.created_at)),
        used_s=max(info.used_at, float(notes.get("used_s", 0.0))),
        parent=notes.get("parent"),
        last_hit_share=float(notes.get("last_hit_share", 0.0)),
        num_requests=int(notes.get("num_requests", 0)),
        saved=Saved(info.num_tokens, info.num_bytes, True, info.used_at),
        head=None if head is None else np.array(head, dtype=np.int32),
    )


def notes_of(session: Session) -> dict[str, Any]:
    """Return what a store does not know about a session, as JSON has it."""
    return {
        "cache_salt": session.realm.cache_salt,
        "is_automatic": session.is_automatic,
        "ttl_s": session.ttl_s,
        "created_s": session.created_s,
        "used_s": session.used_s,
        "parent": session.parent,
        "last_hit_share": session.last_hit_share,
        "num_requests": session.num_requests,
        "head": None if session.head is None else session.head.tolist(),
    }
