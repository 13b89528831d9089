"""Lets in who shows a key, and keeps other people's web pages out. An ASGI middleware."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from offload.daemon.ops.access import OPEN_PATHS
from offload.daemon.ops.limits_reply import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from offload.daemon.ops.access import Access

_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1", ""})


class AccessMiddleware:
    """Refuses requests without a known key, but to the paths that are open.

    Where no keys are asked for, what protects a daemon on loopback is that only this machine
    reaches it. A web page can: from a browser on this machine, under a name that it had resolved to
    loopback, or blindly from another origin. So then the names of the host and of the origin have
    to be this machine's, or configured.

    Parameters
    ----------
    app : ASGI application
    access : Access
    open_paths : callable
        Paths that need no key, next to the probes; asked for each request.
    hosts, origins : callable
        More names of this server, and origins of web pages that may talk to it.
    """

    def __init__(
        self,
        app: "ASGIApp",
        access: "Access",
        open_paths: Callable[[], Iterable[str]],
        hosts: Callable[[], Iterable[str]],
        origins: Callable[[], Iterable[str]],
    ) -> None:
        self._app = app
        self._access = access
        self._open_paths = open_paths
        self._hosts = hosts
        self._origins = origins

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], Headers(scope=scope)
        stranger = self._stranger(headers) if self._access.is_open else None
        if stranger is not None:
            message = f"{stranger} is not this server; see server.allowed_hosts and cors_origins"
            await refuse(send, path, 403, message, kind="permission_error")
            return
        tenant = self._access.tenant_of(headers)
        if tenant is None and not self._is_open(scope):
            message = "no key was shown that is known here; Authorization: Bearer KEY"
            await refuse(
                send, path, 401, message, kind="authentication_error", code="invalid_api_key"
            )
            return
        if path.startswith("/admin/") and not (tenant is not None and tenant.is_admin):
            await refuse(
                send, path, 403, "this needs an administrator's key", kind="permission_error"
            )
            return
        await self._app(scope, receive, send)

    def _is_open(self, scope: "Scope") -> bool:
        # A browser asks beforehand, and without a key, whether it may show one.
        is_preflight = scope["method"] == "OPTIONS" and bool(list(self._origins()))
        return is_preflight or scope["path"] in self._open_paths()

    def _stranger(self, headers: Headers) -> str | None:
        names = {*_LOCAL_NAMES, *self._hosts()}
        host = headers.get("host", "")
        if _host_name(f"//{host}") not in names:
            return f"host {host!r}"
        origin = headers.get("origin")
        if origin is None or origin in self._origins() or _host_name(origin) in names - {""}:
            return None
        return f"origin {origin!r}"


def _host_name(url: str) -> str | None:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return None
