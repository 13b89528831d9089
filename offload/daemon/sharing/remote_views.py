"""How sessions are shown that the object store has, and this replica has not, or not as new."""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from offload.daemon.requests import CachedTokens
from offload.daemon.sharing.shared_sessions import SharedSessions
from offload.daemon.state import SessionView

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future

    from offload.daemon.sharing.shared_sessions import Listing
    from offload.sessions.remote_listing import RemoteInfo

    Infos = list[RemoteInfo]

_FRESH_S = 3.0
"""How old a listing may be that is shown."""

_WAIT_S = 2.0
"""Longest that a listing is waited for; then an older one is shown."""


Views = list[SessionView]  # inside the class, ``list`` is its method


class RemoteViews:
    """Adds to what a replica has what the object store has. Any event loop.

    Parameters
    ----------
    sharing : SharedSessions
    """

    def __init__(self, sharing: SharedSessions) -> None:
        self._sharing = sharing
        self._under_way: dict[str, Future[Listing]] = {}
        self._listed: dict[str, tuple[float, list[RemoteInfo]]] = {}

    def merged(
        self, tenant: str, local: Sequence[SessionView], shared: "Iterable[RemoteInfo]"
    ) -> "Views":
        """Return a tenant's sessions, by name; those that are not here with state ``remote``."""
        views = {view.name: view for view in local}
        for info in shared:
            mine = views.get(info.name)
            if mine is None or self._sharing.is_newer((tenant, info.name), info):
                views[info.name] = _view_of(info)
        return [views[name] for name in sorted(views)]

    async def list(self, tenant: str) -> "Infos":
        """Return what a tenant has published, a few seconds ago at most if that is known."""
        made_s, known = self._listed.get(tenant, (float("-inf"), []))
        if time.monotonic() - made_s < _FRESH_S:
            return known
        listing = self._under_way.get(tenant)
        if listing is None or listing.done():
            listing = self._sharing.list(tenant)
        if listing is None:
            return known
        self._under_way[tenant] = listing
        waiting = asyncio.wrap_future(listing)
        done, _ = await asyncio.wait({waiting}, timeout=_WAIT_S)
        if not done:
            return known
        found = waiting.result()
        if found is not None:
            self._listed[tenant] = time.monotonic(), found
        return known if found is None else found


def _view_of(info: "RemoteInfo") -> SessionView:
    notes: dict[str, Any] = dict(info.notes)
    now = time.time()
    return SessionView(
        name=info.name,
        num_tokens=info.num_tokens,
        tokens=CachedTokens(remote=info.num_tokens),
        size_bytes=info.num_bytes,
        dirty_tokens=0,
        state="remote",
        is_pinned=bool(notes.get("is_pinned")),
        ttl_s=notes.get("ttl_s"),
        expires_s=info.expires_at,
        created_s=float(notes.get("created_s", now)),
        last_used_s=float(notes.get("used_s", now)),
        parent=notes.get("parent"),
        last_hit_share=float(notes.get("last_hit_share", 0.0)),
        num_requests=int(notes.get("num_requests", 0)),
    )
