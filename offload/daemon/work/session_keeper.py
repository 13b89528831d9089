"""What ``SessionService`` asks for, done on the engine's thread."""

import math
import time
from collections.abc import Callable, Sequence
from errno import EDQUOT
from typing import Any, TypeVar

import numpy as np

from offload import resume
from offload.daemon.engine_settings import SessionSettings
from offload.daemon.errors import (
    BadRequest,
    Incompatible,
    QuotaExceeded,
    SessionBusy,
    UnknownSession,
)
from offload.daemon.served_model import ServedModel
from offload.daemon.state import Explanation, SessionView
from offload.daemon.work.explaining import explain
from offload.daemon.work.matching import Matcher
from offload.daemon.work.persistence import Persistence, Unusable
from offload.daemon.work.placing import Placing
from offload.daemon.work.residency import demote_from_device, promote_from_disk
from offload.daemon.work.session_book import Branch, Realm, Saved, Session, SessionBook
from offload.daemon.work.session_views import view_of
from offload.daemon.work.token_log import TokenLog
from offload.errors import ConfigError, CorruptChunk, NamespaceMismatch, SessionNotFound
from offload.sessions.names import check_name, expiry
from offload.sessions.store import SessionStore

R = TypeVar("R")

_SLICE_S = 0.02
"""How long requests wait at a time while a session is brought up from the disk."""

Views = list[SessionView]  # inside the class, ``list`` is its method


class SessionKeeper:
    """Sessions as the tenants see them. Only the engine's thread calls methods.

    Every method that names a session raises ``UnknownSession`` if the tenant has none of that name.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: SessionSettings,
        book: SessionBook,
        persistence: Persistence,
        matcher: Matcher,
        placing: Placing,
    ) -> None:
        self._model = model
        self._settings = settings
        self._book = book
        self._persistence = persistence
        self._matcher = matcher
        self._placing = placing

    def list(self, tenant: str) -> Views:
        """Return a tenant's sessions, by name."""
        self._persistence.load_tenant(tenant)
        return [view_of(session) for session in self._book.of(tenant)]

    def get(self, tenant: str, name: str) -> SessionView:
        """Return one session."""
        return view_of(self._find(tenant, name))

    def create(self, tenant: str, name: str, ttl_s: float | None, pin: bool) -> SessionView:
        """Make an empty session."""
        self._check_new(tenant, name)
        session = self._new(tenant, name)
        if ttl_s is not None:
            session.ttl_s = _lifetime(ttl_s)
        if pin:
            self._check_pins(session)
        session.is_pinned = pin
        return view_of(self._book.add(session))

    def delete(self, tenant: str, name: str) -> None:
        """Delete a session, in memory and on disk."""
        self._persistence.delete(self._idle(tenant, name))

    def update(self, tenant: str, name: str, pin: bool | None, ttl_s: float | None) -> SessionView:
        """Pin a session or let go of it, or give it another time to live."""
        session = self._find(tenant, name)
        if pin:
            self._check_pins(session)
        if pin is not None:
            session.is_pinned = pin
        if ttl_s is not None:
            session.ttl_s = _lifetime(ttl_s)
            session.used_s = time.time()
        self._persistence.change(session)
        return view_of(session)

    def fork(self, tenant: str, name: str, new_name: str, at_token: int | None) -> SessionView:
        """Make a session that has the first tokens of another."""
        session = self._find(tenant, name)
        self._check_new(tenant, new_name)
        count = session.num_tokens if at_token is None else at_token
        if not 0 <= count <= session.num_tokens:
            raise BadRequest(
                f"session {name!r} has {session.num_tokens} tokens; it cannot be forked at {count}",
                "at_token",
            )
        if count < session.num_tokens and not self._matcher.can_crop:
            raise BadRequest("this model's sessions can be forked at their end only", "at_token")
        branch = self._in_memory(session)
        copy = self._new(tenant, new_name)
        copy.realm, copy.parent, copy.ttl_s = session.realm, name, session.ttl_s
        if branch is not None and count:
            cache = branch.cache.fork()
            if count < len(branch.tokens):
                cache.crop(count - len(branch.tokens))
            forked = Branch(cache, TokenLog(branch.tokens.view[:count]), session.realm)
            self._book.bind(copy, self._book.add_branch(forked))
        return view_of(self._book.add(copy))

    def persist(self, tenant: str, name: str) -> SessionView:
        """Save what a session has gained."""
        session = self._find(tenant, name)
        self._persistence.save(session)
        return view_of(session)

    def evict(self, tenant: str, name: str, to: str) -> SessionView:
        """Move a session off the device, or out of memory."""
        session = self._idle(tenant, name)
        if to == "disk":
            self._persistence.evict(session)
        elif to == "host":
            self._demote(session)
        else:
            raise BadRequest(f"a session is evicted to 'host' or 'disk', not {to!r}", "to")
        return view_of(session)

    def prefetch_some(self, tenant: str, name: str) -> bool:
        """Bring a part of a session up from the disk; return whether that is all."""
        branch = self._in_memory(self._find(tenant, name))
        if branch is None:
            return True
        return promote_from_disk(branch.cache, time.monotonic() + _SLICE_S)

    def explain(self, tenant: str, name: str, token_ids: Sequence[int]) -> Explanation:
        """Return where a prompt leaves what a session has, and why."""
        session = self._find(tenant, name)
        ids = np.array(token_ids, dtype=np.int32)
        common, own = self._matcher.num_known(session.realm, ids, session)
        gone = self._persistence.why_gone(tenant, name)
        return explain(self._model.tokenizer, ids, own, common, gone)

    def prepare_export(self, tenant: str, name: str) -> SessionStore:
        """Save a session; return the store that can write it to a file, on any thread."""
        session = self._find(tenant, name)
        if not session.num_tokens:
            raise BadRequest(f"session {name!r} is empty; there is nothing to export")
        self._persistence.save(session)
        return self._persistence.store_of(session.realm)

    def prepare_import(self, tenant: str, name: str) -> SessionStore:
        """Return the store that can read a session from a file, on any thread."""
        self._check_new(tenant, name)
        return self._persistence.store_of(Realm(tenant))

    def complete_import(self, tenant: str, name: str) -> SessionView:
        """Enter a session that was read from a file, if it is this model's and tenant's."""
        store, realm = self._persistence.store_of(Realm(tenant)), Realm(tenant)
        try:
            _, _, _, held = resume.open_session(
                store, name, self._model.model, self._model.fingerprint
            )
        except NamespaceMismatch as error:
            store.delete(name)
            raise Incompatible(str(error)) from error
        held.release()
        info = store.info(name)
        session = Session(realm, name, ttl_s=self._settings.ttl_s)
        session.saved = Saved(info.num_tokens, info.num_bytes, True, time.time())
        self._persistence.note(session)
        return view_of(self._book.add(session))

    def _find(self, tenant: str, name: str) -> Session:
        self._persistence.load_tenant(tenant)
        return self._book.get(tenant, name)

    def _idle(self, tenant: str, name: str) -> Session:
        session = self._find(tenant, name)
        if session.is_busy:
            raise SessionBusy(f"a request is adding to session {name!r}")
        return session

    def _new(self, tenant: str, name: str) -> Session:
        return Session(Realm(tenant), name, ttl_s=self._settings.ttl_s)

    def _check_new(self, tenant: str, name: str) -> None:
        try:
            check_name(name)
        except ConfigError as error:
            raise BadRequest(str(error), "name") from error
        self._persistence.load_tenant(tenant)
        if self._book.find(tenant, name) is not None:
            raise BadRequest(f"there is a session {name!r} already", "name")
        self._placing.check_count(tenant)

    def _check_pins(self, session: Session) -> None:
        quota = self._settings.disk_quota_bytes
        if quota is None or session.is_pinned:
            return
        pinned = [each for each in self._book.of(session.realm.tenant) if each.is_pinned]
        size = sum(view_of(each).size_bytes for each in [*pinned, session])
        most = int(quota * self._settings.hard_pin_share)
        if size > most:
            raise QuotaExceeded(f"pinned sessions would take {size} bytes, the most are {most}")

    def _in_memory(self, session: Session) -> Branch | None:
        """Return a session's branch, taking it up from disk; None if it is empty."""
        if session.branch is not None or session.saved is None:
            return session.branch
        try:
            return self._persistence.restore(session)
        except Unusable as error:
            if error.reason == "incompatible":
                raise Incompatible(str(error.__cause__)) from error
            if error.reason == "evicted":
                self._persistence.delete(session, "evicted")
                raise UnknownSession(f"session {session.name!r} was removed from disk") from error
            raise CorruptChunk(str(error.__cause__)) from error

    def _demote(self, session: Session) -> None:
        if session.branch is not None:
            demote_from_device(session.branch.cache)
            session.branch.is_on_host = True


def translated(job: Callable[..., R], *args: Any) -> R:
    """Do something with a store; raise its refusals as those of a request."""
    try:
        return job(*args)
    except SessionNotFound as error:
        raise UnknownSession(str(error)) from error
    except ConfigError as error:
        raise BadRequest(str(error)) from error
    except OSError as error:
        if error.errno == EDQUOT:
            raise QuotaExceeded(str(error)) from error
        raise


def _lifetime(ttl_s: float) -> float | None:
    if ttl_s == math.inf:
        return None
    try:
        expiry(ttl_s)
    except ConfigError as error:
        raise BadRequest(str(error), "ttl_s") from error
    return float(ttl_s)
