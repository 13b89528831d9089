"""Logs: one line per event, with nothing in it that a client could break out of."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from offload.daemon.ops.config_sections import LoggingSection
from offload.daemon.ops.logs import LOG, RequestLog, configure_logs
from offload.daemon.ops.watched_engine import RequestRecord
from offload.daemon.requests import (
    CachedTokens,
    Finished,
    GenerationRequest,
    Miss,
    Sampling,
    Started,
)

HOSTILE = "a\nb\r\x1b[31mc\x7f\u202e\u2028d"
STARTED = Started("chat", 4, CachedTokens(1, 1, 1), 64, 0.5, 0.25, Miss(3, "diverged"))
FINISHED = Finished("stop", "", None, 4, 2, CachedTokens(1, 1, 1), 1, 0.1, 0.2, 0.25)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where logs go; the process's own logging is as before afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield io.StringIO()
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def record_of(session: str | None = "chat") -> RequestRecord:
    request = GenerationRequest("req-1", "ann", (5, 6, 7, 8), Sampling(), session)
    return RequestRecord(
        request, 10.0, "ended", STARTED, 4, 2, 10.5, 10.6, 11.0, FINISHED, outcome="stop"
    )


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_request_is_one_line_with_its_counts_and_times(stream: io.StringIO) -> None:
    configure_logs(LoggingSection(), stream)
    RequestLog("recall", str, lambda: False)(record_of())
    [line] = lines(stream)
    assert line["event"] == "request"
    assert line | {"timestamp": ""} == {
        "timestamp": "",
        "level": "info",
        "event": "request",
        "request_id": "req-1",
        "session": "chat",
        "tenant": "ann",
        "model": "recall",
        "prompt_tokens": 4,
        "generated_tokens": 2,
        "ttft_ms": 500.0,
        "total_ms": 1000.0,
        "finish": "stop",
        "disconnect": False,
        "cached": {"device": 1, "host": 1, "disk": 1, "remote": 0},
        "queue_ms": 250.0,
        "restore_ms": 500.0,
        "miss": "diverged",
        "written_tokens": 1,
        "prefill_ms": 100.0,
        "decode_ms": 200.0,
    }


def test_request_that_never_started_is_a_line_too(stream: io.StringIO) -> None:
    configure_logs(LoggingSection(), stream)
    request = GenerationRequest("req-1", "ann", (5,), Sampling())
    record = RequestRecord(request, 1.0, "ended", ended_s=2.0, outcome="QueueFull")
    RequestLog("recall", str, lambda: False)(record)
    [line] = lines(stream)
    assert (line["finish"], line["ttft_ms"], "cached" in line) == ("QueueFull", None, False)


@pytest.mark.parametrize("is_on", [False, True])
def test_prompt_is_in_the_log_only_if_asked_for(stream: io.StringIO, is_on: bool) -> None:
    configure_logs(LoggingSection(), stream)
    RequestLog("recall", lambda ids: f"secret {ids}", lambda: is_on)(record_of())
    assert ("secret (5, 6, 7, 8)" in stream.getvalue()) == is_on


@pytest.mark.parametrize("form", ["json", "text"])
def test_value_with_control_characters_stays_on_its_line(stream: io.StringIO, form: Any) -> None:
    configure_logs(LoggingSection(format=form), stream)
    RequestLog("recall", str, lambda: False)(record_of(HOSTILE))
    LOG.info("request", **{HOSTILE: [HOSTILE, {"x": HOSTILE}]})
    text = stream.getvalue()
    assert len(text.splitlines()) == 2
    assert not set(text) & set("\x1b\r\x7f\u202e\u2028")


def test_message_of_another_library_has_the_same_shape(stream: io.StringIO) -> None:
    configure_logs(LoggingSection(), stream)
    logging.getLogger("uvicorn.error").error("bad\n%s", "news")
    [line] = lines(stream)
    assert (line["event"], line["level"]) == ("bad\\u000anews", "error")


def test_exception_is_part_of_its_line(stream: io.StringIO) -> None:
    configure_logs(LoggingSection(), stream)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("x").exception("failed")
    [line] = lines(stream)
    assert "ValueError: why" in line["exception"]


def test_line_below_the_level_is_left_out(stream: io.StringIO) -> None:
    configure_logs(LoggingSection(level="warning"), stream)
    LOG.info("request")
    LOG.warning("trouble")
    assert [line["event"] for line in lines(stream)] == ["trouble"]


def test_level_that_is_configured_again_counts_from_then_on(stream: io.StringIO) -> None:
    configure_logs(LoggingSection(level="error"), stream)
    configure_logs(LoggingSection(level="debug"), stream)
    LOG.debug("details")
    assert [line["event"] for line in lines(stream)] == ["details"]


def test_cancelled_request_is_logged_as_a_disconnect(stream: io.StringIO) -> None:
    configure_logs(LoggingSection(), stream)
    record = record_of()
    record.outcome = "cancelled"

    async def on_the_loop() -> None:
        RequestLog("recall", str, lambda: False)(record)

    asyncio.run(on_the_loop())
    assert lines(stream)[0]["disconnect"] is True
