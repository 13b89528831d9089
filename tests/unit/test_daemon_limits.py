"""What one key and one request may take."""

import asyncio
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from offload.daemon.errors import QueueFull
from offload.daemon.ops.configuration import LimitsSection
from offload.daemon.ops.limits import InFlight
from offload.daemon.ops.limits_request import RequestLimits
from offload.daemon.ops.tenants import Tenant

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ANN, BOB = Tenant("ann", key_name="ann/laptop"), Tenant("bob", key_name="bob")
SHORT = 0.01
"""Seconds: the deadline that a test waits for."""


def test_key_with_as_many_requests_as_it_may_have_is_refused_one_more() -> None:
    limit = InFlight(lambda: 2)
    with ExitStack() as running:
        running.enter_context(limit.admit(ANN))
        running.enter_context(limit.admit(ANN))
        with pytest.raises(QueueFull, match="2 requests of this key"), limit.admit(ANN):
            pytest.fail("was let in")
        with limit.admit(BOB):
            assert limit.num_running == 3
    assert limit.num_running == 0


def test_request_that_fails_is_counted_no_more() -> None:
    limit = InFlight(lambda: 1)
    with pytest.raises(ZeroDivisionError), limit.admit(ANN):
        raise ZeroDivisionError
    with limit.admit(ANN):
        assert limit.num_running == 1


def test_limit_that_is_reloaded_counts_for_the_next_request() -> None:
    limits = iter([1, 2])
    limit = InFlight(lambda: next(limits))
    with limit.admit(ANN), limit.admit(ANN):
        assert limit.num_running == 2


class Exchange:
    """One request through the limits, as a server would run it."""

    def __init__(self, path: str = "/v1/chat/completions", **limits: float) -> None:
        self.limits = LimitsSection(**limits)  # type: ignore[arg-type]
        self.sent: list[Message] = []
        self.scope: Scope = {"type": "http", "path": path, "method": "POST", "headers": []}
        self.messages: list[Message] = [{"type": "http.request", "body": b"all"}]
        self.is_reading = True

    def run(self, app: "ASGIApp") -> None:
        asyncio.run(self._run(app))

    async def _run(self, app: "ASGIApp") -> None:
        await RequestLimits(app, lambda: self.limits)(self.scope, self._receive, self._send)

    async def _receive(self) -> "Message":
        if not self.messages:
            await asyncio.Event().wait()  # the client says nothing more, and stays
        return self.messages.pop(0)

    async def _send(self, message: "Message") -> None:
        if not self.is_reading:
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def error(self) -> Any:
        return json.loads(self.sent[1]["body"])["error"]


async def answer(_scope: "Scope", receive: "Receive", send: "Send") -> None:
    """Read a request to its end, and answer."""
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] != "http.disconnect":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


async def never(_scope: "Scope", receive: "Receive", _send: "Send") -> None:
    """Read a request, and hang."""
    await receive()
    await asyncio.Event().wait()


def test_request_within_its_limits_is_answered() -> None:
    exchange = Exchange()
    exchange.run(answer)
    assert exchange.status == 200


def test_head_that_is_too_large_is_a_431() -> None:
    exchange = Exchange(headers=100)
    exchange.scope["headers"] = [(b"x-padding", b"x" * 92)]
    exchange.run(answer)
    assert exchange.status == 431
    assert "101 bytes, and may have 100" in exchange.error["message"]


def test_body_that_does_not_come_is_a_408_and_ends_the_application() -> None:
    exchange = Exchange(read_timeout=SHORT)
    exchange.messages = [{"type": "http.request", "body": b"half", "more_body": True}]
    exchange.run(answer)
    assert exchange.status == 408
    assert "nothing came for 0.01 s" in exchange.error["message"]


def test_answer_that_takes_too_long_is_a_504() -> None:
    exchange = Exchange(request_timeout=SHORT)
    exchange.run(never)
    assert exchange.status == 504
    assert exchange.error["type"] == "timeout_error"


def test_answer_that_has_begun_is_cut_off_at_the_deadline() -> None:
    async def begin(_scope: "Scope", _receive: "Receive", send: "Send") -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    exchange = Exchange(request_timeout=SHORT)
    exchange.run(begin)
    assert [message["type"] for message in exchange.sent] == ["http.response.start"]


def test_client_that_takes_nothing_ends_the_application_as_if_it_had_gone() -> None:
    exchange = Exchange(write_timeout=SHORT)
    exchange.is_reading = False
    heard: list[Exception] = []

    async def tell(scope: "Scope", receive: "Receive", send: "Send") -> None:
        try:
            await answer(scope, receive, send)
        except OSError as error:
            heard.append(error)
            raise

    exchange.run(tell)
    assert "took nothing for 0.01 s" in str(heard[0])


def test_waiting_for_the_client_to_leave_has_no_deadline_of_reading() -> None:
    async def wait(_scope: "Scope", receive: "Receive", send: "Send") -> None:
        await receive()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 3 * SHORT)
        await send({"type": "http.response.start", "status": 204, "headers": []})

    exchange = Exchange(read_timeout=SHORT)
    exchange.run(wait)
    assert exchange.status == 204


def test_timeout_of_the_application_itself_stays_its_own() -> None:
    async def fail(_scope: "Scope", _receive: "Receive", _send: "Send") -> None:
        raise TimeoutError("of a transfer")

    with pytest.raises(TimeoutError, match="of a transfer"):
        Exchange().run(fail)


def test_stream_of_the_status_page_has_no_deadline() -> None:
    exchange = Exchange(path="/admin/api/events", request_timeout=SHORT)

    async def last(_scope: "Scope", _receive: "Receive", send: "Send") -> None:
        await asyncio.wait({asyncio.create_task(asyncio.Event().wait())}, timeout=3 * SHORT)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    exchange.run(last)
    assert exchange.status == 200
