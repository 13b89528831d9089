"""What every endpoint needs, carried by the application and nowhere else."""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Final, ParamSpec, Protocol, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offload.daemon.engine import DaemonEngine
from offload.daemon.errors import ModelNotFound
from offload.daemon.http.background import Background
from offload.daemon.http.errors import Unauthorised
from offload.daemon.http.identity import session_hint
from offload.daemon.http.options import HttpOptions
from offload.daemon.http.render import Renderer
from offload.daemon.http.store import HttpStore
from offload.daemon.ops.tenants import Tenant

_log = logging.getLogger(__name__)
_REQUEST_ID: Final = re.compile(r"[\w.:@-]{1,128}", re.ASCII)

P = ParamSpec("P")
R = TypeVar("R")


class TenantFinder(Protocol):
    """Tells whose request it is; see ``offload.daemon.ops.access.Access``."""

    def tenant_of(self, headers: Mapping[str, str]) -> Tenant | None:
        """Return the tenant, or None for no key or an unknown one."""
        ...


class Guard(Protocol):
    """Bounds what one tenant has under way."""

    def admit(self, tenant: Tenant) -> AbstractContextManager[None]:
        """Enter for as long as a request is computed, or raise ``QueueFull``."""
        ...


@dataclass(frozen=True, slots=True)
class HttpContext:
    """The parts that endpoints are made of.

    Attributes
    ----------
    engine : DaemonEngine
    options : HttpOptions
    access : TenantFinder
    guard : Guard or None
    renderer : Renderer
    store : HttpStore
    background : Background
    worker : ThreadPoolExecutor
        One thread, on which prompts are rendered and the store is asked.
    """

    engine: DaemonEngine
    options: HttpOptions
    access: TenantFinder
    guard: Guard | None
    renderer: Renderer
    store: HttpStore
    background: Background
    worker: ThreadPoolExecutor

    async def work(self, job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run something that takes time away from the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.worker, lambda: job(*args, **kwargs))

    def admitted(self, tenant: Tenant) -> AbstractContextManager[None]:
        """Enter for as long as a request of a tenant is computed, or raise QueueFull."""
        return nullcontext() if self.guard is None else self.guard.admit(tenant)

    @property
    def max_context_tokens(self) -> int:
        """Tokens of prompt and answer together."""
        model = self.engine.model.max_context_tokens
        return min(self.engine.settings.max_context_tokens or model, model)

    def model_name(self, asked: str | None) -> str:
        """Return the name to answer under, or raise ModelNotFound."""
        served = self.engine.model.name
        if asked is None or asked == served:
            return served
        if self.options.accept_any_model:
            return asked
        raise ModelNotFound(f"the model {asked[:200]!r} is not served; {served!r} is")

    def session_hint(
        self, body: BaseModel, headers: Mapping[str, str], previous: str | None = None
    ) -> str | None:
        """Return the session that a request says it is of."""
        fields = body.model_dump(include=_IDENTITY_FIELDS)
        return session_hint(fields, headers, self.options.id_headers, previous)


_IDENTITY_FIELDS: Final = {
    "session_id",
    "conversation",
    "vllm_xargs",
    "metadata",
    "prompt_cache_key",
}


def context_of(request: Request) -> HttpContext:
    """Return what the application carries."""
    context: HttpContext = request.app.state.context
    return context


def tenant_of(request: Request) -> Tenant:
    """Return whose request it is.

    Raises
    ------
    Unauthorised
        It shows no key, or an unknown one.
    """
    tenant = context_of(request).access.tenant_of(request.headers)
    if tenant is None:
        raise Unauthorised("no API key, or one that is not known")
    return tenant


Context = Annotated[HttpContext, Depends(context_of)]
Caller = Annotated[Tenant, Depends(tenant_of)]


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess."""
    return f"{prefix}{secrets.token_hex(16)}"


def log_unknown_fields(body: BaseModel, endpoint: str) -> None:
    """Say which fields of a request nobody here understands; they are accepted all the same."""
    if body.model_extra and _log.isEnabledFor(logging.DEBUG):
        names = ", ".join(repr(name)[:80] for name in sorted(body.model_extra)[:20])
        _log.debug("%s: fields without effect: %s", endpoint, names)


class RequestIds:
    """Give each request the id that the client sent, or a new one, and answer with it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else new_id("req_")
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def request_id_of(request: Request) -> str:
    """Return the id of a request."""
    found: Any = request.state.request_id
    return str(found)
