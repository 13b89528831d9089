"""Runs requests on the engine for as long as their clients are there."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.exceptions import HTTPException

from offload.daemon.engine import DaemonEngine
from offload.daemon.http.sse import hung_up
from offload.daemon.requests import (
    CachedTokens,
    Event,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    Started,
    Token,
)

T = TypeVar("T")


@dataclass(slots=True)
class Answer:
    """Everything that came of one request.

    Attributes
    ----------
    started : Started or None
    tokens : list of Token
    prompt_logprobs : PromptLogprobs or None
    finished : Finished or None
        None while it runs.
    """

    started: Started | None = None
    tokens: list[Token] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None
    finished: Finished | None = None

    def add(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case Started():
                self.started = event
            case Token():
                self.tokens.append(event)
            case PromptLogprobs():
                self.prompt_logprobs = event
            case Finished():
                self.finished = event

    @property
    def text(self) -> str:
        """What was said so far."""
        rest = self.finished.text if self.finished else ""
        return "".join([token.text for token in self.tokens]) + rest

    @property
    def token_ids(self) -> list[int]:
        """Generated tokens, with those that ended the answer."""
        return [token.token_id for token in self.tokens]

    @property
    def session(self) -> str | None:
        """Where it was found to belong."""
        return self.started.session if self.started else None

    @property
    def cached(self) -> CachedTokens:
        """Tokens that needed no prefill."""
        return self.started.cached if self.started else CachedTokens()


class EventFeed:
    """The events of a request, or None whenever there was none for so long.

    Used by one task. ``aclose`` ends the request.

    Parameters
    ----------
    source : async iterator of Event
    keepalive_s : float
    """

    def __init__(self, source: AsyncIterator[Event], keepalive_s: float) -> None:
        # The engine's face promises an iterator that can be closed.
        self._source = cast("AsyncGenerator[Event, None]", source)
        self._keepalive_s = keepalive_s
        self._waiting: asyncio.Task[Event | None] | None = None
        self._early: list[Event] = []

    async def open(self) -> Started | None:
        """Wait for the first event, so that what is refused at once is refused with a status.

        Returns
        -------
        Started or None
            None: nothing came for ``keepalive_s``.
        """
        try:
            event = await self._next()
        except BaseException:
            await self.aclose()
            raise
        if event is not None:
            self._early.append(event)
        return event if isinstance(event, Started) else None

    async def __aiter__(self) -> AsyncGenerator[Event | None, None]:
        """Yield every event; ``Finished`` is the last."""
        for event in self._early:
            yield event
        while True:
            item = await self._next()
            yield item
            if isinstance(item, Finished):
                return

    async def aclose(self) -> None:
        """End the request, if it has not ended."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.wait({self._waiting})
            self._waiting = None
        await self._source.aclose()

    async def _next(self) -> Event | None:
        if self._waiting is None:
            self._waiting = asyncio.create_task(self._take())
        done, _ = await asyncio.wait({self._waiting}, timeout=self._keepalive_s)
        if not done:
            return None
        task, self._waiting = self._waiting, None
        return task.result()

    async def _take(self) -> Event:
        return await anext(self._source)


async def answer_of(engine: DaemonEngine, request: GenerationRequest) -> Answer:
    """Run a request to its end."""
    answer = Answer()
    async with aclosing(engine.generate(request)) as source:
        async for event in source:
            answer.add(event)
    return answer


async def answers_of(
    engine: DaemonEngine, request: GenerationRequest, num_choices: int
) -> list[Answer]:
    """Run a request so many times: the first reads the prompt, the others share what it knows."""
    first = await answer_of(engine, request)
    others = [answer_of(engine, further(request, number)) for number in range(1, num_choices)]
    return [first, *await side_by_side(others)]


async def side_by_side(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do several things at a time; the first that fails ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


def further(request: GenerationRequest, number: int) -> GenerationRequest:
    """Return the request of another choice: its own luck, and nothing of it is kept."""
    seed = request.sampling.seed
    sampling = replace(request.sampling, seed=None if seed is None else seed + number)
    request_id = f"{request.request_id}-{number}"
    return replace(request, request_id=request_id, sampling=sampling, session=None, is_kept=False)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do something unless the client leaves first.

    Raises
    ------
    HTTPException
        499, which nobody reads: the client has gone, and the work was cancelled.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(hung_up(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise HTTPException(499, "the client has gone")
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait({working, leaving})
