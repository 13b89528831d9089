"""How long one request may take, in time and in headers. An ASGI middleware."""

import asyncio
from typing import TYPE_CHECKING

from offload.daemon.ops.limits_reply import refuse
from offload.daemon.ops.logs import LOG

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from offload.daemon.ops.configuration import LimitsSection


class RequestLimits:
    """Ends requests that hang, whoever's fault it is.

    A request that comes too slowly is answered here, and the application is told that its client
    has gone. So it is when the client does not read. One event loop.

    Parameters
    ----------
    app : ASGI application
    limits : callable
        The limits of now; a reload may change them.
    """

    def __init__(self, app: "ASGIApp", limits: "Callable[[], LimitsSection]") -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await _Exchange(self._app, scope, receive, send, self._limits()).run()


class _NotTaken(OSError):
    """As for a client that has gone: the application stops, and the engine with it."""


class _Exchange:
    """One request and its answer, with its deadlines."""

    def __init__(
        self,
        app: "ASGIApp",
        scope: "Scope",
        receive: "Receive",
        send: "Send",
        limits: "LimitsSection",
    ) -> None:
        self._app = app
        self._scope = scope
        self._receive = receive
        self._send = send
        self._limits = limits
        self._is_read = False
        self._is_started = False
        self._is_over = False

    async def run(self) -> None:
        """Run the application, at most as long as a request may take."""
        num_bytes = sum(len(name) + len(value) for name, value in self._scope["headers"])
        if num_bytes > self._limits.headers:
            message = f"the headers have {num_bytes} bytes, and may have {self._limits.headers}"
            await self._refuse(431, message, "request_too_large")
            return
        # Who watches the daemon does so for days.
        is_watching = self._scope["path"].startswith("/admin/")
        longest = None if is_watching else self._limits.request_timeout
        try:
            async with asyncio.timeout(longest) as deadline:
                await self._app(self._scope, self._bounded_receive, self._bounded_send)
        except _NotTaken as error:
            LOG.warning("client given up", path=self._scope["path"], reason=str(error))
        except TimeoutError:
            if not deadline.expired():
                raise
            message = f"the request took more than {longest:g} s"
            await self._refuse(504, message, "timeout_error")

    async def _bounded_receive(self) -> "Message":
        if self._is_over:
            return {"type": "http.disconnect"}
        if self._is_read:
            return await self._receive()
        try:
            async with asyncio.timeout(self._limits.read_timeout):
                message = await self._receive()
        except TimeoutError:
            why = f"nothing came for {self._limits.read_timeout:g} s"
            await self._refuse(408, why, "timeout_error")
            return {"type": "http.disconnect"}
        self._is_read = not message.get("more_body", False)
        return message

    async def _bounded_send(self, message: "Message") -> None:
        if self._is_over:
            return
        self._is_started = True
        try:
            async with asyncio.timeout(self._limits.write_timeout):
                await self._send(message)
        except TimeoutError as error:
            self._is_over = True
            seconds = f"{self._limits.write_timeout:g} s"
            raise _NotTaken(f"the client took nothing for {seconds}") from error

    async def _refuse(self, status: int, message: str, kind: str) -> None:
        self._is_over = True
        if not self._is_started:
            await refuse(self._send, self._scope["path"], status, message, kind=kind)
