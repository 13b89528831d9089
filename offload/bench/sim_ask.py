"""Asking a real engine, and noting when what came."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from offload.daemon.engine import DaemonEngine
from offload.daemon.requests import (
    GenerationRequest,
    PrefillProgress,
    Sampling,
    Started,
    Token,
)

TENANT = "bench"
_THREAD = "offload-daemon-engine"


@dataclass(slots=True)
class Heard:
    """One answer; times are of the clock that was given.

    Attributes
    ----------
    asked_s : float
    started : Started or None
    pieces : list of (int, float)
        Tokens of the prompt that are done, and seconds since it was asked.
    tokens : list of int
    token_s : list of float
        When each token came.
    """

    asked_s: float
    started: Started | None = None
    pieces: list[tuple[int, float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.token_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between tokens."""
        return [after - before for before, after in pairwise(self.token_s)]


Clock = Callable[[], float]


def engine_clock() -> Clock:
    """Return a clock that goes only while the thread of the one engine that runs has a processor.

    On a machine that is busy with other things it says what the work takes, not what the waiting.
    """
    [thread] = [each for each in threading.enumerate() if each.name == _THREAD]
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    return lambda: time.clock_gettime(clock)


async def ask(
    engine: DaemonEngine,
    ids: Sequence[int],
    session: str,
    num_tokens: int,
    clock: Clock = time.monotonic,
) -> Heard:
    """Ask for so many tokens, and wait for all of them.

    Raises
    ------
    OffloadError
        Of the engine.
    """
    sampling = Sampling(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    heard = Heard(clock())
    request = GenerationRequest("bench", TENANT, tuple(ids), sampling, session=session)
    async for event in engine.generate(request):
        if isinstance(event, Started):
            heard.started = event
        elif isinstance(event, PrefillProgress):
            heard.pieces.append((event.num_done, clock() - heard.asked_s))
        elif isinstance(event, Token):
            heard.token_s.append(clock())
            heard.tokens.append(event.token_id)
    return heard
