"""Synthetic traces: conversations with turns, pauses to think, and prompts that systems share."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final

from offload.bench.sim_trace import MOONCAKE_BLOCK_TOKENS, Trace, TraceRequest
from offload.errors import ConfigError

_SPREAD: Final = 0.6
"""Standard deviation of the logarithm of lengths."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a trace is drawn from.

    Attributes
    ----------
    sessions : int
    sessions_per_s : float
        Conversations that begin, a Poisson process.
    turns : float
        Mean of a geometric distribution, at least 1.
    think_s : float
        Mean time from one arrival of a session to the next, exponential.
    first_tokens, more_tokens, output_tokens : float
        Means of log-normal lengths: what the first prompt has after the system's, what each later
        turn adds after the answer, and the answer.
    system_prompts, system_tokens : int
        How many there are, shared by all sessions, and how long each is.
    max_tokens : int
        A session ends before its context would be longer.
    """

    sessions: int = 200
    sessions_per_s: float = 1.0
    turns: float = 5.0
    think_s: float = 30.0
    first_tokens: float = 2000.0
    more_tokens: float = 300.0
    output_tokens: float = 200.0
    system_prompts: int = 4
    system_tokens: int = 1024
    max_tokens: int = 131072

    def __post_init__(self) -> None:
        counts = (self.sessions, self.sessions_per_s, self.think_s, self.max_tokens)
        lengths = (self.first_tokens, self.more_tokens, self.output_tokens)
        if min(*counts, *lengths) <= 0 or self.turns < 1:
            raise ConfigError(f"a workload wants positive numbers, and turns from 1 on: {self}")
        if self.system_tokens < 0 or (self.system_tokens and self.system_prompts < 1):
            raise ConfigError(f"{self.system_prompts} prompts of {self.system_tokens} tokens")


def synthesize(
    workload: Workload, seed: int = 0, block_tokens: int = MOONCAKE_BLOCK_TOKENS
) -> Trace:
    """Draw a trace; the same arguments give the same."""
    draw = random.Random(seed)
    names = count()
    systems = [
        tuple(next(names) for _ in range(workload.system_tokens // block_tokens))
        for _ in range(workload.system_prompts)
    ]
    requests: list[TraceRequest] = []
    begin_s = 0.0
    for session in range(workload.sessions):
        begin_s += draw.expovariate(workload.sessions_per_s)
        system = draw.choice(systems) if systems else ()
        requests += _turns(workload, draw, names, system, session, begin_s, block_tokens)
    requests.sort(key=lambda each: each.arrival_s)
    return Trace(tuple(requests), block_tokens)


def _turns(
    workload: Workload,
    draw: random.Random,
    names: "count[int]",
    system: tuple[int, ...],
    session: int,
    now_s: float,
    block_tokens: int,
) -> Iterator[TraceRequest]:
    blocks = list(system)
    size = workload.system_tokens + _length(draw, workload.first_tokens)
    while True:
        answer = _length(draw, workload.output_tokens)
        if size + answer > workload.max_tokens:
            return
        blocks += (next(names) for _ in range(size // block_tokens - len(blocks)))
        # The last block is partly filled, so the next turn's there has another name.
        rest = (next(names),) if size % block_tokens else ()
        yield TraceRequest(now_s, size, answer, (*blocks, *rest), session)
        if draw.random() * workload.turns < 1.0:
            return
        now_s += draw.expovariate(1 / workload.think_s)
        size += answer + _length(draw, workload.more_tokens)


def _length(draw: random.Random, mean: float) -> int:
    # The mean of a log-normal is exp(mu + sigma^2 / 2).
    return max(1, round(draw.lognormvariate(math.log(mean) - _SPREAD**2 / 2, _SPREAD)))
