"""An engine that is watched: every request leaves a record, for logs, metrics and status page."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from offload.daemon.engine import DaemonEngine
from offload.daemon.engine_settings import EngineSettings
from offload.daemon.requests import (
    Event,
    Finished,
    GenerationRequest,
    PrefillProgress,
    Started,
    Token,
)
from offload.daemon.served_model import ServedModel

Phase = Literal["waiting", "prefill", "decode", "ended"]


@dataclass(slots=True)
class RequestRecord:
    """One request, as far as it has come.

    Attributes
    ----------
    request : GenerationRequest
    asked_s : float
        Of ``time.monotonic``, as ``first_token_s`` and ``ended_s`` are.
    phase : {"waiting", "prefill", "decode", "ended"}
    started : Started or None
    num_done : int
        Tokens of the prompt that are known or computed.
    num_generated : int
    first_token_s, last_token_s, ended_s : float or None
    finished : Finished or None
        None at the end: it failed, or its client left.
    outcome : str
        ``stop``, ``length``, ``cancelled``, or the name of the exception.
    """

    request: GenerationRequest
    asked_s: float
    phase: Phase = "waiting"
    started: Started | None = None
    num_done: int = 0
    num_generated: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    finished: Finished | None = None
    outcome: str = ""

    @property
    def session(self) -> str | None:
        """The session it belongs to, as the engine found it, or as it was asked for."""
        return self.request.session if self.started is None else self.started.session

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token; None if there was none."""
        return None if self.first_token_s is None else self.first_token_s - self.asked_s


@dataclass(slots=True)
class Observers:
    """Who is told, on the event loop that runs the requests. None of them may block or raise.

    Attributes
    ----------
    on_token_gap : list of callable
        Given the seconds between two tokens of one request.
    on_end : list of callable
        Given the record of a request that has ended, however it did.
    """

    on_token_gap: list[Callable[[float], object]] = field(default_factory=list)
    on_end: list[Callable[[RequestRecord], object]] = field(default_factory=list)


class WatchedEngine(DaemonEngine):
    """A ``DaemonEngine`` that keeps a record of every request.

    Parameters
    ----------
    model : ServedModel
    settings : EngineSettings

    Attributes
    ----------
    observers : Observers
    """

    def __init__(self, model: ServedModel, settings: EngineSettings) -> None:
        super().__init__(model, settings)
        self.observers = Observers()
        self._records: dict[int, RequestRecord] = {}

    @property
    def requests(self) -> tuple[RequestRecord, ...]:
        """Requests that wait or are computed, oldest first. Only for reading, on the event loop."""
        return tuple(self._records.values())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Compute one request, and keep a record of it; as of ``DaemonEngine``."""
        record = RequestRecord(request, time.monotonic())
        self._records[id(record)] = record
        try:
            async with aclosing(super().generate(request)) as events:
                async for event in events:
                    self._note(record, event)
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            record.outcome = record.outcome or "cancelled"
            raise
        except Exception as error:
            record.outcome = type(error).__name__
            raise
        finally:
            del self._records[id(record)]
            record.phase, record.ended_s = "ended", time.monotonic()
            for tell in self.observers.on_end:
                tell(record)

    def _note(self, record: RequestRecord, event: Event) -> None:
        match event:
            case Started():
                record.started, record.phase = event, "prefill"
                record.num_done = event.cached.total
            case PrefillProgress():
                record.num_done = event.num_done
            case Token():
                self._note_token(record)
            case Finished():
                record.finished, record.outcome = event, event.reason

    def _note_token(self, record: RequestRecord) -> None:
        now = time.monotonic()
        if record.last_token_s is None:
            record.first_token_s, record.phase = now, "decode"
        else:
            for tell in self.observers.on_token_gap:
                tell(now - record.last_token_s)
        record.last_token_s = now
        record.num_generated += 1
