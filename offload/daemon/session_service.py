"""What can be done with sessions from outside, tenant by tenant."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from offload.daemon.state import Explanation, SessionView
from offload.daemon.work.session_keeper import SessionKeeper, translated

R = TypeVar("R")

Sessions = list[SessionView]  # inside the class, ``list`` is its method


class Ask(Protocol):
    """Has the engine's thread run something."""

    def __call__(self, job: Callable[..., R], *args: Any) -> Awaitable[R]:
        """Return what the job returns, or raise what it raises."""
        ...


class SessionService:
    """Sessions, as the APIs see them.

    Every call says whose; what another tenant has does not exist. May be used on any event loop:
    the work is done on the engine's thread, between two steps of the model.

    Every method that names a session raises ``UnknownSession`` if the tenant has none of that name.

    Parameters
    ----------
    ask : callable
    keeper : SessionKeeper
    """

    def __init__(self, ask: Ask, keeper: SessionKeeper) -> None:
        self._ask = ask
        self._keeper = keeper

    async def list(self, tenant: str) -> Sessions:
        """Return a tenant's sessions, by name."""
        return await self._ask(self._keeper.list, tenant)

    async def get(self, tenant: str, name: str) -> SessionView:
        """Return one session."""
        return await self._ask(self._keeper.get, tenant, name)

    async def create(
        self, tenant: str, name: str, ttl_s: float | None = None, pin: bool = False
    ) -> SessionView:
        """Make an empty session.

        Raises
        ------
        BadRequest
            The name is impossible or taken.
        QuotaExceeded
        """
        return await self._ask(self._keeper.create, tenant, name, ttl_s, pin)

    async def delete(self, tenant: str, name: str) -> None:
        """Delete a session, in memory and on disk.

        Raises
        ------
        SessionBusy
            A request is adding to it.
        """
        await self._ask(self._keeper.delete, tenant, name)

    async def update(
        self,
        tenant: str,
        name: str,
        *,
        pin: bool | None = None,
        ttl_s: float | None = None,
    ) -> SessionView:
        """Pin a session or let go of it, or give it another time to live; None changes nothing.

        ``ttl_s=math.inf``: it does not expire.

        Raises
        ------
        QuotaExceeded
            Pinned sessions would take more than their share of the tenant's quota.
        """
        return await self._ask(self._keeper.update, tenant, name, pin, ttl_s)

    async def fork(
        self, tenant: str, name: str, new_name: str, at_token: int | None = None
    ) -> SessionView:
        """Make a session that has the first tokens of another; chunks are shared, not copied.

        Raises
        ------
        BadRequest
            The name is taken, or the session has fewer tokens.
        QuotaExceeded
        """
        return await self._ask(self._keeper.fork, tenant, name, new_name, at_token)

    async def persist(self, tenant: str, name: str) -> SessionView:
        """Save what a session has gained.

        Raises
        ------
        StorageError
            The disk is full, or failed; the session is as before.
        QuotaExceeded
        """
        return await self._ask(self._keeper.persist, tenant, name)

    async def evict(
        self, tenant: str, name: str, to: Literal["host", "disk"] = "disk"
    ) -> SessionView:
        """Move a session off the device, or out of memory.

        Raises
        ------
        SessionBusy
            A request is adding to it.
        StorageError, QuotaExceeded
            It cannot be saved, and stays.
        """
        return await self._ask(self._keeper.evict, tenant, name, to)

    async def prefetch(self, tenant: str, name: str) -> SessionView:
        """Bring a session up from the disk, as far as there is room.

        Raises
        ------
        Incompatible
            What is saved is another model's.
        CorruptChunk
            It is damaged.
        """
        while not await self._ask(self._keeper.prefetch_some, tenant, name):
            continue  # requests get their turn in between
        return await self._ask(self._keeper.get, tenant, name)

    async def explain(self, tenant: str, name: str, token_ids: Sequence[int]) -> Explanation:
        """Return where a prompt leaves what a session has, and why."""
        return await self._ask(self._keeper.explain, tenant, name, token_ids)

    async def export(self, tenant: str, name: str, path: Path) -> SessionView:
        """Save a session, and write it to a new archive at a path of the server's choosing.

        Raises
        ------
        BadRequest
            It is empty, or the path is taken.
        """
        store = await self._ask(self._keeper.prepare_export, tenant, name)
        await asyncio.to_thread(translated, store.export, name, path)
        return await self._ask(self._keeper.get, tenant, name)

    async def import_(self, tenant: str, name: str, path: Path) -> SessionView:
        """Add the session of an archive, under a name.

        Raises
        ------
        Incompatible
            Another model or tenant made it; names what differs.
        BadRequest
            The name is impossible or taken, or the file is no archive.
        QuotaExceeded
        """
        store = await self._ask(self._keeper.prepare_import, tenant, name)
        await asyncio.to_thread(translated, store.import_, path, name)
        return await self._ask(self._keeper.complete_import, tenant, name)
