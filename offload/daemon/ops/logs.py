"""Structured logs: one line per event on standard error, with nothing of a prompt in it.

Modules log with ``structlog.get_logger()`` or the standard library; both come out alike.
"""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TextIO

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

    from offload.daemon.ops.config_sections import LoggingSection
    from offload.daemon.ops.watched_engine import RequestRecord

_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, C1 too, and those that turn the direction of text around."""

_FIRST: Final = ("timestamp", "level", "event")

LOG: Final = structlog.stdlib.get_logger("offload.daemon")


def configure_logs(settings: "LoggingSection", stream: TextIO | None = None) -> None:
    """Send the logs of this process to a stream, in the configured format.

    Call it again to change format or level.

    Parameters
    ----------
    settings : LoggingSection
    stream : text file, optional
        Standard error by default.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=_final(settings.format)
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = name != "uvicorn.access"
    # What it says at this level are steps of starting and stopping, which we say better.
    logging.getLogger("uvicorn.error").setLevel(max(root.level, logging.WARNING))


class RequestLog:
    """Writes one event for every request that has ended.

    Parameters
    ----------
    model : str
        Its name.
    decode : callable
        Token ids to text; used if prompts are logged.
    has_prompts : callable
        Whether they are; asked for each request, so that a reload changes it.
    """

    def __init__(
        self,
        model: str,
        decode: Callable[[Sequence[int]], str],
        has_prompts: Callable[[], bool],
    ) -> None:
        self._model = model
        self._decode = decode
        self._has_prompts = has_prompts

    def __call__(self, record: "RequestRecord") -> None:
        """Write it."""
        fields = request_fields(record, self._model)
        if self._has_prompts():
            fields["prompt"] = self._decode(record.request.token_ids)
        LOG.info("request", **fields)


def request_fields(record: "RequestRecord", model: str) -> dict[str, Any]:
    """Return what is logged of a request: counts and times, never its text."""
    request, started, finished = record.request, record.started, record.finished
    fields: dict[str, Any] = {
        "request_id": request.request_id,
        "session": record.session,
        "tenant": request.tenant,
        "model": model,
        "prompt_tokens": len(request.token_ids),
        "generated_tokens": record.num_generated,
        "ttft_ms": _ms(record.ttft_s),
        "total_ms": None if record.ended_s is None else _ms(record.ended_s - record.asked_s),
        "finish": record.outcome,
        "disconnect": record.outcome == "cancelled",
    }
    if started is not None:
        fields |= {
            "cached": asdict(started.cached),
            "queue_ms": _ms(started.queue_s),
            "restore_ms": _ms(started.restore_s),
            "miss": None if started.miss is None else started.miss.reason,
        }
    if finished is not None:
        fields |= {
            "written_tokens": finished.num_written_tokens,
            "prefill_ms": _ms(finished.prefill_s),
            "decode_ms": _ms(finished.decode_s),
        }
    return fields


def escape_controls(_logger: "WrappedLogger", _name: str, event: "EventDict") -> "EventDict":
    """Write control characters of all values as escapes: no value starts a line of its own."""
    first = {key: event[key] for key in _FIRST if key in event}
    return {str(_escaped(key)): _escaped(value) for key, value in (first | dict(event)).items()}


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_escaped(key)): _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    if not isinstance(value, str):
        return value
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", value)


def _final(form: str) -> "list[Processor]":
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    exceptions = structlog.processors.format_exc_info
    text = structlog.processors.KeyValueRenderer(key_order=_FIRST, drop_missing=True)
    # JSON escapes by itself, but not those beyond its own control characters.
    render: Processor = structlog.processors.JSONRenderer(default=str) if form == "json" else text
    return [remove_meta, exceptions, escape_controls, render]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
