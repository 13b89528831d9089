"""Opens the stream of a request, and closes all that belongs to it when it ends."""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from fastapi import Request

from offload.daemon.http.context import HttpContext
from offload.daemon.http.errors import Problem, problem_of
from offload.daemon.http.generation import Answer, EventFeed, while_connected
from offload.daemon.http.sse import EventStream
from offload.daemon.http.usage import kv_headers
from offload.daemon.ops.tenants import Tenant
from offload.daemon.requests import GenerationRequest, PrefillProgress


@dataclass(frozen=True, slots=True)
class OpenStream:
    """A request that runs, and was not refused.

    Attributes
    ----------
    feed : EventFeed
    answer : Answer
        What is known of it so far.
    held : AsyncExitStack
        To be closed at the end.
    """

    feed: EventFeed
    answer: Answer
    held: AsyncExitStack


async def open_stream(
    context: HttpContext, request: Request, tenant: Tenant, generation: GenerationRequest
) -> OpenStream:
    """Start a request, and wait until it is under way or has been waited for long enough.

    Raises
    ------
    DaemonError
        It is refused, while there can still be a status that says so.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(context.admitted(tenant))
        feed = EventFeed(context.engine.generate(generation), context.options.keepalive_s)
        stack.push_async_callback(feed.aclose)
        answer = Answer(started=await while_connected(request, feed.open()))
        return OpenStream(feed, answer, stack.pop_all())


def event_stream(
    context: HttpContext,
    stream: OpenStream,
    source: AsyncGenerator[bytes, None],
    tell: Callable[[Problem], bytes],
    hint: str | None,
) -> EventStream:
    """Return the response that a source writes.

    Parameters
    ----------
    context : HttpContext
    stream : OpenStream
    source : async generator of bytes
    tell : callable
        Turns an error into an event: after the first byte there is no other way to tell.
    hint : str or None
        The session that the client named.
    """
    headers = kv_headers(stream.answer, hint)
    return EventStream(
        _with_errors(source, tell), context.options.send_timeout_s, headers, stream.held
    )


async def _with_errors(
    source: AsyncGenerator[bytes, None], tell: Callable[[Problem], bytes]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(source):
        try:
            async for piece in source:
                yield piece
        except Exception as error:
            yield tell(problem_of(error))


def progress(event: PrefillProgress, answer: Answer) -> Mapping[str, float]:
    """Return how far a prompt is read, as llama.cpp says it."""
    return {
        "total": event.num_prompt_tokens,
        "cache": answer.cached.total,
        "processed": event.num_done,
        "time_ms": round(event.elapsed_s * 1e3),
    }
