"""What sharing does to the sessions of this replica. On the engine's thread, but for ``check``."""

import dataclasses
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.daemon.served_model import ServedModel
from offload.daemon.sharing.entry import Stamp
from offload.daemon.work.persistence import Persistence, as_session, notes_of
from offload.daemon.work.session_book import Realm, SessionBook
from offload.daemon.work.session_stores import SessionStores
from offload.errors import NamespaceMismatch, OffloadError, SessionNotFound
from offload.identity import identify
from offload.sessions.namespace import model_digest, model_fields
from offload.sessions.session_file import SessionFile

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalVersion:
    """What the local store has of a session.

    Attributes
    ----------
    stamp : tuple of float
        When it was saved and used: changes with its tokens, and with when it expires.
    notes : mapping
        What the store does not know about it.
    """

    stamp: Stamp
    notes: Mapping[str, Any]


class LocalSide:
    """Saves sessions that are to be published, and takes in those that were fetched.

    Parameters
    ----------
    model : ServedModel
    book : SessionBook
    stores : SessionStores
    persistence : Persistence
    """

    def __init__(
        self,
        model: ServedModel,
        book: SessionBook,
        stores: SessionStores,
        persistence: Persistence,
    ) -> None:
        self._facts = dataclasses.asdict(identify(model.model, model.fingerprint))
        self._book = book
        self._stores = stores
        self._persistence = persistence

    def path_of(self, tenant: str) -> Path:
        """Return the root of a tenant's local store. Any thread may call."""
        return self._stores.path_of(tenant)

    def prefix_of(self, tenant: str) -> str:
        """Return where a tenant's sessions lie in the object store. Any thread may call."""
        return self._stores.prefix_of(tenant)

    def check(self, tenant: str, file: SessionFile, notes: Mapping[str, Any]) -> None:
        """Raise NamespaceMismatch if a session is of another model. Any thread may call."""
        salt = self._stores.salt(Realm(tenant, notes.get("cache_salt")))
        if model_digest(model_fields(self._facts, salt)) != file.namespace.model_digest:
            raise NamespaceMismatch(f"shared session {file.name!r} was made by another model")

    def save(self, tenant: str, name: str) -> LocalVersion | None:
        """Save what a session has gained; None: there is nothing of it to be published.

        Raises
        ------
        OffloadError
            It cannot be saved.
        """
        session = self._book.find(tenant, name)
        if session is None:
            return None
        self._persistence.save(session)
        if session.saved is None:
            return None
        notes = notes_of(session) | {"is_pinned": session.is_pinned}
        return LocalVersion((session.saved.saved_s, session.used_s), notes)

    def open(self, tenant: str) -> None:
        """Make the tenant's local store, with its quota."""
        self._persistence.store_of(Realm(tenant))

    def withdraw(self, tenant: str, name: str) -> Mapping[str, Any]:
        """Make room for a newer state of a session: what is in memory of it is nobody's then.

        A request that is adding to it, which can be only if the session was lost to another
        replica, goes on under another name.

        Returns
        -------
        mapping
            Notes on the old state.
        """
        self._persistence.load_tenant(tenant)
        session = self._book.find(tenant, name)
        if session is None:
            return {}
        notes = notes_of(session)
        if session.is_busy:
            self.disown(tenant, name)
        else:
            self._book.remove(session)
        return notes

    def adopt(self, tenant: str, name: str, notes: Mapping[str, Any]) -> LocalVersion | None:
        """Enter what the local store has under a name that was withdrawn; None: it has nothing."""
        store = self._persistence.store_of(Realm(tenant))
        self._persistence.forget_ids(tenant, name)
        try:
            if notes.get("is_pinned"):
                store.pin(name)
            info = store.info(name)
        except SessionNotFound:
            return None
        if self._book.find(tenant, name) is not None:
            return None
        session = self._book.add(as_session(tenant, info, notes))
        self._persistence.note(session)
        assert session.saved is not None
        return LocalVersion((session.saved.saved_s, session.used_s), notes)

    def remove(self, tenant: str, name: str) -> None:
        """Delete what is here of a session that was deleted elsewhere, unless a request uses it."""
        self._persistence.load_tenant(tenant)
        session = self._book.find(tenant, name)
        if session is not None and not session.is_busy:
            self._persistence.delete(session)

    def disown(self, tenant: str, name: str) -> None:
        """Give a session that belongs to another replica now a name of no meaning."""
        session = self._book.find(tenant, name)
        if session is None:
            return
        new_name = f"s-{secrets.token_hex(8)}"
        if session.saved is not None:
            try:
                self._persistence.store_of(session.realm).rename(name, new_name)
            except OffloadError as error:
                _LOG.info("a session that was lost stays in the store: %s", error)
                self._persistence.forget_saved(session)
        self._persistence.forget_ids(tenant, name)
        self._book.rename(session, new_name)
        session.is_automatic = True
        self._persistence.note(session)
