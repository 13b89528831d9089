"""``/v1/responses``: answers that are kept, and that others can follow."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from offload.daemon.http.body import StrictJsonRoute
from offload.daemon.http.chat import Asker, Task, prepare, remember, write_prompt
from offload.daemon.http.context import (
    Caller,
    Context,
    HttpContext,
    log_unknown_fields,
    new_id,
    request_id_of,
)
from offload.daemon.http.errors import Problem, problem_of
from offload.daemon.http.generation import Answer, answer_of, while_connected
from offload.daemon.http.logprobs import token_entry
from offload.daemon.http.render_items import input_items, output_items, turn_of_response
from offload.daemon.http.responses import (
    failed_response,
    finished_response,
    response_head,
    status_of,
)
from offload.daemon.http.schema_common import error_responses, with_stream
from offload.daemon.http.schema_responses import (
    InputTokensReply,
    Item,
    ResponseReply,
    ResponsesInput,
    ResponsesRequest,
)
from offload.daemon.http.sse import COMMENT
from offload.daemon.http.sse_responses import ResponseEvents
from offload.daemon.http.store import StoredResponse
from offload.daemon.http.stream import OpenStream, event_stream, open_stream
from offload.daemon.http.tool_calls import AnswerParser, Piece
from offload.daemon.http.usage import kv_headers
from offload.daemon.ops.tenants import Tenant
from offload.daemon.requests import Finished, Token

router = APIRouter(route_class=StrictJsonRoute, tags=["openai"], responses=error_responses())


@dataclass(frozen=True, slots=True)
class _Ask:
    """One request, what came with it, and what its reply begins with."""

    context: HttpContext
    body: ResponsesRequest
    tenant: Tenant
    task: Task
    items: Sequence[Item]
    head: dict[str, Any]
    hint: str | None


@router.post(
    "/v1/responses",
    response_model=ResponseReply,
    responses=with_stream("The response; with `stream`, typed server-sent events."),
)
async def create_response(
    body: ResponsesRequest, request: Request, context: Context, tenant: Caller
) -> Response:
    """Answer, and keep the answer unless told otherwise."""
    log_unknown_fields(body, "/v1/responses")
    ask = await _prepare(body, request, context, tenant)
    if body.stream:
        stream = await open_stream(context, request, tenant, ask.task.request)
        events = ResponseEvents(ask.head)

        def tell(problem: Problem) -> bytes:
            return events.error(problem.openai()["error"])

        return event_stream(context, stream, _events(ask, stream, events), tell, ask.hint)
    if body.background:
        queued = ask.head | {"status": "queued"}
        context.background.start(tenant.name, queued, _in_background(ask))
        return JSONResponse(queued)
    with context.admitted(tenant):
        answer = await while_connected(request, answer_of(context.engine, ask.task.request))
    return JSONResponse(await _answered(ask, answer), headers=kv_headers(answer, ask.hint))


async def _prepare(
    body: ResponsesRequest, request: Request, context: HttpContext, tenant: Tenant
) -> _Ask:
    model = context.model_name(body.model)
    items = input_items(body.input)
    history, previous_session = await _history(context, tenant, body)
    hint = context.session_hint(body, request.headers, previous_session)
    asker = Asker(tenant, request_id_of(request), hint)
    turn = turn_of_response(body, [*history, *items])
    task = await prepare(context, asker, turn, body, body.max_output_tokens, body.wanted_logprobs)
    head = response_head(body, new_id("resp_"), model)
    return _Ask(context, body, tenant, task, items, head, hint)


async def _history(
    context: HttpContext, tenant: Tenant, body: ResponsesInput
) -> tuple[list[Item], str | None]:
    """Return the items that come before those of the request, and their session."""
    store = context.store
    if body.conversation_id is not None:
        return await context.work(store.items, tenant.name, body.conversation_id), None
    if body.previous_response_id is None:
        return [], None
    previous = await context.work(store.response, tenant.name, body.previous_response_id)
    items = await context.work(store.history, tenant.name, body.previous_response_id)
    return items, previous.session


async def _answered(ask: _Ask, answer: Answer) -> dict[str, Any]:
    parts = ask.task.parts(answer)
    await remember(ask.context, ask.task, answer, parts)
    entries = _logprobs(ask, answer.tokens)
    output = output_items(parts, entries, status_of(answer))
    response = finished_response(ask.head, answer, output)
    await _keep(ask, answer, response)
    return response


def _logprobs(ask: _Ask, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    if ask.body.wanted_logprobs is None:
        return []
    return [token_entry(ask.context.renderer, token) for token in tokens]


async def _keep(ask: _Ask, answer: Answer | None, response: dict[str, Any]) -> None:
    store, tenant, name = ask.context.store, ask.tenant.name, ask.body.conversation_id
    if ask.body.is_stored:
        session = (answer.session if answer else None) or ask.hint
        stored = StoredResponse(response["previous_response_id"], session, response, [*ask.items])
        await ask.context.work(store.put_response, tenant, stored)
    if name is not None and answer is not None:
        items = [*ask.items, *response["output"]]
        await ask.context.work(store.add_items, tenant, name, items)


async def _in_background(ask: _Ask) -> None:
    try:
        with ask.context.admitted(ask.tenant):
            answer = await answer_of(ask.context.engine, ask.task.request)
        await _answered(ask, answer)
    except Exception as error:
        # Whoever asks for the response reads there what became of it.
        await _keep(ask, None, failed_response(ask.head, problem_of(error)))


async def _events(
    ask: _Ask, stream: OpenStream, events: ResponseEvents
) -> AsyncGenerator[bytes, None]:
    parser, answer = AnswerParser(ask.task.form), stream.answer
    for line in events.begin():
        yield line
    async for event in stream.feed:
        if event is None:
            yield COMMENT
            continue
        answer.add(event)
        if not isinstance(event, (Token, Finished)):
            continue
        entries = _logprobs(ask, [event]) if isinstance(event, Token) else []
        pieces = parser.feed(event.text)
        pieces += parser.finish() if isinstance(event, Finished) else []
        for piece in pieces or ([Piece("text")] if entries else []):
            for line in events.feed(piece, entries):
                yield line
            entries = []
    if not events.output and not events.parts.text:
        for line in events.feed(Piece("text")):
            yield line
    for line in events.close(status_of(answer)):
        yield line
    await remember(ask.context, ask.task, answer, events.parts)
    response = finished_response(ask.head, answer, events.output)
    await _keep(ask, answer, response)
    for line in events.end(response):
        yield line


@router.post("/v1/responses/input_tokens", response_model=InputTokensReply)
async def count_input_tokens(
    body: ResponsesInput, context: Context, tenant: Caller
) -> dict[str, Any]:
    """Count the tokens that a response would read."""
    context.model_name(body.model)
    history, _ = await _history(context, tenant, body)
    turn = turn_of_response(body, [*history, *input_items(body.input)])
    prompt = await write_prompt(context, tenant, turn)
    return {"object": "response.input_tokens", "input_tokens": len(prompt.token_ids)}
