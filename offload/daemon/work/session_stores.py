"""One store of saved sessions per tenant, below folders that do not tell whose they are."""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offload.daemon.work.session_book import Realm
from offload.errors import ConfigError, StorageError
from offload.key_files import TENANTS, tenant_key
from offload.sessions.store import SessionStore
from offload.tiers.sealing import Sealer

_SECRET = "secret"
_STORE = "kv"
_NOTES = "sessions.json"
_SECRET_BYTES = 32
_OPEN_MODE = 0o077


class SessionStores:
    """Opens the stores of tenants when they are first asked for.

    A tenant's folder and salt are derived from a secret of the server: who knows a tenant's name,
    or writes another's salt into a request, finds nothing. Only the engine's thread calls methods,
    and what it hands out may be used on any.

    Parameters
    ----------
    path : Path
        Made, 0700, with the secret in it, 0600.
    quota_bytes : int or None
        Of each tenant.
    min_free_bytes : int
    sealer : Sealer, optional
        Encrypts what is saved and noted, with another key for each tenant.
    secret_file : Path, optional
        Has the secret, which this server shares with others; made, 0600, if it is missing.

    Raises
    ------
    ConfigError
        The folder cannot be used, or was made with another secret.
    """

    def __init__(
        self,
        path: Path,
        quota_bytes: int | None,
        min_free_bytes: int,
        sealer: Sealer | None = None,
        secret_file: Path | None = None,
    ) -> None:
        self._tenants = path / TENANTS
        try:
            for folder in (path, self._tenants):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            shared = None if secret_file is None else _read_shared(secret_file.expanduser())
            self._secret = _read_secret(path / _SECRET, shared)
        except OSError as error:
            raise ConfigError(f"cannot use {path}: {error.strerror or error}") from error
        self._quota_bytes = quota_bytes
        self._min_free_bytes = min_free_bytes
        self._sealer = sealer
        self._open: dict[Realm, SessionStore] = {}
        self._counted: dict[Path, tuple[int, int]] | None = None

    def of(self, realm: Realm) -> SessionStore:
        """Return the store that a realm's sessions are saved to.

        Raises
        ------
        ConfigError, StorageError
        """
        if realm not in self._open:
            self._open[realm] = self._open_store(
                self._folder(realm.tenant) / _STORE, self.salt(realm)
            )
        return self._open[realm]

    def salt(self, realm: Realm) -> str:
        """Return what keeps a realm's namespace apart from all others."""
        return self._derive("salt", realm.tenant, realm.cache_salt or "")

    def path_of(self, tenant: str) -> Path:
        """Return the root of a tenant's store. Any thread may call."""
        return self._folder(tenant) / _STORE

    def prefix_of(self, tenant: str) -> str:
        """Return what keeps a tenant's shared sessions apart from others'. Any thread may call."""
        return self._derive("remote", tenant)[:32]

    def read_notes(self, tenant: str) -> dict[str, dict[str, Any]]:
        """Return what was noted of a tenant's sessions, by name; nothing if it cannot be read."""
        folder = self._folder(tenant)
        try:
            content = (folder / _NOTES).read_bytes()
            if (key := self._key(folder)) is not None:
                content = Sealer(key).open("notes", content, b"", str(folder / _NOTES))
            notes = json.loads(content)
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def write_notes(self, tenant: str, notes: dict[str, dict[str, Any]]) -> None:
        """Replace the notes of a tenant.

        Raises
        ------
        StorageError
        """
        folder = self._folder(tenant)
        path, content = folder / _NOTES, json.dumps(notes).encode()
        if (key := self._key(folder)) is not None:  # notes have the first tokens of sessions
            content = Sealer(key).seal("notes", content, b"")
        draft = path.with_suffix(".tmp")
        try:
            draft.unlink(missing_ok=True)  # of a process that was killed
            _write_private(draft, content)
            draft.replace(path)
        except OSError as error:
            raise StorageError(error.errno, f"cannot write {path}: {error.strerror}") from error

    def is_known(self, tenant: str) -> bool:
        """Whether the tenant has a folder."""
        return (self._folder(tenant) / _STORE).is_dir()

    @property
    def realms(self) -> list[Realm]:
        """Those whose stores are open."""
        return list(self._open)

    def count(self) -> tuple[int, int]:
        """Return how many sessions all tenants have saved, and their bytes.

        Of a tenant whose store is not open, as it was when this was first asked for.
        """
        if self._counted is None:
            self._counted = {folder: self._survey(folder) for folder in self._folders()}
        for realm, store in self._open.items():
            usage = store.usage()
            folder = self._folder(realm.tenant) / _STORE
            self._counted[folder] = usage.num_sessions, usage.used_bytes
        return (
            sum(number for number, _ in self._counted.values()),
            sum(size for _, size in self._counted.values()),
        )

    def close_store(self, realm: Realm) -> None:
        """Close the store of a realm, from which nothing is lent."""
        self._open.pop(realm).close()

    def close(self) -> None:
        """Close every store. Idempotent."""
        while self._open:
            self._open.popitem()[1].close()

    def _survey(self, folder: Path) -> tuple[int, int]:
        with self._open_store(folder, "") as store:
            store.list()  # which removes what has expired
            usage = store.usage()
            return usage.num_sessions, usage.used_bytes

    def _folders(self) -> Iterator[Path]:
        for folder in sorted(self._tenants.iterdir()):
            if (folder / _STORE).is_dir():
                yield folder / _STORE

    def _folder(self, tenant: str) -> Path:
        return self._tenants / self._derive("folder", tenant)[:32]

    def _open_store(self, path: Path, salt: str) -> SessionStore:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return SessionStore(
            path,
            quota=self._quota_bytes,
            min_free=self._min_free_bytes,
            salt=salt,
            key=self._key(path.parent),
        )

    def _key(self, folder: Path) -> bytes | None:
        """Return the key of the tenant whose folder this is."""
        return None if self._sealer is None else tenant_key(self._sealer, folder)

    def _derive(self, *parts: str) -> str:
        # Lengths are part of it, so that no two lists of parts read alike.
        content = json.dumps(parts).encode()
        return hmac.new(self._secret, content, hashlib.sha256).hexdigest()


def _read_shared(path: Path) -> bytes:
    """Return the secret of several servers, made when there is none."""
    try:
        found = _read_secret(path)
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"cannot use the secret of {path}: {error.strerror}") from error
    if mode & _OPEN_MODE:
        raise ConfigError(
            f"{path} has mode {mode & 0o777:o}: others may read or change it; chmod 600 {path}"
        )
    return found


def _read_secret(path: Path, shared: bytes | None = None) -> bytes:
    """Return the server's secret, made when there is none: a random one, or that of others."""
    if not path.exists():
        draft = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
        _write_private(draft, shared or secrets.token_bytes(_SECRET_BYTES))
        try:
            with contextlib.suppress(FileExistsError):
                os.link(draft, path)  # whole, or not at all
        finally:
            draft.unlink()
    found = path.read_bytes()
    if len(found) != _SECRET_BYTES:
        raise ConfigError(f"{path} has {len(found)} bytes, a secret has {_SECRET_BYTES}")
    if shared not in (None, found):
        raise ConfigError(
            f"{path} is not the secret that is shared: what is saved there would not be found. "
            "Share this one, or take a new data path"
        )
    return found


def _write_private(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
