"""``POST /v1/completions``."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from offload.daemon.errors import BadRequest
from offload.daemon.http.body import StrictJsonRoute
from offload.daemon.http.context import (
    Caller,
    Context,
    HttpContext,
    log_unknown_fields,
    new_id,
    request_id_of,
)
from offload.daemon.http.generation import Answer, EventFeed, while_connected
from offload.daemon.http.logprobs import completion_logprobs
from offload.daemon.http.prompts import (
    PlainPrompt,
    all_answers,
    every_choice,
    plain_prompts,
    requests_of,
)
from offload.daemon.http.schema_common import error_responses, with_stream
from offload.daemon.http.schema_completions import CompletionReply, CompletionRequest
from offload.daemon.http.sse import COMMENT, DONE, data_event
from offload.daemon.http.stream import OpenStream, event_stream, open_stream
from offload.daemon.http.usage import kv_headers, num_prompt_tokens, openai_usage
from offload.daemon.requests import Finished, GenerationRequest, Token, TokenLogprob

router = APIRouter(route_class=StrictJsonRoute, tags=["openai"], responses=error_responses())

Entry = tuple[int, float | None, Sequence[TokenLogprob]]


@dataclass(frozen=True, slots=True)
class _Completion:
    """One request, and what all of its replies begin with."""

    context: HttpContext
    body: CompletionRequest
    prompts: Sequence[PlainPrompt]
    requests: Sequence[GenerationRequest]
    num_choices: int
    head: Mapping[str, Any]


@router.post(
    "/v1/completions",
    response_model=CompletionReply,
    responses=with_stream("The continuations; with `stream`, chunks as server-sent events."),
)
async def create_completion(
    body: CompletionRequest, request: Request, context: Context, tenant: Caller
) -> Response:
    """Continue texts."""
    log_unknown_fields(body, "/v1/completions")
    model = context.model_name(body.model)
    num_choices = _checked_choices(body, context.options.max_choices)
    hint = context.session_hint(body, request.headers)
    prompts = await plain_prompts(context, body.prompt, add_special_tokens=body.add_special_tokens)
    maximum = context.options.default_max_tokens if body.max_tokens is None else body.max_tokens
    sampling = body.sampling(
        maximum,
        top_logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    base = GenerationRequest(
        request_id_of(request), tenant.name, (), sampling, hint, body.cache_salt
    )
    head = {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"fp_{context.engine.model.fingerprint[:12]}",
    }
    requests = requests_of(prompts, base, sampling)
    asked = _Completion(context, body, prompts, requests, num_choices, head)
    if body.stream:
        stream = await open_stream(context, request, tenant, requests[0])
        source = _chunks(asked, stream)
        return event_stream(
            context, stream, source, lambda problem: data_event(problem.openai()), hint
        )
    with context.admitted(tenant):
        answers = await while_connected(request, all_answers(context.engine, requests, num_choices))
    return JSONResponse(_whole_reply(asked, answers), headers=kv_headers(answers[0][0], hint))


def _checked_choices(body: CompletionRequest, limit: int) -> int:
    num_choices = body.n or 1
    if body.suffix:
        raise BadRequest("this model cannot fill in before a suffix", "suffix")
    if num_choices > limit:
        raise BadRequest(f"{num_choices} choices are asked for, {limit} are allowed", "n")
    if (body.best_of or 0) > num_choices:
        raise BadRequest(f"best_of is {body.best_of}, n is {num_choices}: all are given", "best_of")
    return num_choices


def _whole_reply(asked: _Completion, answers: list[list[Answer]]) -> dict[str, Any]:
    choices = [
        _choice(asked, prompt, answer)
        for prompt, of_prompt in zip(asked.prompts, answers, strict=True)
        for answer in of_prompt
    ]
    numbered = [{"index": number, **choice} for number, choice in enumerate(choices)]
    return {**asked.head, "choices": numbered, "usage": _usage(answers)}


def _usage(answers: list[list[Answer]]) -> dict[str, Any]:
    """Add up the prompts; what else there is to say is said of the first."""
    usage = openai_usage([answer for of_prompt in answers for answer in of_prompt])
    prompt_tokens = sum(num_prompt_tokens(of_prompt[0]) for of_prompt in answers)
    total = prompt_tokens + usage["completion_tokens"]
    return usage | {"prompt_tokens": prompt_tokens, "total_tokens": total}


def _choice(asked: _Completion, prompt: PlainPrompt, answer: Answer) -> dict[str, Any]:
    body, echo = asked.body, bool(asked.body.echo)
    entries = _prompt_entries(prompt, answer) if echo else []
    entries += [(token.token_id, token.logprob, token.tops) for token in answer.tokens]
    renderer = asked.context.renderer
    return {
        "text": (prompt.text if echo else "") + answer.text,
        "finish_reason": _reason(answer),
        "logprobs": None if body.logprobs is None else completion_logprobs(renderer, entries),
    }


def _prompt_entries(prompt: PlainPrompt, answer: Answer) -> list[Entry]:
    known = answer.prompt_logprobs
    if known is None:
        return []
    rest = [
        (token.token_id, token.logprob, tops)
        for token, tops in zip(known.tokens, known.tops, strict=True)
    ]
    return [(prompt.token_ids[0], None, ()), *rest]


def _reason(answer: Answer) -> str:
    return "length" if answer.finished is None or answer.finished.reason == "length" else "stop"


async def _chunks(asked: _Completion, stream: OpenStream) -> AsyncGenerator[bytes, None]:
    answers: list[list[Answer]] = [[] for _ in asked.prompts]
    engine, options = asked.context.engine, asked.context.options
    for number, generation in enumerate(every_choice(asked.requests, asked.num_choices)):
        feed, answer = stream.feed, stream.answer
        if number:
            feed = EventFeed(engine.generate(generation), options.keepalive_s)
            stream.held.push_async_callback(feed.aclose)
            answer = Answer()
        prompt_number = number // asked.num_choices
        async for chunk in _choice_chunks(asked, number, feed, answer):
            yield chunk
        answers[prompt_number].append(answer)
    if asked.body.stream_options and asked.body.stream_options.include_usage:
        yield data_event({**asked.head, "choices": [], "usage": _usage(answers)})
    yield DONE


async def _choice_chunks(
    asked: _Completion, number: int, feed: EventFeed, answer: Answer
) -> AsyncGenerator[bytes, None]:
    prompt = asked.prompts[number // asked.num_choices]
    is_echoed = not asked.body.echo
    async for event in feed:
        if event is None:
            yield COMMENT
            continue
        answer.add(event)
        if not isinstance(event, (Token, Finished)):
            continue
        if not is_echoed:
            is_echoed = True
            yield _chunk(asked, number, prompt.text, _prompt_entries(prompt, answer))
        if isinstance(event, Token):
            entries = [(event.token_id, event.logprob, event.tops)]
            if event.text or asked.body.logprobs is not None:
                yield _chunk(asked, number, event.text, entries)
        elif event.text:
            yield _chunk(asked, number, event.text, [])
    yield _chunk(asked, number, "", [], _reason(answer))


def _chunk(
    asked: _Completion,
    number: int,
    text: str,
    entries: Sequence[Entry],
    reason: str | None = None,
) -> bytes:
    wanted = asked.body.logprobs is not None and entries
    logprobs = completion_logprobs(asked.context.renderer, entries) if wanted else None
    choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
    return data_event({**asked.head, "choices": [choice]})
