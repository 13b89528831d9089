"""What can be done with sessions from outside, where several daemons share them."""

from collections.abc import Sequence
from pathlib import Path

from offload.daemon.errors import BadRequest, UnknownSession
from offload.daemon.session_service import Ask, Sessions, SessionService
from offload.daemon.sharing.entry import Key
from offload.daemon.sharing.remote_views import RemoteViews
from offload.daemon.sharing.shared_sessions import SharedSessions
from offload.daemon.state import Explanation, SessionView
from offload.daemon.work.session_keeper import SessionKeeper
from offload.errors import ConfigError
from offload.sessions.names import check_name


class SharedSessionService(SessionService):
    """As ``SessionService``; what needs the newest state of a session takes it first.

    Every method but ``list``, ``get`` and ``evict``, which show and move what is here, raises
    ``SessionBusy`` while another replica has the session.

    Parameters
    ----------
    ask : callable
    keeper : SessionKeeper
    sharing : SharedSessions
    """

    def __init__(self, ask: Ask, keeper: SessionKeeper, sharing: SharedSessions) -> None:
        super().__init__(ask, keeper)
        self._sharing = sharing
        self._views = RemoteViews(sharing)

    async def list(self, tenant: str) -> Sessions:
        """Return a tenant's sessions, wherever they are, by name."""
        shared = await self._views.list(tenant)  # first: what others have deleted is removed here
        return self._views.merged(tenant, await super().list(tenant), shared)

    async def get(self, tenant: str, name: str) -> SessionView:
        """Return one session, wherever it is."""
        found = {view.name: view for view in await self.list(tenant)}
        return found.get(name) or await super().get(tenant, name)

    async def create(
        self, tenant: str, name: str, ttl_s: float | None = None, pin: bool = False
    ) -> SessionView:
        """Make an empty session, which no replica may have."""
        async with self._sharing.use(_new(tenant, name), is_new=True):
            return await super().create(tenant, name, ttl_s, pin)

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a session for all replicas."""
        key = tenant, name
        async with self._sharing.use(key):
            was_shared = await self._sharing.delete(key)
            try:
                await super().delete(tenant, name)
            except UnknownSession:
                if not was_shared:
                    raise

    async def update(
        self,
        tenant: str,
        name: str,
        *,
        pin: bool | None = None,
        ttl_s: float | None = None,
    ) -> SessionView:
        """Change how long a session lives, for all replicas; pins are of this one."""
        async with self._sharing.use((tenant, name), is_changed=True):
            return await super().update(tenant, name, pin=pin, ttl_s=ttl_s)

    async def fork(
        self, tenant: str, name: str, new_name: str, at_token: int | None = None
    ) -> SessionView:
        """Make a session that has the first tokens of another."""
        async with (
            self._sharing.use((tenant, name)),
            self._sharing.use(_new(tenant, new_name), is_new=True),
        ):
            return await super().fork(tenant, name, new_name, at_token)

    async def persist(self, tenant: str, name: str) -> SessionView:
        """Save what a session has gained, and publish it; as of ``SessionService``."""
        async with self._sharing.use((tenant, name)):
            view = await super().persist(tenant, name)
            await self._sharing.publish((tenant, name))
            return view

    async def prefetch(self, tenant: str, name: str) -> SessionView:
        """Bring a session up from the object store, and from the disk."""
        async with self._sharing.use((tenant, name)):
            return await super().prefetch(tenant, name)

    async def explain(self, tenant: str, name: str, token_ids: Sequence[int]) -> Explanation:
        """Return where a prompt leaves what a session has, and why."""
        async with self._sharing.use((tenant, name)):
            return await super().explain(tenant, name, token_ids)

    async def export(self, tenant: str, name: str, path: Path) -> SessionView:
        """Write a session to a new archive."""
        async with self._sharing.use((tenant, name)):
            return await super().export(tenant, name, path)

    async def import_(self, tenant: str, name: str, path: Path) -> SessionView:
        """Add the session of an archive, under a name that no replica has."""
        async with self._sharing.use(_new(tenant, name), is_new=True):
            return await super().import_(tenant, name, path)


def _new(tenant: str, name: str) -> Key:
    """Return the key of a session that is to be made, if that is a name."""
    try:
        return tenant, check_name(name)
    except ConfigError as error:
        raise BadRequest(str(error), "name") from error
