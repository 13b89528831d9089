"""The status page, what feeds it, and what an administrator can do with any tenant's session."""

import asyncio
from collections.abc import AsyncGenerator
from importlib import resources
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field

from offload.daemon.http.sse import EventStream, named_event
from offload.daemon.ops.status_state import StatusFeed
from offload.daemon.session_service import SessionService

_MAX_WATCHERS: Final = 16
_PERIOD_S: Final = 1.0
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

Name = Annotated[str, Field(min_length=1, max_length=512)]


class SessionAction(BaseModel):
    """What to do with a session."""

    model_config = ConfigDict(extra="forbid")

    tenant: Name
    name: Name
    action: Literal["pin", "unpin", "fork", "to_host", "to_disk", "prefetch", "persist", "delete"]
    new_name: Name | None = None


def page_router() -> APIRouter:
    """Return the route of the page itself, which says nothing about anybody."""
    content = resources.files("offload").joinpath("assets/daemon/status.html").read_text("utf-8")
    router = APIRouter(tags=["watching"])

    @router.get("/", summary="Status page", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(content, headers=_HEADERS)

    return router


def admin_router(
    feed: StatusFeed, sessions: SessionService, closing: asyncio.Event, send_timeout_s: float
) -> APIRouter:
    """Return the routes below ``/admin/api``; who may use them is decided before.

    Parameters
    ----------
    feed : StatusFeed
    sessions : SessionService
    closing : asyncio.Event
        Set when the server ends, which ends all streams.
    send_timeout_s : float
    """
    router = APIRouter(prefix="/admin/api", tags=["watching"])
    num_watchers = 0

    @router.get("/state", summary="Everything the status page shows")
    async def state() -> dict[str, Any]:
        feed.expire()  # who asks once wants to see what came before
        return await feed.current()

    @router.get(
        "/events",
        summary="The same, once a second",
        response_class=EventStream,
        responses={200: {"content": {"text/event-stream": {}}}, 429: {"description": "Too many"}},
    )
    async def events() -> Response:
        if num_watchers >= _MAX_WATCHERS:
            raise HTTPException(429, f"{num_watchers} are watching, and {_MAX_WATCHERS} may")
        return EventStream(states(), send_timeout_s, {})

    async def states() -> AsyncGenerator[bytes, None]:
        nonlocal num_watchers
        num_watchers += 1
        try:
            while not closing.is_set():
                yield named_event("state", await feed.current())
                await _wait(closing, _PERIOD_S)
        finally:
            num_watchers -= 1

    @router.post("/sessions", summary="Change a session of any tenant")
    async def change(action: SessionAction) -> dict[str, Any]:
        await _change(sessions, action)
        feed.expire()
        return {"done": action.action, "tenant": action.tenant, "name": action.name}

    return router


async def _change(sessions: SessionService, what: SessionAction) -> None:
    match what.action:
        case "pin" | "unpin":
            await sessions.update(what.tenant, what.name, pin=what.action == "pin")
        case "fork":
            new_name = what.new_name or f"{what.name}-fork"
            await sessions.fork(what.tenant, what.name, new_name)
        case "to_host":
            await sessions.evict(what.tenant, what.name, "host")
        case "to_disk":
            await sessions.evict(what.tenant, what.name, "disk")
        case "prefetch":
            await sessions.prefetch(what.tenant, what.name)
        case "persist":
            await sessions.persist(what.tenant, what.name)
        case "delete":
            await sessions.delete(what.tenant, what.name)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
