"""``POST /v1/chat/completions``."""

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from offload.daemon.errors import BadRequest
from offload.daemon.http.body import StrictJsonRoute
from offload.daemon.http.chat import Asker, Task, prepare, remember
from offload.daemon.http.context import (
    Caller,
    Context,
    HttpContext,
    log_unknown_fields,
    new_id,
    request_id_of,
)
from offload.daemon.http.generation import (
    Answer,
    EventFeed,
    answers_of,
    further,
    while_connected,
)
from offload.daemon.http.logprobs import chat_logprobs, token_entry
from offload.daemon.http.render_chat import turn_of_chat
from offload.daemon.http.schema_chat import ChatReply, ChatRequest
from offload.daemon.http.schema_common import error_responses, with_stream
from offload.daemon.http.sse import COMMENT, DONE, data_event
from offload.daemon.http.stream import OpenStream, event_stream, open_stream, progress
from offload.daemon.http.tool_calls import AnswerParser, Parts, Piece
from offload.daemon.http.usage import kv_headers, openai_usage
from offload.daemon.requests import Finished, PrefillProgress, Token

router = APIRouter(route_class=StrictJsonRoute, tags=["openai"], responses=error_responses())


@dataclass(frozen=True, slots=True)
class _Chat:
    """One request, and what all of its replies begin with."""

    context: HttpContext
    body: ChatRequest
    task: Task
    head: Mapping[str, Any]

    @property
    def has_logprobs(self) -> bool:
        return bool(self.body.logprobs)


@router.post(
    "/v1/chat/completions",
    response_model=ChatReply,
    responses=with_stream("The answer; with `stream`, chunks as server-sent events."),
)
async def create_chat_completion(
    body: ChatRequest, request: Request, context: Context, tenant: Caller
) -> Response:
    """Continue a conversation."""
    log_unknown_fields(body, "/v1/chat/completions")
    model = context.model_name(body.model)
    num_choices = body.n or 1
    if num_choices > context.options.max_choices:
        limit = context.options.max_choices
        raise BadRequest(f"{num_choices} choices are asked for, {limit} are allowed", "n")
    hint = context.session_hint(body, request.headers)
    maximum = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    tops = (body.top_logprobs or 0) if body.logprobs else None
    asker = Asker(tenant, request_id_of(request), hint)
    task = await prepare(context, asker, turn_of_chat(body), body, maximum, tops)
    head = {
        "id": new_id("chatcmpl-"),
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"fp_{context.engine.model.fingerprint[:12]}",
    }
    chat = _Chat(context, body, task, head)
    if body.stream:
        stream = await open_stream(context, request, tenant, task.request)
        source = _chunks(chat, stream, num_choices)
        return event_stream(
            context, stream, source, lambda problem: data_event(problem.openai()), hint
        )
    with context.admitted(tenant):
        answers = await while_connected(
            request, answers_of(context.engine, task.request, num_choices)
        )
    return await _whole_reply(chat, answers, hint)


async def _whole_reply(chat: _Chat, answers: list[Answer], hint: str | None) -> Response:
    taken_apart = [chat.task.parts(answer) for answer in answers]
    await remember(chat.context, chat.task, answers[0], taken_apart[0])
    choices = [
        _choice(chat, number, answer, parts)
        for number, (answer, parts) in enumerate(zip(answers, taken_apart, strict=True))
    ]
    content = {
        **chat.head,
        "object": "chat.completion",
        "choices": choices,
        "usage": openai_usage(answers),
    }
    return JSONResponse(content, headers=kv_headers(answers[0], hint))


def _choice(chat: _Chat, number: int, answer: Answer, parts: Parts) -> dict[str, Any]:
    message = parts.message() | {"refusal": None}
    if parts.reasoning:
        message["reasoning_content"] = parts.reasoning
    if parts.calls and not parts.text.strip():
        message["content"] = None
    renderer = chat.context.renderer
    logprobs = chat_logprobs(renderer, answer.tokens) if chat.has_logprobs else None
    return {
        "index": number,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": finish_reason(answer, parts),
    }


def finish_reason(answer: Answer, parts: Parts) -> str:
    """Return why an answer ended, as OpenAI's chats say it."""
    if parts.calls:
        return "tool_calls"
    return "length" if answer.finished is None or answer.finished.reason == "length" else "stop"


async def _chunks(chat: _Chat, stream: OpenStream, num_choices: int) -> AsyncGenerator[bytes, None]:
    answers = []
    for number in range(num_choices):
        feed, answer = stream.feed, stream.answer
        if number:
            engine, options = chat.context.engine, chat.context.options
            feed = EventFeed(
                engine.generate(further(chat.task.request, number)), options.keepalive_s
            )
            stream.held.push_async_callback(feed.aclose)
            answer = Answer()
        async for chunk in _choice_chunks(chat, number, feed, answer):
            yield chunk
        answers.append(answer)
    options_of_stream = chat.body.stream_options
    if options_of_stream and options_of_stream.include_usage:
        yield _chunk(chat, [], usage=openai_usage(answers))
    yield DONE


async def _choice_chunks(
    chat: _Chat, number: int, feed: EventFeed, answer: Answer
) -> AsyncGenerator[bytes, None]:
    parser, parts = AnswerParser(chat.task.form), Parts()
    yield _delta(chat, number, {"role": "assistant", "content": ""})
    async for event in feed:
        if event is None:
            yield COMMENT
            continue
        answer.add(event)
        match event:
            case PrefillProgress() if chat.body.return_progress:
                yield _chunk(chat, [], prompt_progress=progress(event, answer))
            case Token():
                pieces = parser.feed(event.text)
                deltas = _deltas(pieces, parts)
                logprobs = _logprobs(chat, event)
                for delta in deltas or ([{"content": ""}] if logprobs else []):
                    yield _delta(chat, number, delta, logprobs)
                    logprobs = None
            case Finished():
                pieces = [*parser.feed(event.text), *parser.finish()]
                for delta in _deltas(pieces, parts):
                    yield _delta(chat, number, delta)
    if number == 0:
        await remember(chat.context, chat.task, answer, parts)
    yield _delta(chat, number, {}, reason=finish_reason(answer, parts))


def _deltas(pieces: list[Piece], parts: Parts) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.call is not None:
            call = {"index": len(parts.calls), **piece.call.openai()}
            deltas.append({"tool_calls": [call]})
        else:
            key = "reasoning_content" if piece.kind == "reasoning" else "content"
            deltas.append({key: piece.text})
        parts.add(piece)
    return deltas


def _logprobs(chat: _Chat, token: Token) -> dict[str, Any] | None:
    if not chat.has_logprobs:
        return None
    return {"content": [token_entry(chat.context.renderer, token)], "refusal": None}


def _delta(
    chat: _Chat,
    number: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> bytes:
    choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
    return _chunk(chat, [choice])


def _chunk(chat: _Chat, choices: list[dict[str, Any]], **more: Any) -> bytes:
    head = {**chat.head, "object": "chat.completion.chunk"}
    return data_event({**head, "choices": choices, **more})
