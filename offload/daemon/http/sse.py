"""Server-sent events: their wire form, and a response that notices when nobody listens."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, Final

from fastapi import Response
from starlette.types import Message, Receive, Scope, Send

COMMENT: Final = b": keep-alive\n\n"
DONE: Final = b"data: [DONE]\n\n"

_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def data_event(data: Mapping[str, Any]) -> bytes:
    """Return an event without a name, as OpenAI's first APIs have it."""
    return b"data: " + _compact(data) + b"\n\n"


def named_event(name: str, data: Mapping[str, Any]) -> bytes:
    """Return an event with a name, as Anthropic's API and ``/v1/responses`` have it."""
    return b"event: " + name.encode() + b"\ndata: " + _compact(data) + b"\n\n"


def _compact(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class EventStream(Response):
    """A response that is written while it is made.

    The source is closed when the client hangs up, when it takes nothing for ``send_timeout_s``, and
    when there is nothing more to say.

    Parameters
    ----------
    source : async generator of bytes
    send_timeout_s : float
    headers : mapping of str to str
    held : AsyncExitStack, optional
        Closed when the stream ends, however it does.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        send_timeout_s: float,
        headers: Mapping[str, str],
        held: AsyncExitStack | None = None,
    ) -> None:
        super().__init__(headers={**_HEADERS, **headers})
        if "Content-Length" not in headers:
            del self.headers["content-length"]
        self._source = source
        self._send_timeout_s = send_timeout_s
        self._held = held or AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the source ends or the client leaves."""
        async with self._held:
            writing = asyncio.create_task(self._write(send))
            leaving = asyncio.create_task(hung_up(receive))
            try:
                await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _end(leaving)
                if not writing.done():
                    await _end(writing)
            if not writing.cancelled():
                writing.result()

    async def _write(self, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        async with aclosing(self._source) as source:
            try:
                await self._send(send, start)
                async for piece in source:
                    message = {"type": "http.response.body", "body": piece, "more_body": True}
                    await self._send(send, message)
                await self._send(send, {"type": "http.response.body", "body": b""})
            except TimeoutError:
                return  # the client takes nothing; closing the source is all that is left to do

    async def _send(self, send: Send, message: Message) -> None:
        async with asyncio.timeout(self._send_timeout_s):
            await send(message)


class ArchiveStream(EventStream):
    """A file that is sent while it is read; ends with its client as a stream of events does."""

    media_type = "application/octet-stream"


async def hung_up(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait({task})
