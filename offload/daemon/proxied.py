"""What a proxy of others sees of a replica: all that does not depend on which replica it meets."""

import ipaddress
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from offload.daemon.ops.limits_reply import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OWN_PATHS: Final = frozenset({"/", "/metrics"})
_OWN_PREFIX: Final = "/admin/"
_REQUEST_ID: Final = b"x-request-id"
_OF_ONE: Final = "{path} is of one replica; ask its socket, replica-N/daemon.sock in data_path"
_NO_KEYS: Final = "without keys only this machine is answered; see server.api_keys_file"


class Proxied:
    """An ASGI middleware between a proxy and a replica.

    The proxy chooses a replica for every request, so numbers of one replica would be those of now
    this and now that one: they are refused here. The server of the replica's own socket runs the
    lifespan of the application, so that of the proxy is answered here. And the proxy names the
    request in its answer, as the application would.

    Parameters
    ----------
    app : ASGI application
    is_local_only : callable
        Whether nobody but this machine is answered; asked for each request.
    """

    def __init__(self, app: "ASGIApp", is_local_only: Callable[[], bool]) -> None:
        self._app = app
        self._is_local_only = is_local_only

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Serve one request, or refuse it."""
        if scope["type"] == "lifespan":
            for state in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{state}.complete"})
            return
        path = scope["path"]
        if path in _OWN_PATHS or path.startswith(_OWN_PREFIX):
            await refuse(send, path, 404, _OF_ONE.format(path=path), kind="not_found")
        elif self._is_local_only() and not _is_local(scope):
            await refuse(send, path, 403, _NO_KEYS, kind="permission_error")
        else:
            await self._app(scope, receive, _unnamed(send))


def _unnamed(send: "Send") -> "Send":
    async def send_unnamed(message: "Message") -> None:
        if message["type"] == "http.response.start":
            headers = [each for each in message["headers"] if each[0].lower() != _REQUEST_ID]
            message = {**message, "headers": headers}
        await send(message)

    return send_unnamed


def _is_local(scope: "Scope") -> bool:
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
