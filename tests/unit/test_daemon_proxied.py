"""What a replica shows to a proxy of others, and what it keeps for its own socket."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from offload.daemon.proxied import Proxied

HERE, ELSEWHERE = ("127.0.0.1", 5000), ("192.0.2.7", 5000)


async def _hello(_: Request) -> PlainTextResponse:
    return PlainTextResponse("hello", headers={"X-Request-Id": "ours", "X-Session-ID": "notes"})


APP = Starlette(routes=[Route("/v1/models", _hello)])


def answer(path: str, client: tuple[str, int] | None, *, is_local_only: bool) -> dict[str, Any]:
    """Return the status, the headers and the body of one request."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [],
        "client": client,
    }
    asyncio.run(Proxied(APP, lambda: is_local_only)(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return {"status": sent[0]["status"], "headers": headers, "body": body.decode()}


@pytest.mark.parametrize("path", ["/", "/metrics", "/admin/api/state", "/admin/api/events"])
def test_path_of_one_replica_is_refused_with_where_to_ask(path: str) -> None:
    found = answer(path, HERE, is_local_only=False)
    assert found["status"] == 404
    assert "daemon.sock" in found["body"]


@pytest.mark.parametrize(
    ("client", "is_local_only", "status"),
    [
        (HERE, True, 200),
        (("::1", 5000), True, 200),
        (ELSEWHERE, True, 403),
        (("a name", 5000), True, 403),
        (None, True, 403),
        (ELSEWHERE, False, 200),
    ],
)
def test_machine_that_asks_is_looked_at_where_there_are_no_keys(
    client: tuple[str, int] | None, is_local_only: bool, status: int
) -> None:
    assert answer("/v1/models", client, is_local_only=is_local_only)["status"] == status


def test_request_is_named_by_the_proxy_alone() -> None:
    headers = answer("/v1/models", HERE, is_local_only=False)["headers"]
    assert headers["x-session-id"] == "notes"
    assert "x-request-id" not in headers


def test_lifespan_of_the_proxy_is_answered_and_reaches_nobody() -> None:
    sent: list[str] = []

    async def receive() -> dict[str, Any]:
        return {"type": f"lifespan.{'shutdown' if sent else 'startup'}"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message["type"])

    async def never(*_: object) -> None:
        raise AssertionError

    asyncio.run(Proxied(never, lambda: True)({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
