"""Bodies of requests are bounded, and JSON."""

import asyncio
import json

import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from offload.daemon.http.body import MAX_DEPTH, BodyLimit, parse_json

GOOD = [{"a": [1, 2.5, None, "é"]}, [], "text", "\U0001f600", 12345678901234567890]


@pytest.mark.parametrize("value", GOOD)
def test_json_that_is_good_is_parsed(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


BAD = [
    b"",
    b"{",
    b"\xff\xfe",
    b"NaN",
    b'{"a": Infinity}',
    b"1e999",
    b'"\\ud800"',
    b'{"\\udfff": 1}',
    b"1" * 5000,
    b"[" * 100_000,
    b'{"a":' * (MAX_DEPTH + 2) + b"1" + b"}" * (MAX_DEPTH + 2),
]


@pytest.mark.parametrize("raw", BAD, ids=range(len(BAD)))
def test_json_that_is_none_is_a_bad_request(raw: bytes) -> None:
    with pytest.raises(HTTPException) as caught:
        parse_json(raw)
    assert caught.value.status_code == 400


def test_json_as_deep_as_is_allowed_is_parsed() -> None:
    raw = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert parse_json(raw) is not None


class Reader:
    """An application that reads its body to the end, and counts."""

    num_read = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            self.num_read += len(message["body"])
            if not message.get("more_body"):
                return


def send_pieces(reader: Reader, pieces: list[bytes], declared: int | None) -> list[bytes]:
    """Have a body read that may have 25 bytes; return the pieces that were not asked for."""
    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    waiting = list(pieces)

    async def receive() -> Message:
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(_: Message) -> None:
        raise AssertionError("nothing is sent")

    async def run() -> None:
        scope = {"type": "http", "path": "/", "headers": headers}
        await BodyLimit(reader, lambda _: 25)(scope, receive, send)

    try:
        asyncio.run(run())
    finally:
        pieces[:] = waiting
    return waiting


@pytest.mark.parametrize("declared", [None, 1000], ids=["in pieces", "declared"])
def test_body_that_is_too_long_is_poured_away_so_that_its_sender_hears_it(
    declared: int | None,
) -> None:
    reader, pieces = Reader(), [b"x" * 10] * 100
    with pytest.raises(HTTPException) as caught:
        send_pieces(reader, pieces, declared)
    assert caught.value.status_code == 413
    assert pieces == []
    assert reader.num_read <= 25


def test_body_without_end_is_not_read_to_its_end() -> None:
    pieces = [bytes(1 << 20)] * 100
    with pytest.raises(HTTPException):
        send_pieces(Reader(), pieces, None)
    assert len(pieces) > 30


def test_body_of_just_the_limit_is_read() -> None:
    reader = Reader()
    assert send_pieces(reader, [b"x" * 20, b"x" * 5], None) == []
    assert reader.num_read == 25
