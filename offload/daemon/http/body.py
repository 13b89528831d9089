"""Bodies of requests: bounded while they are read, and JSON that everybody else can read too."""

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
MAX_DEPTH: Final = 128
"""Levels of lists and objects; also less than any function here recurses to."""

_POUR_AWAY_BYTES: Final = 64 << 20
_POUR_AWAY_S: Final = 5.0


class BodyLimit:
    """Refuse bodies that are too long before they are parsed, or even there.

    Parameters
    ----------
    app : ASGI application
    limit_of : callable
        Path of a request to bytes.
    """

    def __init__(self, app: ASGIApp, limit_of: Callable[[str], int]) -> None:
        self._app = app
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope["path"])
        declared = dict(scope["headers"]).get(b"content-length", b"")
        num_read = int(declared) if declared.isdigit() and int(declared) > limit else 0

        async def bounded_receive() -> Message:
            nonlocal num_read
            if num_read <= limit:
                message = await receive()
                num_read += len(message.get("body", b""))
                if num_read <= limit:
                    return message
            found = num_read
            await _pour_away(receive)
            raise HTTPException(413, f"the body has at least {found} bytes, {limit} are allowed")

        await self._app(scope, bounded_receive, send)


async def _pour_away(receive: Receive) -> None:
    """Read the rest of a body, if it is not too long: who still sends does not hear the answer."""
    num_poured = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_POUR_AWAY_S):
            while num_poured < _POUR_AWAY_BYTES:
                message = await receive()
                num_poured += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


class StrictJsonRoute(APIRoute):
    """A route whose requests parse their JSON as the standard has it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the request before FastAPI reads it."""
        handler = super().get_route_handler()

        async def strict_handler(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict_handler


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Parse the body once."""
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


def parse_json(raw: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises
    ------
    HTTPException
        400, for what is no JSON: also NaN, numbers beyond floats, half of a surrogate pair, which
        no answer could quote, and more than 128 levels.
    """
    try:
        value = json.loads(raw, parse_constant=_refuse, parse_float=_finite)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise HTTPException(400, f"the body is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    if _is_deeper(value, MAX_DEPTH):
        raise HTTPException(400, f"the body is nested deeper than {MAX_DEPTH} levels")
    return value


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond the largest number")
    return value


def _is_deeper(value: Any, max_depth: int) -> bool:
    level = [value]
    for _ in range(max_depth + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, (dict, list)))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, (dict, list)))
        if not inner:
            return False
        level = inner
    return True
