"""``POST /v1/messages`` and ``/v1/messages/count_tokens``, Anthropic's API."""

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
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
from offload.daemon.http.generation import Answer, answer_of, while_connected
from offload.daemon.http.render_anthropic import turn_of_messages
from offload.daemon.http.render_messages import parsed_arguments
from offload.daemon.http.schema_common import AnthropicError, error_responses, with_stream
from offload.daemon.http.schema_messages import (
    CountReply,
    CountRequest,
    MessagesReply,
    MessagesRequest,
)
from offload.daemon.http.sse import named_event
from offload.daemon.http.stream import OpenStream, event_stream, open_stream
from offload.daemon.http.tool_calls import AnswerParser, Parts, Piece, ToolCall
from offload.daemon.http.usage import anthropic_usage, kv_headers
from offload.daemon.requests import Finished, Token

router = APIRouter(
    route_class=StrictJsonRoute, tags=["anthropic"], responses=error_responses(AnthropicError)
)

_PING = named_event("ping", {"type": "ping"})
_DELTAS = {"text": "text_delta", "reasoning": "thinking_delta"}
_FIELDS = {"text": "text", "reasoning": "thinking"}


@dataclass(frozen=True, slots=True)
class _Exchange:
    """One request, and what its reply begins with."""

    context: HttpContext
    body: MessagesRequest
    task: Task
    head: dict[str, Any]


@router.post(
    "/v1/messages",
    response_model=MessagesReply,
    responses=with_stream("The answer; with `stream`, named server-sent events."),
)
async def create_message(
    body: MessagesRequest, request: Request, context: Context, tenant: Caller
) -> Response:
    """Continue a conversation."""
    log_unknown_fields(body, "/v1/messages")
    model = context.model_name(body.model)
    hint = context.session_hint(body, request.headers)
    asker = Asker(tenant, request_id_of(request), hint)
    task = await prepare(context, asker, turn_of_messages(body), body, body.max_tokens)
    head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
    exchange = _Exchange(context, body, task, head)
    if body.stream:
        stream = await open_stream(context, request, tenant, task.request)
        request_id = request_id_of(request)
        return event_stream(
            context,
            stream,
            _events(exchange, stream),
            lambda problem: named_event("error", problem.anthropic(request_id)),
            hint,
        )
    with context.admitted(tenant):
        answer = await while_connected(request, answer_of(context.engine, task.request))
    parts = task.parts(answer)
    await remember(context, task, answer, parts)
    content = head | {"content": _blocks(parts), **_stopped(body, answer, parts)}
    return JSONResponse(
        content | {"usage": anthropic_usage(answer)}, headers=kv_headers(answer, hint)
    )


@router.post("/v1/messages/count_tokens", response_model=CountReply)
async def count_tokens(body: CountRequest, context: Context, tenant: Caller) -> dict[str, int]:
    """Count the tokens of a conversation."""
    context.model_name(body.model)
    prompt = await write_prompt(context, tenant, turn_of_messages(body))
    return {"input_tokens": len(prompt.token_ids)}


def _blocks(parts: Parts) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if parts.reasoning:
        blocks.append({"type": "thinking", "thinking": parts.reasoning, "signature": ""})
    if parts.text.strip() or not parts.calls:
        blocks.append({"type": "text", "text": parts.text})
    return [*blocks, *(_tool_block(call, _input_of(call)) for call in parts.calls)]


def _tool_block(call: ToolCall, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.call_id, "name": call.name, "input": arguments}


def _input_of(call: ToolCall) -> dict[str, Any]:
    found = parsed_arguments(call.arguments)
    return found if isinstance(found, dict) else {"input": found}


def _stopped(body: MessagesRequest, answer: Answer, parts: Parts) -> dict[str, Any]:
    finished = answer.finished
    stop = finished.stop_text if finished and finished.stop_text in body.stops() else None
    if parts.calls:
        reason = "tool_use"
    elif finished is None or finished.reason == "length":
        reason = "max_tokens"
    else:
        reason = "end_turn" if stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop}


@dataclass(slots=True)
class _Blocks:
    """The blocks of a stream: each is opened, filled and closed, one after the other."""

    parts: Parts = field(default_factory=Parts)
    number: int = -1
    kind: str | None = None

    def events(self, piece: Piece) -> list[bytes]:
        """Return the events of the next piece."""
        self.parts.add(piece)
        if piece.call is not None:
            block = _tool_block(piece.call, {})
            spelled = json.dumps(_input_of(piece.call))
            delta = {"type": "input_json_delta", "partial_json": spelled}
            return [*self.close(), self._open("call", block), self._delta(delta), *self.close()]
        name = _FIELDS[piece.kind]
        opened: list[bytes] = []
        if self.kind != piece.kind:
            block = {"type": name, name: ""} | ({"signature": ""} if name == "thinking" else {})
            opened = [*self.close(), self._open(piece.kind, block)]
        return [*opened, self._delta({"type": _DELTAS[piece.kind], name: piece.text})]

    def close(self) -> list[bytes]:
        """Return the event that ends the block, if there is one."""
        if self.kind is None:
            return []
        self.kind = None
        data = {"type": "content_block_stop", "index": self.number}
        return [named_event("content_block_stop", data)]

    def _open(self, kind: str, block: dict[str, Any]) -> bytes:
        self.number, self.kind = self.number + 1, kind
        data = {"type": "content_block_start", "index": self.number, "content_block": block}
        return named_event("content_block_start", data)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        data = {"type": "content_block_delta", "index": self.number, "delta": delta}
        return named_event("content_block_delta", data)


async def _events(exchange: _Exchange, stream: OpenStream) -> AsyncGenerator[bytes, None]:
    parser, blocks, answer = AnswerParser(exchange.task.form), _Blocks(), stream.answer
    yield _message_start(exchange, answer)
    async for event in stream.feed:
        if event is None:
            # A comment would not do: Claude Code's watchdog counts events only.
            yield _PING
            continue
        answer.add(event)
        if isinstance(event, (Token, Finished)):
            pieces = parser.feed(event.text)
            pieces += parser.finish() if isinstance(event, Finished) else []
            for piece in pieces:
                for line in blocks.events(piece):
                    yield line
    if blocks.number < 0:
        for line in blocks.events(Piece("text")):
            yield line
    for line in blocks.close():
        yield line
    await remember(exchange.context, exchange.task, answer, blocks.parts)
    stopped = _stopped(exchange.body, answer, blocks.parts)
    data = {"type": "message_delta", "delta": stopped, "usage": anthropic_usage(answer)}
    yield named_event("message_delta", data)
    yield named_event("message_stop", {"type": "message_stop"})


def _message_start(exchange: _Exchange, answer: Answer) -> bytes:
    unknown = {"stop_reason": None, "stop_sequence": None, "usage": anthropic_usage(answer)}
    message = exchange.head | {"content": [], **unknown}
    return named_event("message_start", {"type": "message_start", "message": message})
