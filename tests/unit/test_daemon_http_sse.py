"""Streams: signs of life, and an end when nobody listens."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import pytest
from starlette.types import Message

from offload.daemon.errors import QueueFull
from offload.daemon.http.generation import EventFeed
from offload.daemon.http.sse import EventStream, data_event, named_event
from offload.daemon.requests import CachedTokens, Event, Finished, Started, Token

STARTED = Started(None, 1, CachedTokens(), 0, 0.0, 0.0, None)
FINISHED = Finished("stop", "", None, 1, 1, CachedTokens(), 1, 0.0, 0.0, 0.0)
SCOPE = {"type": "http"}


class Source:
    """Events of a request that wait for a gate before the last."""

    def __init__(self, *events: Event) -> None:
        self.gate = asyncio.Event()
        self.is_closed = False
        self._events = events

    async def events(self) -> AsyncGenerator[Event, None]:
        try:
            for event in self._events:
                yield event
            await self.gate.wait()
            yield FINISHED
        finally:
            self.is_closed = True


def test_feed_without_events_tells_so_again_and_again() -> None:
    async def run() -> list[Event | None]:
        source = Source(STARTED)
        feed = EventFeed(source.events(), keepalive_s=0.001)
        assert await feed.open() == STARTED
        found: list[Event | None] = []
        async for event in feed:
            found.append(event)
            if found.count(None) == 3:
                source.gate.set()
        await feed.aclose()
        return found

    found = asyncio.run(run())
    assert found[0] == STARTED
    assert found[-1] == FINISHED
    assert found.count(None) >= 3


def test_feed_that_is_refused_says_so_when_it_is_opened() -> None:
    async def refused() -> AsyncGenerator[Event, None]:
        raise QueueFull("full", 1)
        yield FINISHED

    async def run() -> None:
        with pytest.raises(QueueFull):
            await EventFeed(refused(), 10).open()

    asyncio.run(run())


@pytest.mark.parametrize("is_waiting", [True, False])
def test_feed_that_is_closed_closes_its_source(is_waiting: bool) -> None:
    async def run() -> bool:
        source = Source(STARTED, Token(1, "a"))
        feed = EventFeed(source.events(), keepalive_s=0.001 if is_waiting else 10)
        await feed.open()
        async for event in feed:
            if event is None or (isinstance(event, Token) and not is_waiting):
                break
        await feed.aclose()
        return source.is_closed

    assert asyncio.run(run())


class Wire:
    """A connection: what is sent, and when the client hangs up."""

    def __init__(self, *, takes_nothing: bool = False) -> None:
        self.sent: list[Message] = []
        self.hang_up = asyncio.Event()
        self._is_stuck = takes_nothing

    async def receive(self) -> Message:
        await self.hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._is_stuck:
            await asyncio.Event().wait()
        self.sent.append(message)


class Lines:
    """Endless lines."""

    def __init__(self) -> None:
        self.is_closed = False

    async def lines(self, wire: Wire | None) -> AsyncGenerator[bytes, None]:
        try:
            yield data_event({"n": 1})
            if wire is not None:
                wire.hang_up.set()
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


async def stream(wire: Wire, lines: Lines, *, endless: bool) -> bool:
    """Send a stream; return whether what it held was closed."""
    closed = asyncio.Event()
    async with AsyncExitStack() as stack:
        stack.callback(closed.set)
        held = stack.pop_all()
    source = lines.lines(wire if endless else None)
    await EventStream(source, 0.01, {"X-Test": "1"}, held)(SCOPE, wire.receive, wire.send)
    return closed.is_set()


def test_stream_to_its_end_is_sent_and_closed() -> None:
    async def run() -> None:
        wire, lines = Wire(), Lines()
        assert await stream(wire, lines, endless=False)
        assert lines.is_closed
        start, *rest = wire.sent
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["x-accel-buffering"] == "no"
        assert "content-length" not in headers
        assert [part["body"] for part in rest] == [b'data: {"n":1}\n\n', b""]

    asyncio.run(run())


def test_stream_whose_client_hangs_up_is_closed() -> None:
    async def run() -> None:
        wire, lines = Wire(), Lines()
        assert await stream(wire, lines, endless=True)
        assert lines.is_closed

    asyncio.run(run())


def test_stream_whose_client_takes_nothing_is_given_up() -> None:
    async def run() -> None:
        wire, lines = Wire(takes_nothing=True), Lines()
        assert await stream(wire, lines, endless=True)
        assert wire.sent == []

    asyncio.run(run())


def test_event_with_line_breaks_is_one_line_of_data() -> None:
    lines = named_event("ping", {"text": "a\nb\r\n"}).decode().splitlines()
    assert lines[0] == "event: ping"
    assert json.loads(lines[1].removeprefix("data: ")) == {"text": "a\nb\r\n"}
    assert lines[2:] == [""]
