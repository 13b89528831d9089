"""The object store as each tenant sees it."""

import os
import secrets
import socket
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

from offload.daemon.sharing.sharing_settings import SharingSettings
from offload.errors import ConfigError

if TYPE_CHECKING:
    from offload.sessions.remote_sessions import RemoteSessions

_THREADS = 8
"""Requests under way at a time, of one publication or fetch."""

_PATIENCE_S = 10.0
"""Longest that a call is repeated, which a request may have to wait for."""


class Remotes:
    """Opens ``RemoteSessions`` for tenants when they are first asked for. Any thread may call.

    A tenant's sessions lie below a prefix of its own, which only those can tell who have the
    secret: nothing is shared between tenants, not even blocks that are equal.

    Parameters
    ----------
    settings : SharingSettings
    prefix_of : callable
        Of a tenant.

    Raises
    ------
    ConfigError
        The URL is none that can be opened, or obstore is missing.
    """

    def __init__(self, settings: SharingSettings, prefix_of: Callable[[str], str]) -> None:
        if find_spec("obstore") is None:
            raise ConfigError("tiers.remote needs obstore: pip install 'kv-offload[remote]'")
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._settings = settings
        self._prefix_of = prefix_of
        self._lock = threading.Lock()
        self._open: dict[str, RemoteSessions] = {}
        self._make("check").close()

    @property
    def tenants(self) -> list[str]:
        """Those whose sessions were asked for."""
        with self._lock:
            return list(self._open)

    def of(self, tenant: str) -> "RemoteSessions":
        """Return a tenant's sessions."""
        with self._lock:
            if tenant not in self._open:
                self._open[tenant] = self._make(self._prefix_of(tenant))
            return self._open[tenant]

    def close(self) -> None:
        """Have every call fail from now on. Idempotent."""
        with self._lock:
            for remote in self._open.values():
                remote.close()

    def _make(self, prefix: str) -> "RemoteSessions":
        from offload.sessions.remote_sessions import RemoteSessions  # with obstore: optional
        from offload.tiers.remote_bucket import Bucket, Patience

        lease_s = self._settings.lease_s
        deadline_s = min(_PATIENCE_S, lease_s / 4)  # a renewal that is refused comes in time still
        patience = Patience(deadline_s=deadline_s, request_s=max(1.0, 2 * deadline_s))
        return RemoteSessions(
            Bucket(f"{self._settings.url.rstrip('/')}/{prefix}", patience=patience),
            owner=self.owner,
            lease_s=lease_s,
            num_threads=_THREADS,
        )
